"""The trust-region subproblem, and the rule that tries its steps."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    classified,
    feedforward,
    mean_loss,
    moved_loss,
    nothing_left_behind,
    refused,
    splice,
)
from scipy.optimize._trustregion_exact import IterativeSubproblem
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP
from constrained_growth.curvature import gauss_newton, hessian
from constrained_growth.rules import TrustRegion

# --- the subproblem -----------------------------------------------------------------------------


def symmetric(size: int, *, convex: bool) -> Tensor:
    matrix = torch.randn(size, size)
    return matrix @ matrix.mT / size + 0.01 * torch.eye(size) if convex else matrix + matrix.mT


class Shift(nn.Module):
    """x + v, pinned at v = 0."""

    pinned = ("v",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v


def problem_in(size: int, loss: Callable[[Tensor], Tensor]) -> cg.GrowthProblem:
    """A problem whose loss is this function of the pins."""
    model = nn.Sequential(nn.Linear(1, size))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    data = [(torch.zeros(1, 1), None)]
    candidate = cg.Candidate("0", Shift(size))
    return cg.GrowthProblem(model, lambda output, _: loss(output[0]), data, [candidate])


def quadratic(multiplier: Tensor, matrix: Tensor) -> cg.GrowthProblem:
    """L(v) = −⟨λ, v⟩ + ½⟨v, B v⟩, which a step of a trust region predicts to the digit."""
    return problem_in(len(multiplier), lambda v: v @ matrix @ v / 2 - multiplier @ v)


@dataclass
class Step:
    vector: Tensor
    predicted: float
    at_boundary: bool


def step_of(problem: cg.GrowthProblem, radius: float, **options: Any) -> Step:
    rule = TrustRegion(radius, max_radius=1e7, **options)
    decision = cg.solve(problem, rule=rule).decision
    (tried,) = decision.evidence["tries"]
    assert decision.evidence["rho"] == pytest.approx(1.0)
    return Step(decision.values["0"]["v"], tried["predicted"], tried["at_boundary"])


def dense(multiplier: Tensor, matrix: Tensor, radius: float) -> Step:
    """The step where products for all columns of B are allowed."""
    return step_of(quadratic(multiplier, matrix), radius, max_products=len(multiplier))


PADDING = 100
"""Zeros after λ, so that Lanczos' method is used, with as many products as it needs."""


