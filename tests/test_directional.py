"""One-sided slopes along a step, against one-sided differences."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    classified,
    feedforward,
    label,
    mean_loss,
    moved_loss,
    nothing_left_behind,
    refused,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP, TanhLU
from constrained_growth.directional import directional_derivative


def slopes(model: nn.Module, data: Any, one: cg.Candidate, step: Any) -> tuple[float, float, float]:
    """The slope along the step as found, by one-sided differences, and by autograd's λ."""
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    with nothing_left_behind(model):
        found = directional_derivative(problem, one.name, step)
    h = 1e-7
    at_pin = mean_loss(model, data).item()
    moved = moved_loss(model, data, one, {name: h * value for name, value in step.items()})
    multiplier = cg.solve(problem).multipliers[one.name]
    linear = -sum(float((multiplier[name] * value).sum()) for name, value in step.items())
    return found, (moved - at_pin) / h, linear


def random_step(block: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(block.get_parameter(n)) for n in block.pinned}  # type: ignore[union-attr]


@pytest.mark.parametrize("after", ["1", "3"])
def test_at_the_kinks_of_relu_identity_layers(after: str) -> None:
    model, data = feedforward(2, 8, 8, 3), classified(50, batch=20)
    one = cg.Candidate(after, IdentityLinear(8, nn.ReLU()))
    apart = []
    for _ in range(5):
        found, difference, linear = slopes(model, data, one, random_step(one.block))
        assert found == pytest.approx(difference, rel=1e-4, abs=1e-6)
        apart.append(abs(found - linear) / abs(found))
    assert max(apart) > 0.1  # autograd's value is not it


def test_both_sides_of_a_step() -> None:
    """Two slopes, s and −s, that do not add up to zero: there is a kink."""
    model, data = feedforward(2, 8, 3), classified(50)
    one = cg.Candidate("1", IdentityLinear(8, nn.ReLU()))
    step = random_step(one.block)
    back = {name: -value for name, value in step.items()}
    forth, difference, _ = slopes(model, data, one, step)
    return_, other, _ = slopes(model, data, one, back)
    assert (forth, return_) == (pytest.approx(difference, rel=1e-4), pytest.approx(other, rel=1e-4))
    assert abs(forth + return_) > 1e-3


@pytest.mark.parametrize(
    "block",
    [
        lambda: ResidualLinear(4, torch.tanh),
        lambda: ResidualMLP(4, 3, nn.ReLU()),
        lambda: ResidualMLP(4, 3, torch.tanh, "inner"),
        lambda: Gain(4),
    ],
    ids=["linear", "outer", "inner", "gain"],
)
def test_without_kinks_it_is_the_multiplier(block: Any) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(50, batch=20)
    one = cg.Candidate("1", block())
    found, difference, linear = slopes(model, data, one, random_step(one.block))
    assert found == pytest.approx(linear, rel=1e-12)
    assert found == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("kind", [nn.Hardtanh, lambda: nn.Hardtanh(-0.5, 2.0)], ids=label)
def test_kinks_anywhere(kind: Any) -> None:
    """Two kinks, both reached by many samples, and neither of them at zero only."""
    model, data = feedforward(2, 8, 3, activation=kind), classified(50)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(5)
    one = cg.Candidate("1", IdentityLinear(8, kind()))
    found, difference, linear = slopes(model, data, one, random_step(one.block))
    assert found == pytest.approx(difference, rel=1e-4)
    assert abs(found - linear) > 1e-3


def test_a_smooth_identity_layer() -> None:
    model, data = feedforward(2, 4, 3, activation=TanhLU), classified(50)
    one = cg.Candidate("1", IdentityLinear(4, TanhLU()))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    step = random_step(one.block)
    multiplier = cg.solve(problem).multipliers["1"]
    linear = -sum(float((multiplier[name] * value).sum()) for name, value in step.items())
    assert directional_derivative(problem, "1", step) == pytest.approx(linear, rel=1e-9)


