"""λ against the gradient of a model in which the block really stands, and against differences."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    autograd_multipliers,
    candidate,
    classified,
    feedforward,
    label,
    mean_loss,
    moved_loss,
    solved,
    splice,
    spliced_block,
    squared_norm,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP, TanhLU

BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda n: IdentityLinear(n, nn.ReLU()),
    "one weight": lambda n: ResidualLinear(n, torch.tanh),
    "outer": lambda n: ResidualMLP(n, n + 1, nn.GELU()),
    "outer, 0.8": lambda n: ResidualMLP(n, n, nn.ReLU(), inner_init=0.8),
    "inner": lambda n: ResidualMLP(n, 2, torch.tanh, "inner"),
    "a user's own": Gain,
}
CLOSED = [kind for kind in BLOCKS if kind != "a user's own"]


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over all but the last dimension, a mean over samples and positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class Net(nn.Module):
    """Linear and ReLU several times, scaled by a second input if there is one, then Linear."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = feedforward(*widths)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.layers[-1](self.layers[:-1](x) * scale)


# --- any network, any candidates ----------------------------------------------------------------


@dataclass
class Instance:
    model: nn.Module
    data: list[Any]
    candidates: list[cg.Candidate]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    hidden = draw(st.lists(st.sampled_from([4, 1, 3]), min_size=1, max_size=4))
    width = draw(st.integers(1, 3))
    model = Net([width, *hidden, 3])
    if draw(st.booleans()):
        model.requires_grad_(False)
    positions = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    form = draw(st.sampled_from([lambda x, s: x, lambda x, s: (x, s), _as_dict]))
    data = []
    for size in draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)):
        x = torch.randn(size, *positions, width)
        target = torch.randint(3, (size, *positions))
        data.append((form(x, torch.rand(size, *positions, 1)), target))
    candidates = []
    for index, width in enumerate(hidden):
        for kind in draw(st.lists(st.sampled_from(list(BLOCKS)), max_size=3, unique=True)):
            site = 2 * index + draw(st.integers(0, 1)) if kind != "identity" else 2 * index + 1
            candidates.append(
                cg.Candidate(f"layers.{site}", BLOCKS[kind](width), name=f"{kind} after {site}")
            )
    candidates = candidates or [cg.Candidate("layers.1", Gain(hidden[0]))]
    return Instance(model, data, draw(st.permutations(candidates)))


def _as_dict(x: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"scale": scale, "x": x}


@settings(max_examples=80)
@given(instances())
def test_multipliers_are_the_gradient_of_the_model_with_the_block_in_it(case: Instance) -> None:
    solution = solved(case.model, case.data, *case.candidates, loss_fn=token_loss)
    assert solution.loss == pytest.approx(mean_loss(case.model, case.data, token_loss).item())
    assert list(solution.multipliers) == [c.name for c in case.candidates]
    for one in case.candidates:
        expected = autograd_multipliers(case.model, case.data, one, token_loss)
        assert_multipliers(solution, one.name, expected)
        size = math.sqrt(squared_norm(expected.values()))
        assert solution.sensitivities[one.name].value == pytest.approx(size, abs=1e-9)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_large_batch_is_worked_off_as_it_comes(kind: str) -> None:
    """More than fits into the room that is always there."""
    model, data = feedforward(2, 4, 4, 3), classified(30_000, batch=17_000)
    candidates = [cg.Candidate(site, BLOCKS[kind](4)) for site in ("1", "3")]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_blocks_that_differ_only_in_their_activation_are_told_apart() -> None:
    """At sites of one shape, where blocks of one kind are worked off together."""
    model, data = feedforward(2, 4, 4, 4, 3), classified(20, batch=8)
    kinds = [
        nn.PReLU(init=0.1),
        nn.PReLU(init=0.7),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.7),
        nn.GELU(),
    ]
    kinds += [nn.GELU("tanh"), lambda x: x.sin(), lambda x: x.cos(), TanhLU(0.01), TanhLU(0.7)]
    candidates = [
        cg.Candidate(site, ResidualMLP(4, 4, activation), name=f"{index} after {site}")
        for index, activation in enumerate(kinds)
        for site in ("1", "3", "5")
    ]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_ragged_batches_give_what_one_batch_gives() -> None:
    model, (batch,) = feedforward(2, 5, 4, 3), classified(50)
    ragged = list(
        zip(batch[0].split([16, 16, 16, 2]), batch[1].split([16, 16, 16, 2]), strict=True)
    )
    candidates = [candidate("1", 5), candidate("3", 4, block=Gain(4))]
    whole, parts = (solved(model, data, *candidates) for data in ([batch], ragged))
    for name in ("1", "3"):
        assert_multipliers(parts, name, whole.multipliers[name], atol=1e-15)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    assert parts.stationarity == pytest.approx(whole.stationarity, rel=1e-13)
    assert (parts.num_samples, parts.num_batches) == (50, 4)