def padded(multiplier: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    more = torch.zeros(PADDING)
    return torch.cat([multiplier, more]), torch.block_diag(matrix, torch.eye(PADDING))


def path(multiplier: Tensor, matrix: Tensor, radius: float) -> Step:
    """The step over λ, B λ, B² λ, …, until it has converged."""
    problem = quadratic(*padded(multiplier, matrix))
    step = step_of(problem, radius, max_products=PADDING, tolerance=1e-12)
    assert not bool(step.vector[len(multiplier) :].any())
    return replace(step, vector=step.vector[: len(multiplier)])


def decrease(multiplier: Tensor, matrix: Tensor, s: Tensor) -> float:
    return float(multiplier @ s - s @ matrix @ s / 2)


def best_by_scipy(multiplier: Tensor, matrix: Tensor, radius: float) -> Tensor:
    """What `scipy.optimize.minimize(method="trust-exact")` solves in each step, to the end."""
    subproblem = IterativeSubproblem(
        np.zeros(len(multiplier)),
        lambda s: 0.0,
        lambda s: -multiplier.numpy(),
        lambda s: matrix.numpy(),
        k_easy=1e-13,
        k_hard=1e-13,
    )
    return torch.tensor(subproblem.solve(radius)[0])


@pytest.mark.parametrize("convex", [True, False], ids=["convex", "indefinite"])
@pytest.mark.parametrize("radius", [0.01, 0.5, 3.0, 100.0])
def test_dense_steps_against_scipy(convex: bool, radius: float) -> None:
    for size in (1, 3, 8, 20):
        matrix, multiplier = symmetric(size, convex=convex), torch.randn(size)
        step = dense(multiplier, matrix, radius)
        expected = best_by_scipy(multiplier, matrix, radius)
        best = decrease(multiplier, matrix, expected)
        assert step.predicted == pytest.approx(best, rel=1e-2)  # where it stops short of Δ
        assert step.predicted >= best * (1 - 1e-12)
        assert float(step.vector.norm()) <= radius * (1 + 1e-12)


@pytest.mark.parametrize("radius", [0.1, 1.0, 30.0])
def test_convex_steps_against_cvxpy(radius: float) -> None:
    for size in (2, 6):
        matrix, multiplier = symmetric(size, convex=True), torch.randn(size)
        s = cp.Variable(size)
        model = multiplier.numpy() @ s - cp.quad_form(s, cp.psd_wrap(matrix.numpy())) / 2
        problem = cp.Problem(cp.Maximize(model), [cp.norm(s) <= radius])
        problem.solve(solver=cp.CLARABEL)
        best = float(problem.value)  # type: ignore[arg-type]
        step = dense(multiplier, matrix, radius)
        assert step.predicted == pytest.approx(best, rel=1e-6)
        torch.testing.assert_close(step.vector, torch.tensor(s.value), rtol=1e-3, atol=1e-4)
        other = path(multiplier, matrix, radius)
        torch.testing.assert_close(other.vector, step.vector, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [2, 5])
def test_optimality_conditions_of_dense_steps(size: int) -> None:
    """(B + μI)s = λ, B + μI ⪰ 0, μ(‖s‖ − Δ) = 0, which no worse step satisfies."""
    for radius in (1e-3, 1.0, 50.0):
        matrix, multiplier = symmetric(size, convex=False), torch.randn(size)
        step = dense(multiplier, matrix, radius)
        s = step.vector
        shift = float(s @ (multiplier - matrix @ s) / (s @ s))
        torch.testing.assert_close(matrix @ s + shift * s, multiplier, rtol=1e-7, atol=1e-7)
        assert float(torch.linalg.eigvalsh(matrix)[0]) + shift >= -1e-8
        assert step.at_boundary
        assert float(s.norm()) == pytest.approx(radius, rel=1e-10)


def test_hard_case_and_flat_models() -> None:
    """No slope along the direction that bends downwards most: it is followed all the same."""
    matrix, multiplier = torch.diag(torch.tensor([-2.0, 1.0])), torch.tensor([0.0, 3.0])
    step = dense(multiplier, matrix, 4.0)
    assert step.predicted == pytest.approx(3 * 1 - 1 / 2 + 2 * (16 - 1) / 2)
    assert float(step.vector[1]) == pytest.approx(1.0)
    flat = dense(torch.tensor([0.0, 3.0]), torch.diag(torch.tensor([0.0, 2.0])), 4.0)
    assert (flat.predicted, flat.at_boundary) == (pytest.approx(9 / 4), False)
    linear = dense(torch.tensor([3.0, 4.0]), torch.zeros(2, 2), 2.0)
    torch.testing.assert_close(linear.vector, torch.tensor([1.2, 1.6]))
    assert linear.predicted == pytest.approx(10.0)
    for max_products in (1, 2):
        rule = TrustRegion(max_products=max_products)
        decision = cg.solve(quadratic(torch.zeros(2), torch.eye(2)), rule=rule).decision
        assert (decision.chosen, decision.reason) == ((), "nothing to gain")
        assert decision.evidence["predictions"] == {"0": 0.0}
    down = cg.solve(quadratic(torch.zeros(4), -torch.eye(4)), rule=TrustRegion(max_products=2))
    assert down.decision.evidence["predicted"] == pytest.approx(0.5)  # without any slope


@pytest.mark.parametrize("convex", [True, False], ids=["convex", "indefinite"])
def test_a_smaller_radius_costs_no_further_products(convex: bool) -> None:
    """A loss that rejects long steps is tried at smaller and smaller radii."""
    matrix, multiplier = symmetric(12, convex=convex), torch.randn(12)
    more, bent = padded(multiplier, matrix)
    problem = problem_in(len(more), lambda v: 1e9 * v.square().sum() ** 2 - more @ v)
    products = 0

    def curvature(_: Any, s: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return bent @ s

    rule = TrustRegion(
        20.0,
        shrink=0.6,
        curvature=curvature,
        max_products=PADDING,
        tolerance=1e-12,
        max_tries=25,
    )
    tries = cg.solve(problem, rule=rule).decision.evidence["tries"]
    assert len(tries) > 15
    for tried in tries[::4]:
        step = path(multiplier, matrix, tried["radius"])
        assert tried["predicted"] == pytest.approx(step.predicted, rel=1e-10)
        assert tried["predicted"] == pytest.approx(
            decrease(multiplier, matrix, step.vector), rel=1e-9
        )
        assert tried["length"] == pytest.approx(float(step.vector.norm()), rel=1e-10)
        assert tried["at_boundary"] == (abs(tried["length"] - tried["radius"]) < 1e-9)
        best = dense(multiplier, matrix, tried["radius"]).predicted
        assert tried["predicted"] == pytest.approx(best, rel=1e-9)
    assert products <= 2 * len(multiplier)  # for all radii together
    gains = [tried["predicted"] for tried in tries]
    assert gains == sorted(gains, reverse=True)


def test_running_out_of_products() -> None:
    matrix, multiplier = symmetric(30, convex=True), torch.randn(30)
    products = 0

    def counted(_: Any, s: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ s

    options = {"curvature": counted, "max_products": 3, "tolerance": 1e-12}
    step = step_of(quadratic(multiplier, matrix), 1e6, **options)
    assert products == 3
    assert not step.at_boundary
    assert 0 < step.predicted < dense(multiplier, matrix, 1e6).predicted


# --- the rule -------------------------------------------------------------------------------------


def three(activation: Callable[[], nn.Module] = nn.Tanh) -> tuple[nn.Sequential, Any, list[Any]]:
    model, data = feedforward(2, 4, 4, 3, activation=activation), classified(40, batch=16)
    return (
        model,
        data,
        [
            cg.Candidate("1", ResidualMLP(4, 5, torch.tanh)),
            cg.Candidate("3", ResidualLinear(4, torch.tanh)),
            cg.Candidate("2", Gain(4)),
        ],
    )


def solved_by(rule: Any, model: nn.Module, data: Any, candidates: Any, loss: Any = CROSS_ENTROPY):
    return cg.solve(cg.GrowthProblem(model, loss, data, candidates), rule=rule)


@pytest.mark.parametrize("curvature", [hessian, gauss_newton])
@pytest.mark.parametrize("max_products", [3, 40], ids=["lanczos", "dense"])
def test_the_accepted_step_lowers_the_loss_by_what_the_evidence_says(
    curvature: Any, max_products: int
) -> None:
    model, data, candidates = three()
    rule = TrustRegion(curvature=curvature, max_products=max_products)
    with nothing_left_behind(model):
        solution = solved_by(rule, model, data, candidates)
    decision = solution.decision
    (name,) = decision.chosen
    one = next(c for c in candidates if c.name == name)
    before, after = (
        mean_loss(model, data).item(),
        moved_loss(model, data, one, decision.values[name]),
    )
    evidence = decision.evidence
    assert after < before
    assert evidence["actual"] == pytest.approx(before - after, rel=1e-9)
    assert evidence["rho"] == pytest.approx(evidence["actual"] / evidence["predicted"])
    assert evidence["rho"] >= rule.eta1
    assert evidence["predictions"][name] == max(evidence["predictions"].values())
    assert json.loads(json.dumps(evidence)) == evidence
    shapes = {k: v.shape for k, v in solution.multipliers[name].items()}
    assert {k: v.shape for k, v in decision.values[name].items()} == shapes


@pytest.mark.parametrize("kind", ["residual", "identity"])
def test_the_layer_is_inserted_at_the_accepted_step(kind: str) -> None:
    model, data, candidates = three(nn.ReLU if kind == "identity" else nn.Tanh)
    if kind == "identity":
        candidates = [cg.Candidate(site, IdentityLinear(4, nn.ReLU())) for site in ("1", "3")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    solution = solved_by(TrustRegion(), model, data, candidates)
    before = mean_loss(model, data).item()
    cg.insert(model, solution, optimizer=optimizer)
    fall = before - mean_loss(model, data).item()
    assert fall == pytest.approx(solution.decision.evidence["actual"], rel=1e-9)
    assert fall > 0


def test_predictions_against_dense_algebra() -> None:
    """The predicted decrease is ⟨λ, s⟩ − ½⟨s, B s⟩, from a network with the layer in it."""
    model, data, candidates = three()
    for one in candidates:
        rule = TrustRegion(radius=0.05, max_products=50)
        decision = solved_by(rule, model, data, [one]).decision
        grown = splice(model, one.after, one.block)
        pins = cg.blocks.pinned_parameters(one.block)
        counts = [pin.numel() for pin in pins.values()]

        def loss(v: Tensor, one=one, grown=grown, pins=pins, counts=counts) -> Tensor:
            values = {
                f"{one.after}.1.{name}": pin.detach() + part.view_as(pin)
                for (name, pin), part in zip(pins.items(), v.split(counts), strict=True)
            }
            return mean_loss(lambda x: functional_call(grown, values, (x,)), data)  # type: ignore[arg-type]

        zero = torch.zeros(sum(counts))
        slope: Any = functional.jacobian(loss, zero)
        bend: Any = functional.hessian(loss, zero)
        s = torch.cat([v.flatten() for v in decision.values[one.name].values()])
        expected = float(-slope @ s - s @ bend @ s / 2)
        assert decision.evidence["predicted"] == pytest.approx(expected, rel=1e-9)
        assert float(s.norm()) == pytest.approx(0.05)


def test_where_the_loss_is_quadratic_the_step_is_the_least_squares_fit() -> None:
    """Outer factor and a linear tail: ρ = 1, Δ grows while the fit lies outside of it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))
    x, y = torch.randn(50, 2), torch.randn(50, 3)
    one = cg.Candidate("1", ResidualMLP(3, 2, torch.tanh))
    rule = TrustRegion(radius=0.25, eta2=0.9, max_products=6)
    radii = []
    for _ in range(3):
        decision = solved_by(rule, model, [(x, y)], [one], nn.MSELoss()).decision
        radii.append(rule.current_radius)
        assert decision.evidence["rho"] == pytest.approx(1.0, abs=1e-9)
    assert radii == [0.5, 1.0, 2.0]
    rule = TrustRegion(radius=500.0, max_products=6)
    decision = solved_by(rule, model, [(x, y)], [one], nn.MSELoss()).decision
    assert rule.current_radius == 500.0
    with torch.no_grad():
        hidden = model[:2](x)
        features = torch.tanh(one.block.inner(hidden))  # type: ignore[operator]
        tail = model.get_parameter("2.weight")
        residual = y - hidden @ tail.mT
        # (W features) through the tail fits the residual; the tail is square, so undo it first
        fit = torch.linalg.lstsq(features, residual).solution @ torch.linalg.inv(tail).mT
    expected = fit.mT
    torch.testing.assert_close(decision.values["1"]["outer.weight"], expected)


def test_rejected_steps_shrink_the_radius_until_one_is_accepted() -> None:
    model, data, candidates = three()
    rule = TrustRegion(radius=300.0, eta1=0.6, max_products=30)
    decision = solved_by(rule, model, data, candidates).decision
    tries = decision.evidence["tries"]
    assert len(tries) > 1
    assert all(one["rho"] < 0.6 for one in tries[:-1])
    assert tries[-1]["rho"] >= 0.6
    for before, after in pairwise(tries):
        assert after["radius"] == pytest.approx(0.25 * min(before["radius"], before["length"]))
        assert after["length"] <= after["radius"] * (1 + 1e-12)
    assert rule.current_radius in (tries[-1]["radius"], 2 * tries[-1]["radius"])


def test_nothing_is_inserted_if_no_step_achieves_the_predicted_decrease() -> None:
    model, data, candidates = three()
    rule = TrustRegion(radius=300.0, eta1=0.99, eta2=1.0, max_tries=2)
    grown = copy.deepcopy(model)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1, momentum=0.9)
    with nothing_left_behind(grown):
        solution = solved_by(rule, grown, data, candidates)
        cg.insert(grown, solution, optimizer=optimizer)
    assert solution.decision.chosen == ()
    assert solution.decision.values == {}
    assert len(solution.decision.evidence["tries"]) == 2
    assert rule.current_radius < 300.0


def test_a_step_into_infinity_is_rejected() -> None:
    """The loss is the logarithm of what a far step makes negative."""

    class Scaled(nn.Module):
        pinned = ("scale",)

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.scale)

    model = nn.Sequential(nn.Linear(2, 2), nn.Softplus(), nn.Identity())
    data = [(torch.randn(30, 2) + 3, None)]

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.mean() + (1 + output).log().mean()

    rule = TrustRegion(radius=50.0)
    decision = solved_by(rule, model, data, [cg.Candidate("1", Scaled())], loss).decision
    first = decision.evidence["tries"][0]
    assert (first["actual"], first["rho"]) == (None, None)
    assert decision.chosen == ("1",)
    assert json.loads(json.dumps(decision.evidence)) == decision.evidence


def test_at_a_kink_the_trial_decides() -> None:
    """ReLU identity layers: autograd's slope is not the one-sided one, but the trial is exact."""
    model, data = feedforward(2, 4, 4, 3), classified(40, batch=16)
    candidates = [cg.Candidate(site, IdentityLinear(4, nn.ReLU())) for site in ("1", "3")]
    decision = solved_by(TrustRegion(), model, data, candidates).decision
    (name,) = decision.chosen
    one = next(c for c in candidates if c.name == name)
    fall = mean_loss(model, data).item() - moved_loss(model, data, one, decision.values[name])
    assert decision.evidence["actual"] == pytest.approx(fall, rel=1e-9)
    assert fall > 0


def test_nothing_to_gain() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    nn.init.constant_(model.get_parameter("0.bias"), -100.0)
    rule = TrustRegion()
    decision = solved_by(rule, model, data, [candidate()]).decision
    assert (decision.chosen, decision.reason) == ((), "nothing to gain")
    assert rule.current_radius == 1.0


def test_state_survives_a_checkpoint() -> None:
    model, data, candidates = three()
    rule = TrustRegion(radius=0.01, max_products=3)
    solved_by(rule, model, data, candidates)
    assert rule.current_radius == 0.02
    other = TrustRegion(max_products=3)
    other.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert other.current_radius == rule.current_radius
    one, two = (solved_by(r, model, data, candidates).decision for r in (rule, other))
    assert one == two
    assert one.evidence == two.evidence
    for bad in ({}, {"radius": -1.0}, {"radius": "x"}, None):
        with refused(cg.RuleError, "TrustRegion"):
            other.load_state_dict(bad)  # type: ignore[arg-type]


def test_passes_are_counted() -> None:
    """One candidate of 4 parameters: 4 products, the loss at the pin and at the step."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20)
    gain = cg.Candidate("1", Gain(4))
    decision = solved_by(TrustRegion(radius=1e-3), model, data, [gain]).decision
    assert len(decision.evidence["tries"]) == 1
    assert decision.evidence["passes"] == pytest.approx(5 * 1.5 + 2 / 3)


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0.0},
        {"radius": -1.0},
        {"radius": float("nan")},
        {"eta1": -0.1},
        {"eta1": 1.5},
        {"eta2": 2.0},
        {"eta2": 0.01},
        {"shrink": 1.5},
        {"grow": 0.5},
        {"max_tries": 0},
        {"max_products": 1.5},
        {"curvature": "hessian"},
    ],
)
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    with refused(cg.RuleError, f"{next(iter(options))}="):
        TrustRegion(**options)