def test_a_users_own_block_with_activation_modules_in_it() -> None:
    class Own(nn.Module):
        pinned = ("inner.0.weight",)

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
            nn.init.zeros_(self.inner[0].weight)  # type: ignore[arg-type]
            self.shift = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x.tanh()) @ self.shift + 0.1 * self.inner[0](x)

    model, data = feedforward(2, 4, 3), classified(50)
    one = cg.Candidate("0", Own())
    found, difference, linear = slopes(model, data, one, random_step(one.block))
    assert found == pytest.approx(difference, rel=1e-4)
    assert abs(found - linear) > 1e-3


def test_parts_of_a_step_and_steps_that_do_not_fit() -> None:
    model, data = feedforward(2, 4, 3), classified(50)
    one = cg.Candidate("1", IdentityLinear(4, nn.ReLU()))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    assert directional_derivative(problem, "1", {}) == 0.0
    bias = {"bias": torch.ones(4)}
    assert slopes(model, data, one, bias)[0] == pytest.approx(
        slopes(model, data, one, bias)[1], rel=1e-4
    )
    with refused(cg.CandidateError, "'5'", "('1',)"):
        directional_derivative(problem, "5", {})
    for bad in ({"bias": torch.ones(3)}, {"other": torch.ones(4)}):
        with (
            nothing_left_behind(model),
            refused(cg.CandidateError, next(iter(bad)), "of shapes"),
        ):
            directional_derivative(problem, "1", bad)


KINKS: dict[str, Any] = {
    "relu": torch.relu,
    "clamp": lambda y: y.clamp(min=0),
    "maximum": lambda y: torch.maximum(y, torch.zeros((), dtype=y.dtype)),
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "product": lambda y: y * (y > 0),
}


class Written(nn.Module):
    """The identity on what is not negative, with its kink written in `forward`."""

    pinned = ("weight",)

    def __init__(self, kink: Any) -> None:
        super().__init__()
        self.weight, self.kink = nn.Parameter(torch.eye(8)), kink

    def forward(self, x: Tensor) -> Tensor:
        return self.kink(nn.functional.linear(x, self.weight))


@pytest.mark.parametrize("kink", KINKS.values(), ids=KINKS)
def test_at_kinks_that_forward_computes(kink: Any) -> None:
    model, data = feedforward(2, 8, 3), classified(50, batch=20)
    one = cg.Candidate("1", Written(kink))
    apart = []
    for _ in range(3):
        found, difference, linear = slopes(model, data, one, random_step(one.block))
        assert found == pytest.approx(difference, rel=1e-4, abs=1e-6)
        apart.append(abs(found - linear) / abs(found))
    assert max(apart) > 0.05


def test_at_the_kink_of_a_copied_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.b(torch.tanh(self.a(x))))

    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Block(), Block(), nn.Linear(8, 3))
    data = classified(50, batch=20)
    proposed = cg.find_candidates(model, data[0][0])
    (one,) = [replace(c, wrapped=True) for c in proposed if c.after == "2"]
    found, difference, linear = slopes(model, data, one, random_step(one.block))
    assert found == pytest.approx(difference, rel=1e-4, abs=1e-6)
    assert abs(found - linear) > 0.01 * abs(found)


def test_a_written_kink_elsewhere_is_refused() -> None:
    model: Any = feedforward(2, 8, 3)
    model[1], data = nn.ReLU6(), classified(50)
    with torch.no_grad():
        model[0].weight.mul_(10)  # many units at 6
    one = cg.Candidate("1", Written(nn.functional.relu6))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    with refused(cg.CandidateError, "Written", "not at 0", "torch.nn"):
        directional_derivative(problem, "1", random_step(one.block))
    # as a module it is known
    known = cg.Candidate("1", IdentityLinear(8, nn.ReLU6()))
    found, difference, _ = slopes(model, data, known, random_step(known.block))
    assert found == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_models_in_half_precision() -> None:
    model, data = feedforward(2, 8, 3), classified(50)
    step = random_step(IdentityLinear(8, nn.ReLU()))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        one = cg.Candidate("1", IdentityLinear(8, nn.ReLU(), dtype=dtype))
        other = [(x.to(dtype), y) for x, y in data]
        problem = cg.GrowthProblem(copy.deepcopy(model).to(dtype), CROSS_ENTROPY, other, [one])
        found.append(directional_derivative(problem, "1", step))
    assert found[1] == pytest.approx(found[0], rel=0.1)