def test_unequal_lengths_and_short_batches_may_mix() -> None:
    """Sequences of another length in every batch; λ is a mean over samples, not positions."""
    model = Net([2, 3, 3])
    data = [
        (torch.randn(n, t, 2), torch.randint(3, (n, t)))
        for n, t in [(4, 3), (4, 5), (2, 5), (4, 3)]
    ]
    candidates = [cg.Candidate("layers.1", make(3), name=kind) for kind, make in BLOCKS.items()]
    solution = solved(model, data, *candidates, loss_fn=token_loss)
    for one in candidates:
        expected = autograd_multipliers(model, data, one, token_loss)
        assert_multipliers(solution, one.name, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_served_within_their_rounding(dtype: torch.dtype) -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    exact = solved(model, data, candidate())
    low = [(x.to(dtype), y) for x, y in data]
    found = solved(model.to(dtype), low, candidate())
    assert found.multipliers["1"]["weight"].dtype in (torch.float32, dtype)
    error = found.multipliers["1"]["weight"].double() - exact.multipliers["1"]["weight"]
    assert error.norm() <= 20 * torch.finfo(dtype).eps * exact.multipliers["1"]["weight"].norm()


# --- finite differences -------------------------------------------------------------------------


def direction_like(multiplier: Any) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in multiplier.items()}


def inner(one: Any, other: Any) -> float:
    return sum((one[name] * other[name]).sum().item() for name in one)


def times(factor: float, step: Any) -> dict[str, Tensor]:
    return {name: factor * value for name, value in step.items()}


SMOOTH = ["one weight", "outer", "inner", "a user's own"]


