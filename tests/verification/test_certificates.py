"""What the checks by SciPy and CVXPY certify, and what they do not let pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualMLP, TanhLU
from constrained_growth.verification import check_with_cvxpy, check_with_scipy, kkt_residuals

F64 = torch.float64


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def network(outputs: int, middle: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), middle(), nn.Linear(3, outputs))


def noisy(truth: nn.Module, *, classes: bool = False) -> tuple[Tensor, Tensor]:
    """Data of a network of that shape."""
    for parameter in truth.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(60, 2)
    y = truth(x).detach()
    if classes:
        return x, torch.distributions.Categorical(logits=2 * y).sample()
    return x, y + 0.2 * torch.randn_like(y)


def root_of_size(input: Tensor, _: Tensor) -> float:
    return len(input) ** 0.5


def trained_from_scratch(kind: str, seed: int) -> cg.GrowthProblem:
    torch.manual_seed(seed)
    outputs, weight = 2, None
    middle: Callable[[], nn.Module] = nn.Tanh
    block: nn.Module = ResidualMLP(3, 2, torch.tanh)
    if kind == "residual":
        middle = partial(Residual, 3)
    if kind == "shifted identity":
        middle = partial(TanhLU, 0.1)
        block = IdentityLinear(3, TanhLU(0.1))
    x, y = noisy(network(outputs, middle), classes=kind == "classes")
    net = network(outputs, middle)
    if kind in ("shifted identity", "inner"):
        net[2].requires_grad_(False)
    if kind == "inner":
        block = ResidualMLP(3, 2, torch.tanh, "inner")
    loss: nn.Module = nn.CrossEntropyLoss() if kind == "classes" else nn.MSELoss()
    batches = [(x, y)]
    if kind == "weighted, ragged":
        batches = list(zip(x.tensor_split([37]), y.tensor_split([37]), strict=True))
        weight = root_of_size
    places = [cg.Candidate("1", block)]
    return cg.GrowthProblem(net, loss, batches, places, weight=weight)


@pytest.mark.parametrize(
    "kind", ["values", "classes", "residual", "shifted identity", "inner", "weighted, ragged"]
)
def test_random_networks_are_certified_and_wrong_multipliers_are_not(kind):
    report = check_with_scipy(trained_from_scratch(kind, seed=3))
    assert report.passed, str(report)
    assert max(t.norm() for t in report.duals.values()) > 1e-6
    for wrong in spoilt(report.solution):
        assert not dataclasses.replace(report, solution=wrong).passed


def spoilt(solution: cg.Solution) -> list[cg.Solution]:
    """With all of λ off by 1 %; one pin's λ with the other sign; one of them transposed."""
    found = []
    (name, pins), *_ = solution.multipliers.items()
    first = max(pins, key=lambda key: float(pins[key].norm()))
    changes = [
        lambda key, t: 1.01 * t,
        lambda key, t: -t if key == first else t,
    ]
    if pins[first].dim() == 2 and pins[first].shape[0] == pins[first].shape[1]:
        changes.append(lambda key, t: t.mT if key == first else t)
    for change in changes:
        own = {key: change(key, t) for key, t in pins.items()}
        multipliers = {**solution.multipliers, name: own}
        found.append(dataclasses.replace(solution, multipliers=multipliers))
    return found


