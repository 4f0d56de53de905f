"""Lower precision: what is summed up, and in what; and nothing goes to the host in the loop."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    classified,
    feedforward,
    label,
    nothing_left_behind,
    solved,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_growth as cg

HALF = torch.bfloat16
LOW = [torch.bfloat16, torch.float16]


def several_blocks() -> list[cg.Candidate]:
    """Closed forms, alone and together, and one without."""
    return [
        candidate("1", 8),
        candidate("3", 8),
        candidate("3", block=cg.blocks.ResidualMLP(8, 5, nn.Tanh()), name="residual"),
        candidate("2", block=Gain(8)),
    ]


def setting() -> tuple[nn.Sequential, list[Any]]:
    torch.set_default_dtype(torch.float32)
    return feedforward(2, 8, 8, 3), classified(100, batch=32)


def assert_near(found: cg.Solution, expected: cg.Solution, tolerance: float) -> None:
    """To a tolerance relative to the whole multiplier, as rounding of the inputs gives."""
    for name, multiplier in expected.multipliers.items():
        for key, value in multiplier.items():
            error = torch.linalg.vector_norm(found.multipliers[name][key].to(value) - value)
            assert error <= tolerance * torch.linalg.vector_norm(value)
    for name, sensitivity in expected.sensitivities.items():
        other = found.sensitivities[name]
        assert other.variance**0.5 == pytest.approx(sensitivity.variance**0.5, rel=tolerance)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.stationarity == pytest.approx(expected.stationarity, rel=tolerance)


def dtypes_of(solution: cg.Solution) -> set[torch.dtype]:
    return {value.dtype for each in solution.multipliers.values() for value in each.values()}


def test_autocast_keeps_blocks_and_sums_in_the_precision_of_the_parameters() -> None:
    model, data = setting()
    candidates = several_blocks()
    expected = solved(model, data, *candidates)
    with torch.autocast("cpu", HALF), nothing_left_behind(model):
        found = solved(model, data, *candidates)
    assert dtypes_of(found) == {torch.float32}
    for planned in found.candidates.values():
        assert {p.dtype for p in planned.block.parameters()} == {torch.float32}
    assert_near(found, expected, 0.1)


class Casting(nn.Module):
    """A model that goes into autocast by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", HALF):
            return self.inner(x)


def test_autocast_inside_the_model() -> None:
    model, data = setting()
    expected = solved(model, data, candidate("1", 8))
    found = solved(Casting(model), data, candidate("inner.1", 8))
    assert dtypes_of(found) == {torch.float32}
    error = found.multipliers["inner.1"]["weight"] - expected.multipliers["1"]["weight"]
    assert error.norm() <= 0.1 * expected.multipliers["1"]["weight"].norm()


def test_problem_made_outside_of_autocast_and_solved_inside() -> None:
    model, data = setting()
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, several_blocks())
    expected = cg.solve(problem)
    with torch.autocast("cpu", HALF):
        assert_near(cg.solve(problem), expected, 0.1)


def test_weights_that_autocast_holds_without_gradients() -> None:
    """Cast under no_grad, they would cut the parameters off from the loss."""
    model, data = setting()
    with torch.autocast("cpu", HALF):
        expected = solved(model, data, candidate("1", 8))
        with torch.no_grad():
            model(data[0][0])
        found = solved(model, data, candidate("1", 8))
    assert found.stationarity == expected.stationarity


