"""An insertion preserves the function, and that is checked."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP


def judged(before: Any, after: Any, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """The verdict on a model that gives `before` at first, and `after` once it has grown."""

    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.answers = nn.Linear(2, 2, dtype=dtype), False

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            if not self.answers:
                return y
            return after if hasattr(self.layer, "inserted") else before

    model, data = Says(), [(torch.zeros(1, 2, dtype=dtype), None)]
    one = cg.Candidate("layer", Gain(2))
    solution = solved(model, data, one, rule=choose("layer"), loss_fn=lambda y, _: y.sum())
    model.answers = True
    return dict(cg.insert(model, solution).difference)


# --- what counts as having moved --------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    rest: Any = None


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (None, y),
    "dict": lambda y: {"a": 3, "b": [y]},
    "dataclass": lambda y: Output(torch.zeros(2), (y,)),
    "beside a layer's own": lambda y: {"logits": y, "hidden": (y,) * int(y.sum().item() > 0)},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_difference_of_an_entry(wrap: str, dtype: torch.dtype) -> None:
    """Allowed are 1000 ε of the largest entry, at most 1/16 of it."""
    y = torch.tensor([1.0, -8.0, 2.0], dtype=dtype)
    allowed = 8.0 * min(1e3 * torch.finfo(dtype).eps, 1 / 16)
    for factor, fine in ((0.0, True), (0.4, True), (4.0, False)):
        moved = y.clone()
        moved[2] += factor * allowed
        if fine:
            found = judged(WRAPS[wrap](y), WRAPS[wrap](moved), dtype)
            expected = float((moved - y).abs().max())
            assert found == {"train": expected, "eval": expected}
        else:
            with refused(cg.BlockError, "moves by", "train mode"):
                judged(WRAPS[wrap](y), WRAPS[wrap](moved), dtype)


def test_infinities_and_nan_that_stay_are_no_difference() -> None:
    y = torch.tensor([1.0, -math.inf, math.inf, math.nan])
    assert judged(y, y.clone()) == {"train": 0.0, "eval": 0.0}
    for index in range(4):
        for value in (math.inf, math.nan, 5.0, -math.inf):
            moved = y.clone()
            moved[index] = value
            if not torch.equal(moved.nan_to_num(77.0), y.nan_to_num(77.0)):
                with refused(cg.BlockError, "moves by"):
                    judged(y, moved)


def test_other_shapes_are_an_infinite_difference() -> None:
    with refused(cg.BlockError, "moves by inf"):
        judged(torch.zeros(3), torch.zeros(4))


def test_a_loss_near_zero_is_judged_on_the_scale_of_one() -> None:
    tiny = torch.tensor(1e-18)
    assert judged(tiny, tiny + 1e-15)["train"] == pytest.approx(1e-15)
    with refused(cg.BlockError, "moves by"):
        judged(torch.full((2,), 1e-18), torch.full((2,), 1e-15))


def test_outputs_without_tensors_are_left_out() -> None:
    assert judged("text", "another") == {}
    assert judged(torch.tensor([1, 2]), torch.tensor([3, 4])) == {}


# --- what the record says ---------------------------------------------------------------------


def test_difference_is_that_of_the_outputs_in_both_modes() -> None:
    """Of ELU with a shift, which is the identity but for rounding."""
    model, data = feedforward(2, 4, 3, activation=nn.ELU), classified(30)
    x = data[0][0]
    before = model(x)
    record = cg.insert(
        model, solved(model, data, candidate(block=IdentityLinear(4, nn.ELU(), shift=1.0)))
    )
    expected = (model(x) - before).abs().max().item()
    assert 0 < expected < 1e-14
    assert record.difference == {"train": expected, "eval": expected}
    assert cg.GrowthRecord.from_json(record.to_json()) == record


def stochastic() -> nn.Module:
    layers = [nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)]
    return nn.Sequential(*layers, nn.Dropout(0.3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("site", ["0", "1", "2", "3"])
def test_models_that_draw_and_count(training: bool, site: str) -> None:
    model, data = stochastic().train(training), classified(30)
    solution = solved(model, data, cg.Candidate(site, ResidualMLP(4, 3, nn.GELU())))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state, kept = torch.get_rng_state(), copy.deepcopy(model)
    record = cg.insert(model, solution)
    assert record.difference == {"train": 0.0, "eval": 0.0}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())
    for buffer, old in zip(model.buffers(), buffers.values(), strict=True):
        assert torch.equal(buffer, old)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = kept(data[0][0])
        torch.manual_seed(1)
        assert torch.equal(model(data[0][0]), expected)


class Noisy(ResidualLinear):
    """Draws random numbers, which the layers after it would have got."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training) * 0 + x)


def test_random_numbers_that_a_layer_draws_do_not_count() -> None:
    model, data = stochastic(), classified(30)
    record = cg.insert(model, solved(model, data, cg.Candidate("2", Noisy(4, torch.tanh))))
    assert record.difference == {"train": 0.0, "eval": 0.0}


class ExactInTraining(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.training else 1.5)