def square_problem() -> cg.GrowthProblem:
    """Convex; all its pins are square."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    x, y = noisy(network(2, nn.Tanh))
    block = ResidualMLP(3, 3, torch.tanh)
    return cg.GrowthProblem(net, nn.MSELoss(), [(x, y)], [cg.Candidate("1", block)])


def test_a_solve_that_is_wrong_is_caught_by_every_check(monkeypatch):
    """The checks ask `solve` themselves; here it returns something wrong."""
    problem, right = square_problem(), cg.solve
    assert check_with_scipy(problem).passed
    assert check_with_cvxpy(problem).passed
    for index in range(3):
        monkeypatch.setattr(
            "constrained_growth.verification.reports.solve",
            lambda *args, index=index, **kwargs: spoilt(right(*args, **kwargs))[index],
        )
        if index == 0:  # 1 %; all three are tried on its reports above
            assert not check_with_scipy(problem).passed
        assert not check_with_cvxpy(problem).passed
        solution = spoilt(right(problem))[index]
        assert (
            kkt_residuals(problem, solution).dual
            > 1e-3 * kkt_residuals(problem, right(problem)).dual + 1e-6
        )


class Scaled(torch.autograd.Function):
    """x ⊙ gain; its backward for the gain is off by a factor."""

    @staticmethod
    def forward(ctx, x, gain, factor):
        ctx.save_for_backward(x, gain, factor)
        return x * gain

    @staticmethod
    def backward(ctx, *deltas):
        (delta,), (x, gain, factor) = deltas, ctx.saved_tensors
        return delta * gain, factor * (delta * x).sum(0), None


class Gate(nn.Module):
    pinned = ("gain",)

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.gain, self.factor = nn.Parameter(torch.ones(width)), torch.tensor(factor)

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.gain, self.factor)


@pytest.mark.parametrize("check", [check_with_scipy, check_with_cvxpy])
@pytest.mark.parametrize("factor", [0.5, 1.01, 1.0])
def test_a_wrong_backward_of_a_block_is_caught(factor, check):
    """No solver may take its gradients from the backward that is to be checked."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(40, 3)
    y = net(x).detach() + 0.3 * torch.randn(40, 2)
    net[0].requires_grad_(False)  # convex
    net[2].weight.requires_grad_(False)  # else the gain is redundant with it
    problem = cg.GrowthProblem(net, nn.MSELoss(), [(x, y)], [cg.Candidate("1", Gate(3, factor))])
    report = check(problem)
    assert report.passed == (factor == 1.0), str(report)
    if factor == 0.5:
        assert report.dual_error > 0.1


@pytest.mark.parametrize("check", [check_with_scipy, check_with_cvxpy])
def test_a_loss_that_reads_the_model_by_closure_is_named(check):
    problem = square_problem()
    model = problem.model

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return (output - target).square().mean() + 0.01 * penalty

    own = list(model.parameters())

    def listed(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() + 0.01 * own[2].detach().square().sum()

    for loss in (decayed, listed):
        closure = cg.GrowthProblem(model, loss, problem.data, problem.candidates)
        with pytest.raises(cg.DataError, match=rf"{loss.__name__}.* by closure.*nn\.Module"):
            check(closure)
        with pytest.raises(cg.DataError, match="by closure"):
            kkt_residuals(closure, cg.solve(closure))


class Keeping(nn.Sequential):
    """Keeps its last output, and has a loss that reads its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept

    def penalised(self, output: Tensor, target: Tensor) -> Tensor:
        head: Any = self[2]
        return (output - target).square().mean() + 0.01 * head.weight.square().sum()


def test_losses_that_are_copied_with_the_model_serve() -> None:
    """Bound methods and partials; and a model that keeps an activation with its graph."""
    plain = square_problem()
    model = Keeping(*plain.model.children())
    model(next(iter(plain.data))[0])
    for loss in (partial(Keeping.penalised, model), model.penalised):
        problem = cg.GrowthProblem(model, loss, plain.data, plain.candidates)
        solution = cg.solve(problem)
        residuals = kkt_residuals(problem, solution)
        assert residuals.stationarity == pytest.approx(solution.stationarity)
    report = check_with_scipy(problem)
    assert report.passed, str(report)


def test_slopes_at_a_kink_are_to_one_side():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    x = torch.randn(40, 2)
    y = net(x).detach() + 0.2 * torch.randn(40, 1)
    places = [cg.Candidate("1", IdentityLinear(4, nn.ReLU()))]
    problem = cg.GrowthProblem(net, nn.MSELoss(), [(x, y)], places)
    solution = cg.solve(problem)
    assert solution.sensitivities["1"].kink > 0
    for check in (check_with_cvxpy, check_with_scipy):
        report = check(problem)
        assert report.passed, str(report)
    assert report.kinks > 0


class Branching(nn.Module):
    """tanh, after a look at the values, which no call for several points at once allows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if bool((x.detach() < 1e6).all()) else x


def test_networks_that_look_at_values_are_solved_alike():
    reports = []
    for middle in (nn.Tanh, Branching):
        torch.manual_seed(3)
        model = network(1, middle)
        model[0].requires_grad_(False)
        data = [noisy(network(1, nn.Tanh))]
        candidate = cg.Candidate("1", ResidualMLP(3, 2, torch.tanh))
        reports.append(check_with_scipy(cg.GrowthProblem(model, nn.MSELoss(), data, [candidate])))
    one, other = reports
    assert one.passed
    assert other.passed
    assert one.gradient_error == pytest.approx(other.gradient_error, abs=1e-8)
    both = zip((one, *one.others), (other, *other.others), strict=True)
    for mine, theirs in both:
        found, expected = (list(answer.duals.values()) for answer in (mine, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