def test_sums_under_autocast_are_not_rounded() -> None:
    """With weights and data that bfloat16 holds exactly, λ is that of float32 to its rounding."""
    model, data = setting()
    torch.manual_seed(3)
    site = nn.Identity()
    model = nn.Sequential(site, nn.Linear(2, 1, bias=False))
    data = [(torch.randn(500, 2).to(HALF).float(), torch.zeros(500)) for _ in range(3)]
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([[0.5, -2.0]]))
    block = cg.blocks.ResidualLinear(2, torch.tanh)

    def loss_fn(output: Tensor, _: Tensor) -> Tensor:
        return output.float().mean()

    expected = solved(model, data, candidate("0", block=block), loss_fn=loss_fn)
    with torch.autocast("cpu", HALF):
        found = solved(model, data, candidate("0", block=block), loss_fn=loss_fn)
    # δ = w / 500 is rounded to bfloat16 when the sums are means of 500: one factor for all of λ
    one, other = found.multipliers["0"]["weight"], expected.multipliers["0"]["weight"]
    ratio = (one * other).sum() / other.square().sum()
    assert ratio == pytest.approx(1.0, abs=2**-8)
    torch.testing.assert_close(one, ratio * other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", LOW)
def test_models_in_low_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    model, data = setting()
    model.to(dtype)
    data = [(x.to(dtype), y) for x, y in data]
    candidates = several_blocks()
    found = solved(model, data, *candidates)
    exact = [(x.double(), y) for x, y in data]
    for one in candidates:
        one.block.to(dtype).double()
    expected = solved(model.double(), exact, *candidates)
    assert dtypes_of(found) == {torch.float32}
    assert_near(found, expected, 0.05 if dtype == torch.bfloat16 else 0.01)


def test_small_numbers_do_not_vanish_when_squared() -> None:
    """In float16 the square of 1e-4 is 0."""
    model, data = setting()
    model.half()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return 0.01 * CROSS_ENTROPY(output, target)

    small = [(x.half(), y) for x, y in data]
    found = solved(model, small, candidate("1", block=Gain(8)), loss_fn=loss_fn)
    model.float()
    expected = solved(model, data, candidate("1", block=Gain(8)), loss_fn=loss_fn)
    error = expected.sensitivities["1"].variance ** 0.5
    assert found.sensitivities["1"].variance ** 0.5 == pytest.approx(error, rel=0.05)


# --- nothing goes to the host in the loop -----------------------------------------------------

ASKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Asking(TorchDispatchMode):
    """Notes the operations that would make a GPU wait for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if func.overloadpacket.__name__ in ASKS:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


class Overseen:
    """Data that is watched from its first batch to its last."""

    def __init__(self, batches: list[Any], mode: Asking) -> None:
        self.batches = batches
        self.mode = mode

    def __iter__(self) -> Iterator[Any]:
        with self.mode:
            yield from self.batches


@pytest.mark.parametrize("width", [8, 600])  # (x, δ) wait for more, or are used at once
@pytest.mark.parametrize("norm", [cg.norms.Frobenius(), cg.norms.KroneckerFisher()], ids=label)
@pytest.mark.parametrize("progress", [False, True])
def test_the_loop_asks_for_no_numbers(width: int, norm: Any, progress: bool) -> None:
    model, data = feedforward(2, width, width, 3), classified(500, batch=160)
    candidates = [
        candidate("1", width),
        candidate("3", width),
        candidate("3", block=cg.blocks.ResidualMLP(width, 5, nn.Tanh()), name="residual"),
    ]
    if isinstance(norm, cg.norms.Frobenius):
        candidates.append(candidate("2", block=Gain(width)))  # it has no second moments
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    mode = Asking()
    problem.data = Overseen(data, mode)
    cg.solve(problem, norm=norm, progress=progress)
    assert mode.count > 100
    assert mode.asked == []


def test_the_witness_notices() -> None:
    with Asking() as mode:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert len(mode.asked) == 2


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Strict:
    """Data during which a GPU must not be made to wait."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from self.batches
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("moved", [False, True])
def test_multipliers_on_a_gpu_are_those_on_the_cpu(moved: bool) -> None:
    model, data = feedforward(2, 8, 8, 3), classified(100, batch=32)
    candidates = several_blocks()
    expected = solved(model, data, *candidates)
    model.cuda()
    there = [(x.cuda(), y.cuda()) for x, y in data] if moved else data
    with nothing_left_behind(model):
        found = solved(model, there, *candidates)
    assert found.multipliers["1"]["weight"].is_cuda
    assert_near(found, expected, 1e-9)
    assert found.decision.chosen == expected.decision.chosen


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("width", [8, 600])
def test_a_gpu_is_not_made_to_wait(width: int) -> None:
    model = feedforward(2, width, width, 3).cuda()
    data = [(x.cuda(), y.cuda()) for x, y in classified(500, batch=160)]
    candidates = [candidate("1", width), candidate("2", block=Gain(width))]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    problem.data = Strict(data)
    for _ in range(2):  # the first run sets up libraries
        cg.solve(problem, progress=False)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    model, data = setting()
    candidates = several_blocks()
    expected = solved(model, data, *candidates)
    model.cuda()
    with torch.autocast("cuda", dtype):
        found = solved(model, data, *candidates)
    assert dtypes_of(found) == {torch.float32}
    assert found.loss == pytest.approx(expected.loss, rel=0.1)
    for name, multiplier in expected.multipliers.items():
        for key, value in multiplier.items():
            error = found.multipliers[name][key].cpu() - value
            assert error.norm() <= 0.1 * value.norm()