def test_a_block_that_is_exact_in_one_mode_is_judged_in_the_models_own() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    solution = solved(model, data, cg.Candidate("1", ExactInTraining(4)))
    x = data[0][0]
    other = copy.deepcopy(model).eval()
    with nothing_left_behind(other), refused(cg.BlockError, "eval mode", "moves by"):
        cg.insert(other, solution)
    before = model(x)
    record = cg.insert(model, solution)
    assert record.difference["train"] == 0.0
    expected = (model.eval()(x) - before).abs().max().item()
    assert record.difference["eval"] == pytest.approx(expected, rel=1e-12)
    assert expected > 0.01


def test_a_mode_in_which_the_model_cannot_run_is_left_out() -> None:
    """BatchNorm cannot train on one sample."""
    model, data = stochastic().eval(), classified(1)
    solution = solved(model, data, cg.Candidate("2", ResidualLinear(4, torch.tanh)))
    assert cg.insert(model, solution).difference == {"eval": 0.0}


def test_other_data_and_none() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    solution = solved(model, data, candidate())
    assert solution.example is data[0][0]
    shifted = copy.deepcopy(solution.candidates["1"].block)
    with torch.no_grad():
        shifted.get_parameter("bias").fill_(-0.1)  # moves what lies between 0 and 0.1
    planned = replace(solution.candidates["1"], block=shifted)
    broken = replace(solution, candidates={"1": planned})
    with nothing_left_behind(model), refused(cg.BlockError, "moves by"):
        cg.insert(model, broken)
    zero = copy.deepcopy(model)
    with torch.no_grad():
        zero.get_parameter("0.weight").zero_()
        zero.get_parameter("0.bias").fill_(-1.0)
    assert cg.insert(zero, broken, data=classified(3)).difference == {"train": 0.0, "eval": 0.0}
    assert cg.insert(model, broken, data=()).difference == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [(3, "not iterable"), ([3], "batch 0"), ([(torch.zeros(2, 5), None)], "data=[(input")],
)
def test_data_that_cannot_be_used(data: Any, words: str) -> None:
    model = feedforward(2, 4, 3)
    solution = solved(model, classified(9), candidate())
    with nothing_left_behind(model), refused(cg.DataError, words):
        cg.insert(model, solution, data=data)


# --- where it is called ---------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_all_the_same(context: Any) -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    solution = solved(model, data, candidate(block=Gain(4)))
    with context():
        record = cg.insert(model, solution)
    assert record.difference == {"train": 0.0, "eval": 0.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    assert bool(model.get_parameter("1.inserted.gain").any())


def test_under_autocast_nothing_is_left_in_its_cache() -> None:
    model, data = feedforward(2, 4, 3).float(), classified(30)
    data = [(x.float(), y) for x, y in data]
    solution = solved(model, data, cg.Candidate("1", ResidualMLP(4, 3, nn.GELU())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = cg.insert(model, solution)
        CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    assert record.difference == {"train": 0.0, "eval": 0.0}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_monitor_s_solution_is_checked_too() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    with cg.monitor(problem) as watch:
        CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    record = cg.insert(model, watch.solution())
    assert set(record.difference) == {"train", "eval"}


class Potential(nn.Module):
    """Energy and force, its negative gradient, taken in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = feedforward(3, 8, 1, activation=nn.SiLU)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        position = position.detach().requires_grad_()
        energy = self.net(position).sum(1)
        (slope,) = torch.autograd.grad(energy.sum(), position, create_graph=True)
        return energy, -slope


def test_a_model_that_differentiates_in_its_forward_pass() -> None:
    model, x, y = Potential(), torch.randn(12, 3), torch.randn(12)

    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output[0], target)

    one = cg.Candidate("net.1", ResidualMLP(8, 5, torch.tanh))
    solution = solved(model, [(x, y)], one, rule=choose("net.1"), loss_fn=loss_fn)
    before = model(x)
    with torch.no_grad():
        assert cg.insert(model, solution).difference == {"train": 0.0, "eval": 0.0}
    after = model(x)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    loss_fn(after, y).backward()
    gradient = model.get_parameter("net.1.inserted.outer.weight").grad
    assert gradient is not None
    assert bool(gradient.any())
    (found,) = solution.multipliers["net.1"].values()
    torch.testing.assert_close(found, -gradient)


def test_notes_for_the_loss_are_as_they_were() -> None:
    """What forward passes note in a list, a loss reads and clears: nobody else leaves notes."""
    notes: list[Tensor] = []

    class Gate(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            share = super().forward(input).softmax(-1)
            notes.append(share.mean(0).square().sum())
            return 3 * share

    def loss(output: Tensor, target: Tensor) -> Tensor:
        extra = sum(notes)
        notes.clear()
        return nn.functional.cross_entropy(output, target) + extra

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Gate(6, 6), nn.Linear(6, 3))
    model[1].register_forward_hook(
        lambda module, args, output: notes.append(output.square().mean())
    )
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    before = loss(model(x), y)
    kept = [torch.zeros(())]
    notes += kept
    candidates = cg.find_candidates(model, x)
    assert notes == kept
    notes.clear()
    solution = cg.solve(cg.GrowthProblem(model, loss, [(x, y)], candidates), choose("1"))
    assert notes == []
    record = cg.insert(model, solution)
    assert notes == []
    after = loss(model(x), y)
    torch.testing.assert_close(after, before)
    found = dict(record.new_parameters(model))
    for name, value in solution.multipliers["1"].items():
        (pin,) = (p for key, p in found.items() if key.endswith(f".{name}"))
        torch.testing.assert_close(-torch.autograd.grad(loss(model(x), y), pin)[0], value)