@pytest.mark.parametrize("kind", SMOOTH)
def test_multipliers_are_two_sided_differences_where_blocks_are_smooth(kind: str) -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20, batch=8)
    one = cg.Candidate("1", BLOCKS[kind](4))
    multiplier = solved(model, data, one).multipliers["1"]
    step, h = direction_like(multiplier), 1e-5
    up, down = (moved_loss(model, data, one, times(sign * h, step)) for sign in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(-inner(multiplier, step), abs=1e-8)


@pytest.mark.parametrize("kind", SMOOTH)
def test_shadow_price_predicts_the_loss_to_first_order(kind: str) -> None:
    """Halving the step leaves a quarter of the error."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20, batch=8)
    one = cg.Candidate("1", BLOCKS[kind](4))
    solution = solved(model, data, one)
    multiplier = solution.multipliers["1"]
    step = direction_like(multiplier)

    def error(size: float) -> float:
        predicted = solution.loss - size * inner(multiplier, step)
        return moved_loss(model, data, one, times(size, step)) - predicted

    assert error(5e-4) / error(1e-3) == pytest.approx(0.25, abs=0.01)


def test_step_along_the_multiplier_lowers_the_loss() -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20)
    one = cg.Candidate("1", BLOCKS["one weight"](4))
    solution = solved(model, data, one)
    gain = solution.loss - moved_loss(model, data, one, times(1e-4, solution.multipliers["1"]))
    assert gain == pytest.approx(1e-4 * solution.sensitivities["1"].value ** 2, rel=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU(), TanhLU()], ids=label)
def test_identity_layer_agrees_with_one_sided_differences(activation: nn.Module) -> None:
    """Along steps that wake no inactive unit: x ≥ 0, so these are the non-positive ones."""
    model = feedforward(2, 6, 3, activation=lambda: activation)
    data = classified(30)
    one = cg.Candidate("1", IdentityLinear(6, activation))
    multiplier = solved(model, data, one).multipliers["1"]
    step = {name: -value.abs() for name, value in direction_like(multiplier).items()}
    h = 1e-7
    rise = moved_loss(model, data, one, times(h, step)) - moved_loss(model, data, one, {})
    assert rise / h == pytest.approx(-inner(multiplier, step), abs=1e-6)


def test_units_that_a_step_wakes_count_for_nothing() -> None:
    """Autograd's ReLU′(0) = 0: the one-sided derivative has a term more, here in closed form."""
    model, ((x, y),) = feedforward(2, 6, 3), classified(30)
    data, one = [(x, y)], candidate(width=6)
    multiplier = solved(model, data, one).multipliers["1"]
    step = direction_like(multiplier)
    z = model[:2](x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(CROSS_ENTROPY(model[2:](z), y), z)
    waking = (z @ step["weight"].T + step["bias"]).clamp(min=0) * (z == 0)
    woken = (delta * waking).sum().item()
    h = 1e-7
    rise = moved_loss(model, data, one, times(h, step)) - moved_loss(model, data, one, {})
    assert rise / h == pytest.approx(-inner(multiplier, step) + woken, abs=1e-6)
    assert abs(woken) > 1e-3


def test_residual_relu_after_relu_is_redundant_with_the_next_layer() -> None:
    """With W₁ = cI its λ is c W_nextᵀ ∂L/∂W_next, up to the sign."""
    model, data = feedforward(2, 4, 3), classified(30)
    one = cg.Candidate("1", BLOCKS["outer, 0.8"](4))
    found = solved(model, data, one).multipliers["1"]["outer.weight"]
    weight = model.get_parameter("2.weight")
    (gradient,) = torch.autograd.grad(mean_loss(model, data), weight)
    torch.testing.assert_close(found, -0.8 * weight.detach().T @ gradient, rtol=0, atol=1e-14)


# --- standard errors ------------------------------------------------------------------------------


def spread(multiplier_of: Callable[[Any], Any], units: list[Any], weights: list[int]) -> float:
    """√tr Cov of the weighted mean of the multipliers of some units, by brute force."""
    flat = torch.stack([torch.cat([v.flatten() for v in multiplier_of(u).values()]) for u in units])
    weight = torch.tensor(weights, dtype=flat.dtype)
    mean = (weight[:, None] * flat).sum(0) / weight.sum()
    total = (weight * (flat - mean).square().sum(1)).sum()
    return math.sqrt(total / ((len(units) - 1) * weight.sum()))


@pytest.mark.parametrize("positions", [(), (3,), (9,), (2, 3)], ids=label)
@pytest.mark.parametrize("kind", CLOSED)
def test_standard_error_is_that_of_the_samples(kind: str, positions: tuple[int, ...]) -> None:
    model = Net([2, 4, 3])
    x, y = torch.randn(11, *positions, 2), torch.randint(3, (11, *positions))
    one = cg.Candidate("layers.1", BLOCKS[kind](4), name="c")
    data = list(zip(x.split(4), y.split(4), strict=True))
    found = solved(model, data, one, loss_fn=token_loss).sensitivities["c"].variance ** 0.5
    samples = list(zip(x.split(1), y.split(1), strict=True))

    def multiplier_of(sample: Any) -> dict[str, Tensor]:
        return autograd_multipliers(model, [sample], one, token_loss)

    assert found == pytest.approx(spread(multiplier_of, samples, [1] * 11), rel=1e-9)


def test_standard_error_of_a_users_block_is_that_of_the_batches() -> None:
    model, data = feedforward(2, 4, 3), classified(27, batch=8)
    one = cg.Candidate("1", Gain(4))
    expected = spread(lambda b: autograd_multipliers(model, [b], one), data, [8, 8, 8, 3])
    assert solved(model, data, one).sensitivities["1"].variance ** 0.5 == pytest.approx(expected)


def test_standard_error_of_a_users_block_on_one_batch_is_unknown() -> None:
    model = feedforward(2, 4, 3)
    sensitivity = solved(model, classified(20), cg.Candidate("1", Gain(4))).sensitivities["1"]
    assert math.isnan(sensitivity.variance)
    single = solved(model, classified(1), candidate()).sensitivities["1"]
    assert math.isnan(single.variance)


def test_standard_error_shrinks_like_a_mean() -> None:
    """The same samples k times over: λ stays, tr Cov falls by (N − 1)/(kN − 1)."""
    model, ((x, y),) = feedforward(2, 4, 3), classified(20)
    once = solved(model, [(x, y)], candidate()).sensitivities["1"]
    often = solved(model, [(x, y)] * 5, candidate()).sensitivities["1"]
    assert often.value == pytest.approx(once.value, rel=1e-13)
    assert often.variance**0.5 / once.variance**0.5 == pytest.approx(math.sqrt(19 / 99), rel=1e-9)


# --- awkward models -------------------------------------------------------------------------------


def overwriting() -> dict[str, nn.Module]:
    """Models that change the tensor at a site in place afterwards."""

    class AddsInPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x *= 2
            x += 1
            return self.last(x.tanh())

    return {
        "ReLU": nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        "ELU": nn.Sequential(nn.Linear(2, 4), nn.ELU(inplace=True), nn.Linear(4, 3)),
        "through a view": nn.Sequential(
            nn.Linear(2, 4), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3)
        ),
        "arithmetic": AddsInPlace(),
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", overwriting())
def test_sites_that_are_overwritten_later_keep_their_value(name: str, frozen: bool) -> None:
    model, data = overwriting()[name], classified(30, batch=12)
    model.requires_grad_(not frozen)
    site = next(name for name, _ in model.named_children())
    candidates = [
        cg.Candidate(site, BLOCKS[kind](4), name=kind) for kind in BLOCKS if kind != "identity"
    ]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_sites_before_and_after_an_activation_in_place() -> None:
    model, data = overwriting()["ReLU"], classified(30, batch=12)
    candidates = [cg.Candidate("0", BLOCKS["outer"](4)), candidate("1")]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


@pytest.mark.parametrize("alias", [nn.Identity, nn.Flatten, lambda: nn.Unflatten(1, (2, 2))])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_sites_that_share_one_memory(alias: Callable[[], nn.Module], frozen: bool) -> None:
    """One of them returns its input, or a view of it, which is overwritten afterwards."""
    model = nn.Sequential(
        nn.Linear(2, 4), alias(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3)
    ).requires_grad_(not frozen)
    data = classified(30, batch=12)
    width = model[:2](data[0][0]).shape[-1]
    candidates = [candidate("0", block=BLOCKS["outer"](4)), candidate("1", block=Gain(width))]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_side_branches_count_too() -> None:
    """A site from which two paths lead to the loss, and one path around it."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.site = nn.Linear(2, 4), nn.Tanh()
            self.left, self.right, self.around = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            z = self.site(h)
            return self.left(z) * self.right(z).sigmoid() + self.around(h)

    model, data = Branched(), classified(20, batch=7)
    candidates = [cg.Candidate(s, BLOCKS["outer"](4)) for s in ("first", "site")]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_parallel_branches_none_of_which_passes_the_other() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = feedforward(2, 4, 3), feedforward(2, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    model, data = Parallel(), classified(20, batch=7)
    candidates = [candidate("left.1"), candidate("right.1"), candidate("left.0", block=Gain(4))]
    solution = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one))


def test_a_model_that_returns_its_own_loss() -> None:
    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = feedforward(2, 4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, plain = OwnLoss(), classified(20, batch=8)
    data = [({"x": x, "labels": y}, y) for x, y in plain]
    solution = solved(
        model, data, candidate("net.1"), loss_fn=lambda output, target: output["loss"]
    )
    assert_multipliers(solution, "net.1", autograd_multipliers(model.net, plain, candidate()))


def test_blocks_of_the_model_proposed_by_looking_at_it() -> None:
    """Proposed blocks take their activation from the model; both are called at the same time."""
    model = feedforward(2, 4, 4, 3, activation=nn.Tanh)
    data = classified(20, batch=8)
    candidates = cg.find_candidates(model, data[0][0])
    assert [c.after for c in candidates] == ["1", "3"]
    solution = solved(model, data, *candidates)
    for one in candidates:
        double = cg.Candidate(one.after, one.block.double())
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, double))


def test_moved_model_is_measured_where_it_is_now() -> None:
    """A problem may be solved again and again while the model trains."""
    model, data = feedforward(2, 4, 3), classified(20)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    first = cg.solve(problem)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.5)
    second = cg.solve(problem)
    assert_multipliers(second, "1", autograd_multipliers(model, data, candidate()))
    assert not torch.equal(first.multipliers["1"]["weight"], second.multipliers["1"]["weight"])


def test_train_mode_of_batch_norm_is_that_of_the_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    data = classified(30, batch=10)
    with torch.no_grad():
        for x, _ in classified(50, batch=10):
            model(x)
    for mode in (True, False):
        solution = solved(model.train(mode), data, candidate("2"))
        assert_multipliers(solution, "2", autograd_multipliers(model, data, candidate("2")))


def test_splice_really_inserts() -> None:
    """The yardstick itself: a block moved off its pins changes the loss."""
    model, data = feedforward(2, 4, 3), classified(20)
    grown = splice(model, "1", candidate().block)
    assert mean_loss(grown, data).item() == mean_loss(model, data).item()
    with torch.no_grad():
        spliced_block(grown, "1").get_parameter("weight").mul_(0.5)
    assert mean_loss(grown, data).item() != mean_loss(model, data).item()


class Masked(nn.Module):
    """Its second layer sees some of the samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.r1, self.r2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        some = self.r2(self.b(self.r1(self.a(x))[mask]))
        return self.h(some.new_zeros(len(x), 4).masked_scatter(mask[:, None], some))


@pytest.mark.parametrize("missing", [3, 4])
def test_sites_of_one_kind_of_which_one_holds_fewer_samples(missing: int) -> None:
    model, x, y = Masked(), torch.randn(8, 4), torch.randint(3, (8,))
    full = torch.ones(8, dtype=torch.bool)
    some = full.clone()
    some[:missing] = False
    data = [((x, full), y), ((x, some), y), ((x, some), y), ((x, full), y)]
    candidates = [cg.Candidate(a, cg.blocks.IdentityLinear(4, nn.ReLU())) for a in ("r1", "r2")]
    together = cg.solve(cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates))
    for one in candidates:
        expected = autograd_multipliers(model, data, one)
        assert_multipliers(together, one.name, expected)


def test_the_variance_under_autocast_is_that_without() -> None:
    class Off(nn.Module):
        """A model that autocast does not touch."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.net(x)

    x, y = 1 + 0.01 * torch.randn(40, 4), torch.zeros(40, 1)
    model, data = Off().float(), [(x[:20].float(), y[:20]), (x[20:].float(), y[20:])]
    one = cg.Candidate("net.1", cg.blocks.ResidualMLP(16, 4, torch.tanh), name="one")
    problem = cg.GrowthProblem(model, lambda out, _: 3 * (out - 5).mean(), data, [one])
    expected = cg.solve(problem).sensitivities["one"].variance ** 0.5
    with torch.autocast("cpu", torch.bfloat16):
        found = cg.solve(problem).sensitivities["one"].variance ** 0.5
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > 0
