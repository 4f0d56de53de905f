"""λ against the multipliers that CVXPY and SciPy find, and against the slope of p(ε).

Why the nets look as they do: after a trainable linear layer, or before one, every candidate that
is linear to first order has λ = 0 at a stationary θ (the layer could do the same). So some layers
are frozen here, to leave something to compare.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import (
    AffineFactors,
    IdentityLinear,
    ResidualLinear,
    ResidualMLP,
)
from constrained_growth.verification import (
    VerificationReport,
    check_with_cvxpy,
    check_with_scipy,
    kkt_residuals,
)

F64 = torch.float64
Batches = list[tuple[Tensor, Tensor]]


# --- instances --------------------------------------------------------------------------------


class Skip(nn.Module):
    """y = tail(features(x)) + skip(x); everything but the skip is frozen."""

    def __init__(self, outputs: int, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).requires_grad_(False)
        self.tail = (tail or nn.Linear(4, outputs)).requires_grad_(False)
        self.skip = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x)) + self.skip(x)


def ragged(x: Tensor, y: Tensor) -> Batches:
    """Two batches of different sizes."""
    cut = 2 * len(x) // 3
    return list(zip(x.tensor_split([cut]), y.tensor_split([cut]), strict=True))


def outer(width: int, hidden: int = 3) -> ResidualMLP:
    return ResidualMLP(width, hidden, torch.tanh, dtype=F64)


def candidates(outputs: int) -> list[cg.Candidate]:
    """Two at one site, and one behind them."""
    return [
        cg.Candidate("features", outer(4), "first"),
        cg.Candidate("features", outer(4, 2), "second"),
        cg.Candidate("tail", outer(outputs), "late"),
    ]


def targets(kind: str, n: int, outputs: int) -> Tensor:
    if kind == "classes":
        return torch.randint(outputs, (n,))
    if kind == "binary":
        return torch.randint(2, (n, outputs)).to(F64)
    return torch.randn(n, outputs, dtype=F64)


def convex_problem(loss: Callable[..., Tensor], kind: str, outputs: int) -> cg.GrowthProblem:
    torch.manual_seed(0)
    x = torch.randn(30, 3, dtype=F64)
    data = ragged(x, targets(kind, 30, outputs))
    return cg.GrowthProblem(Skip(outputs).to(F64), loss, data, candidates(outputs))


def squares() -> cg.GrowthProblem:
    return convex_problem(nn.MSELoss(), "values", 2)


@functools.cache
def report_of_squares() -> VerificationReport:
    """Solved once for all tests that only look at it."""
    return check_with_cvxpy(squares())


def near_teacher(net: nn.Module, x: Tensor, noise: float) -> tuple[nn.Module, Tensor]:
    """The perturbed net, and noisy outputs of the original one: a minimum is nearby."""
    net.to(F64)
    with torch.no_grad():
        y = net(x)
        y = y + noise * torch.randn_like(y)
        for parameter in net.parameters():
            parameter.add_(noise / 2 * torch.randn_like(parameter))
    return net, y


def teacher_problem(
    net: nn.Module, places: Sequence[cg.Candidate], noise: float = 0.1
) -> cg.GrowthProblem:
    """Least squares; what the caller froze in `net` stays frozen."""
    x = torch.randn(20, 2, dtype=F64)
    net, y = near_teacher(net, x, noise)
    return cg.GrowthProblem(net, nn.MSELoss(), ragged(x, y), places)


def tanh_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].requires_grad_(False)
    return net


def agrees(report: VerificationReport, bound: float) -> None:
    assert report.dual_error < bound, str(report)
    assert report.objective_error < 1e-9
    assert report.primal < 1e-12
    assert report.residuals.primal < 1e-12
    assert report.residuals.dual < 1e-13
    assert report.passed, str(report)
    # the largest multipliers are numbers, not rounding
    for pin in report.problem.constraints:
        assert report.solution.dual_value(pin).abs().max() > 1e-6


# --- convex instances: CVXPY ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "kind", "outputs"),
    [
        (nn.MSELoss(), "values", 2),
        (F.mse_loss, "values", 1),
        (nn.CrossEntropyLoss(), "classes", 3),
        (F.cross_entropy, "classes", 2),
        (nn.BCEWithLogitsLoss(), "binary", 2),
        (F.binary_cross_entropy_with_logits, "binary", 1),
    ],
)
def test_cvxpy_dual_values(loss, kind, outputs):
    report = check_with_cvxpy(convex_problem(loss, kind, outputs))
    assert report.status == cp.OPTIMAL
    agrees(report, 1e-6)
    assert report.residuals.stationarity < 1e-7
    assert report.solution.status is cg.Status.KKT_MULTIPLIERS


def test_least_squares_duals_in_closed_form():
    """θ* by the normal equations and λ = −(2/NK) Σ (y − t) A φᵀ-products, in NumPy alone."""
    problem, report = squares(), report_of_squares()
    x, t = (torch.cat(parts).numpy() for parts in zip(*problem.data, strict=True))
    weights = {name: p.detach().numpy() for name, p in problem.model.named_parameters()}
    h = np.tanh(x @ weights["features.0.weight"].T + weights["features.0.bias"])
    fixed = h @ weights["tail.weight"].T + weights["tail.bias"]
    design = np.hstack([x, np.ones((len(x), 1))])
    theta = np.linalg.lstsq(design, t - fixed)[0]
    cotangent = 2 / t.size * (fixed + design @ theta - t)
    block = problem.candidates[0].block
    assert isinstance(block, ResidualMLP)
    inner = block.inner.weight.detach().numpy(), block.inner.bias.detach().numpy()
    phi = np.tanh(h @ inner[0].T + inner[1])
    expected = -(cotangent @ weights["tail.weight"]).T @ phi
    np.testing.assert_allclose(report.duals[problem.constraints[0]], expected, rtol=1e-9)


def test_linear_tail():
    """Several frozen linear layers after the site, with a trainable bias at the very end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 3)).to(F64)
    net.requires_grad_(False)
    net[3].bias.requires_grad_(True)
    data = ragged(torch.randn(20, 3, dtype=F64), torch.randint(3, (20,)))
    places = [cg.Candidate(after, outer(width)) for after, width in (("1", 4), ("2", 5), ("3", 3))]
    # the trainable bias goes through the tanh of the third, whose v multiplies it
    agrees(check_with_cvxpy(cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, places)), 1e-6)


@pytest.mark.parametrize("pinned", ["outer", "inner"])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_a_trained_head_behind_the_site(pinned, loss):
    """Head times pinned layer is bilinear, and has no derivative at v = 0 but that of the head."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(F64)
    net[0].requires_grad_(False)
    x, noise = torch.randn(40, 3, dtype=F64), torch.randn(40, 3, dtype=F64)
    y = net(x).detach() + noise
    block = ResidualMLP(4, 3, torch.tanh, pinned, dtype=F64)
    target = y if isinstance(loss, nn.MSELoss) else y.argmax(1)
    problem = cg.GrowthProblem(net, loss, ragged(x, target), [cg.Candidate("1", block)])
    report = check_with_cvxpy(problem)
    assert report.passed, str(report)
    assert report.solution.status is cg.Status.KKT_MULTIPLIERS
    if pinned == "outer":  # linear in x to first order, what is pinned inside is redundant
        agrees(report, 1e-6)


class Decayed(nn.Module):
    """Mean squared error plus weight decay of a model that it holds."""

    def __init__(self, model: nn.Module, decay: float = 0.05) -> None:
        super().__init__()
        self.model, self.decay = model, decay

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters() if p.requires_grad)
        return F.mse_loss(output, target) + self.decay * penalty


def test_weight_decay_in_a_loss_that_holds_the_model():
    def form(output: cp.Expression, target: Tensor) -> cp.Expression | float:
        return cp.mean(cp.square(output - target.numpy()))

    plain = squares()
    loss = Decayed(plain.model)
    problem = cg.GrowthProblem(plain.model, loss, plain.data, plain.candidates)
    report = check_with_cvxpy(problem, cvxpy_loss=form)
    agrees(report, 1e-6)
    assert report.residuals.stationarity < 1e-7
    apart = report_of_squares().problem.model.get_parameter("skip.weight")
    together = report.problem.model.get_parameter("skip.weight")
    assert together.norm() < 0.9 * apart.norm()  # the penalty was there

    loss.decay = 0.01
    late = cg.Candidate("tail", outer(2, 1))
    certified = check_with_scipy(cg.GrowthProblem(plain.model, loss, plain.data, [late]))
    assert certified.passed, str(certified)
    assert certified.proximal == 0
    own = loss.model.get_parameter("skip.weight")
    assert own is plain.model.get_parameter("skip.weight")  # and the loss is as it was


def test_a_penalty_that_is_not_quadratic():
    class Lasso(Decayed):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            penalty = sum(p.abs().sum() for p in self.model.parameters())
            return F.mse_loss(output, target) + self.decay * penalty

    plain = squares()
    problem = cg.GrowthProblem(plain.model, Lasso(plain.model), plain.data, plain.candidates)
    with pytest.raises(cg.DataError, match=r"quadratic penalty.*check_with_scipy"):
        check_with_cvxpy(problem, cvxpy_loss=lambda y, t: cp.mean(cp.square(y - t.numpy())))


def test_a_penalty_that_is_not_convex():
    plain = squares()
    loss = Decayed(plain.model, decay=-0.01)
    problem = cg.GrowthProblem(plain.model, loss, plain.data, plain.candidates)
    with pytest.raises(cg.DataError, match=r"not convex \(curvature -0\.02\)"):
        check_with_cvxpy(problem, cvxpy_loss=lambda y, t: cp.mean(cp.square(y - t.numpy())))


def test_several_solvers_in_one_report():
    report = check_with_cvxpy(squares(), solver=[cp.CLARABEL, cp.OSQP, cp.SCS])
    assert report.passed, str(report)
    assert [one.solver for one in (report, *report.others)] == [
        "CVXPY, CLARABEL",
        "CVXPY, OSQP",
        "CVXPY, SCS",
    ]
    with pytest.raises(cg.DataError, match="for one solver"):
        check_with_cvxpy(
            squares(),
            solver=[cp.CLARABEL, cp.OSQP],
            options={"max_iter": 10},
        )


def test_a_users_form_of_a_loss():
    """Huber's loss: convex, piecewise, and unknown to the module."""

    def huber(output: cp.Expression, target: Tensor) -> cp.Expression | float:
        return cp.sum(cp.huber(output - target.numpy(), 1)) / (2 * target.numel())

    problem = convex_problem(nn.HuberLoss(delta=1.0), "values", 2)
    agrees(check_with_cvxpy(problem, cvxpy_loss=huber), 1e-6)


def test_outputs_of_one_dimension():
    torch.manual_seed(0)
    net = nn.Sequential(Skip(1), nn.Flatten(0)).to(F64)
    x = torch.randn(20, 3, dtype=F64)
    data = ragged(x, torch.randint(2, (20,)).to(F64))
    problem = cg.GrowthProblem(
        net, nn.BCEWithLogitsLoss(), data, [cg.Candidate("0.features", outer(4))]
    )
    agrees(check_with_cvxpy(problem), 1e-6)


def test_nothing_trainable():
    problem = squares()
    problem.model.requires_grad_(False)
    report = check_with_cvxpy(problem)
    assert report.residuals.stationarity == 0
    assert report.dual_error < 1e-9


def test_another_solver():
    """OSQP does not get as far; the same numbers to its accuracy."""
    report = check_with_cvxpy(
        squares(),
        solver=cp.OSQP,
        options={"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000},
    )
    assert report.dual_error < 1e-5


# --- nonconvex networks: SciPy ----------------------------------------------------------------


def _tanh_outer() -> cg.GrowthProblem:
    return teacher_problem(tanh_net(), [cg.Candidate("1", outer(3, 2))])


def _relu_identity() -> cg.GrowthProblem:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    net[2].requires_grad_(False)
    net[0].bias.requires_grad_(False)  # else λ of the layer's own bias is ∂L/∂(this) = 0
    place = cg.Candidate("1", IdentityLinear(3, nn.ReLU(), dtype=F64))
    # little noise: with more, the minimum over θ itself sits on a kink and is not stationary
    return teacher_problem(net, [place], noise=0.01)


def _many() -> cg.GrowthProblem:
    return teacher_problem(
        tanh_net(),
        [
            cg.Candidate("1", outer(3, 2), "outer"),
            cg.Candidate("1", ResidualMLP(3, 2, torch.tanh, "inner", dtype=F64), "inner"),
            cg.Candidate("2", ResidualLinear(2, torch.tanh, dtype=F64), "one weight, at the end"),
        ],
    )


@pytest.mark.parametrize("make", [_relu_identity, _many])
def test_scipy_multipliers(make):
    torch.manual_seed(0)
    problem = make()
    report = check_with_scipy(problem)
    agrees(report, 1e-4)
    assert len(report.others) == 1  # two solvers
    for pin, dual in report.duals.items():  # signs included, entry by entry
        torch.testing.assert_close(dual, report.solution.dual_value(pin), rtol=1e-5, atol=1e-9)
    assert report.solution.loss < cg.solve(problem).loss


def test_nothing_trainable_with_scipy():
    problem = _tanh_outer()
    problem.model.requires_grad_(False)
    report = check_with_scipy(problem)
    assert report.passed, str(report)
    assert report.dual_error < 1e-7


def test_slope_of_the_value_function():
    """p(ε) = min over θ of L(θ, ε) has ∇p(0) = −λ: train again with the pin moved a little."""
    torch.manual_seed(0)
    report = check_with_scipy(_tanh_outer())
    problem, solution = report.problem, report.solution
    pin = problem.constraints[0]
    direction = torch.randn(pin.shape, dtype=F64)

    def smallest_loss(step: float) -> float:
        model = copy.deepcopy(problem.model)
        old = [p for p in model.parameters() if p.requires_grad]
        cg.insert(model, dataclasses.replace(solution, decision=cg.Decision((pin.candidate,))))
        virtual = model.get_parameter(f"{pin.candidate}.inserted.{pin.parameter}")
        with torch.no_grad():
            virtual.add_(step * direction)
        optimizer = torch.optim.LBFGS(
            old,
            max_iter=500,
            tolerance_grad=1e-12,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        samples = sum(len(y) for _, y in problem.data)

        def closure() -> float:
            optimizer.zero_grad()
            loss = sum(
                (len(y) / samples * F.mse_loss(model(x), y) for x, y in problem.data),
                torch.zeros((), dtype=F64),
            )
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        return closure()

    h = 2e-4
    slope = (smallest_loss(h) - smallest_loss(-h)) / (2 * h)
    expected = -(solution.dual_value(pin) * direction).sum().item()
    assert slope == pytest.approx(expected, rel=1e-4)


# --- what would be found ----------------------------------------------------------------------


def changed(report: VerificationReport, factor: float) -> VerificationReport:
    """The report had `solve` returned `factor` times λ."""
    multipliers = {
        name: {key: factor * value for key, value in own.items()}
        for name, own in report.solution.multipliers.items()
    }
    solution = dataclasses.replace(report.solution, multipliers=multipliers)
    return dataclasses.replace(report, solution=solution)


@pytest.mark.parametrize(("factor", "size"), [(-1.0, 2.0), (1 + 1e-4, 1e-4), (0.5, 0.5)])
def test_wrong_multipliers_are_seen(factor, size):
    report = report_of_squares()
    wrong = changed(report, factor)
    assert list(wrong.dual_errors.values()) == pytest.approx([size] * 3, rel=1e-4)
    norm = torch.cat([dual.flatten() for dual in report.duals.values()]).norm().item()
    residuals = kkt_residuals(report.problem, wrong.solution)
    assert residuals.dual == pytest.approx(size * norm, rel=1e-4)


class WrongLater(ResidualMLP):
    """A block whose closed form is right on the first batch, and of the wrong sign on the last."""

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        return super().factors(x, delta if len(x) > 10 else -delta)


def test_a_wrong_block_is_seen_by_both():
    torch.manual_seed(0)
    place = cg.Candidate("features", WrongLater(4, 3, torch.tanh, dtype=F64))
    problem = squares()
    problem = cg.GrowthProblem(problem.model, nn.MSELoss(), problem.data, [place])
    assert check_with_cvxpy(problem).dual_error > 0.1
    assert check_with_scipy(problem).dual_error > 0.1


def test_a_wrong_closed_form_gives_way_to_the_graph():
    class WrongSign(ResidualMLP):
        def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
            return super().factors(x, -delta)

    place = cg.Candidate("features", WrongSign(4, 3, torch.tanh, dtype=F64))
    problem = squares()
    problem = cg.GrowthProblem(problem.model, nn.MSELoss(), problem.data, [place])
    assert problem.method is cg.Method.IN_GRAPH
    assert check_with_cvxpy(problem).dual_error < 1e-6


def test_residuals_of_an_estimate():
    """Away from a stationary θ the dual residual is still 0, and ‖∇_θ L‖ what `solve` says."""
    torch.manual_seed(0)
    problem = convex_problem(nn.CrossEntropyLoss(), "classes", 3)
    solution = cg.solve(problem)
    residuals = kkt_residuals(problem, solution)
    assert residuals.primal == 0
    assert residuals.dual < 1e-14
    assert solution.stationarity is not None
    assert residuals.stationarity == pytest.approx(solution.stationarity, rel=1e-12)
    assert residuals.stationarity > 1e-2


def test_residuals_see_the_rounding_of_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).float()
    data = ragged(torch.randn(20, 2).float(), torch.randn(20, 2).float())
    problem = cg.GrowthProblem(net, nn.MSELoss(), data, cg.find_candidates(net, data[0][0]))
    assert 1e-10 < kkt_residuals(problem, cg.solve(problem)).dual < 1e-5


def test_inputs_of_other_forms_and_values_changed_in_place():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4, dtype=F64)
            self.last = nn.Linear(4, 2, dtype=F64)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            h = self.first(x)
            h *= scale
            return {"logits": self.last(torch.tanh(h))}

    torch.manual_seed(0)
    data = [
        ({"x": torch.randn(n, 3, dtype=F64), "scale": torch.rand(n, 1, dtype=F64)}, target)
        for n, target in ((5, torch.randint(2, (5,))), (3, torch.randint(2, (3,))))
    ]
    problem = cg.GrowthProblem(
        Net(),
        lambda output, target: F.cross_entropy(output["logits"], target),
        data,
        [cg.Candidate("first", outer(4))],
    )
    assert kkt_residuals(problem, cg.solve(problem)).dual < 1e-14
    with pytest.raises(cg.DataError, match="the output of model=Net is dict"):
        check_with_cvxpy(problem)


def test_a_named_tuple_stays_one_argument():
    class Pair(NamedTuple):
        x: Tensor
        scale: Tensor

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, dtype=F64), nn.Linear(4, 2, dtype=F64)

        def forward(self, pair: Pair) -> Tensor:
            return self.last(torch.tanh(self.first(pair.x) * pair.scale))

    torch.manual_seed(0)
    pair = Pair(torch.randn(5, 3, dtype=F64), torch.rand(5, 1, dtype=F64))
    data = [(pair, torch.randint(2, (5,)))]
    problem = cg.GrowthProblem(Net(), F.cross_entropy, data, [cg.Candidate("first", outer(4))])
    assert kkt_residuals(problem, cg.solve(problem)).dual < 1e-14


# --- left unchanged, and printed ---------------------------------------------------------------


@pytest.mark.parametrize("check", [check_with_cvxpy, check_with_scipy])
def test_everything_is_left_as_it_was(check):
    torch.manual_seed(0)
    net = Skip(2).float().eval()
    x, y = torch.randn(20, 3).float(), torch.randn(20, 2).float()
    net(x).sum().backward()
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator
    )
    problem = cg.GrowthProblem(net, nn.MSELoss(), data, [cg.Candidate("features", outer(4))])
    before = copy.deepcopy(net)
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    states = torch.get_rng_state(), generator.get_state()
    check(problem)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
    for (name, p), q in zip(net.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == q.dtype, name
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or gradient is None or torch.equal(p.grad, gradient)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module.training


def test_print():
    report = report_of_squares()
    lines = str(report).splitlines()
    assert lines[:2] == ["passed", "CVXPY, CLARABEL: optimal"]
    content = json.loads(report.to_json())
    assert content["passed"] is True
    assert [check["name"] for check in content["checks"]] == [c.name for c in report.checks]
    wrong = changed(report, 1.01)
    assert str(wrong).startswith("NOT PASSED")
    assert json.loads(wrong.to_json())["passed"] is False
    assert [line.split("  ")[0] for line in lines[-3:]] == [
        "first: outer.weight",
        "second: outer.weight",
        "late: outer.weight",
    ]


# --- refused ----------------------------------------------------------------------------------


def test_what_is_not_affine_is_named():
    problem = squares()
    problem.model.get_submodule("tail").requires_grad_(True)
    problem.model.get_submodule("features.0").requires_grad_(True)
    problem.model.get_parameter("features.0.weight").requires_grad_(False)
    with pytest.raises(cg.DataError, match=r"is not affine in features\.0\.bias, so.*_\(False\)"):
        check_with_cvxpy(problem)
    problem.model.get_submodule("features.0").requires_grad_(False)
    problem.model.get_submodule("tail").requires_grad_(False)
    problem.model.get_parameter("features.0.weight").requires_grad_(True)
    with pytest.raises(cg.DataError, match=r"is not affine in features\.0\.weight, so"):
        check_with_cvxpy(problem)


def test_loss_without_a_form_or_with_another():
    with pytest.raises(cg.DataError, match=r"loss_fn=L1Loss\(\).*cvxpy_loss="):
        check_with_cvxpy(convex_problem(nn.L1Loss(), "values", 2))
    with pytest.raises(cg.DataError, match=r"label_smoothing= or reduction="):
        check_with_cvxpy(convex_problem(nn.CrossEntropyLoss(label_smoothing=0.1), "classes", 3))
    x, soft = torch.randn(8, 3, dtype=F64), torch.full((8, 3), 1 / 3, dtype=F64)
    problem = cg.GrowthProblem(Skip(3).to(F64), nn.CrossEntropyLoss(), [(x, soft)], candidates(3))
    with pytest.raises(cg.DataError, match=r"output of shape \(8, 3\).*fits the targets"):
        check_with_cvxpy(problem)


def test_a_solver_that_is_not_there():
    with pytest.raises(cg.DataError, match=r"solver='NAG' is not installed.*CLARABEL"):
        check_with_cvxpy(squares(), solver="NAG")


def test_no_minimum():
    def mean(output: cp.Expression, target: Tensor) -> cp.Expression | float:
        return cp.sum(output) / target.numel()

    problem = convex_problem(lambda output, target: output.mean(), "values", 2)
    with pytest.raises(cg.DataError, match=r"'unbounded'.*no minimum"):
        check_with_cvxpy(problem, cvxpy_loss=mean)


def test_scipy_stopped_early():
    torch.manual_seed(0)
    with pytest.raises(cg.DataError, match=r"both solvers fail .* maxiter=2"):
        check_with_scipy(_tanh_outer(), maxiter=2)


def test_too_large():
    net = nn.Sequential(nn.Linear(2, 700), nn.Tanh(), nn.Linear(700, 2))
    net[2].requires_grad_(False)
    problem = teacher_problem(net, [cg.Candidate("1", outer(700, 2))])
    for check, most in ((check_with_scipy, 300), (check_with_cvxpy, 2000)):
        with pytest.raises(cg.DataError, match=f"2100 trainable and 1400 pinned .* up to {most}"):
            check(problem)


def test_random():
    torch.manual_seed(0)
    problem = _tanh_outer()
    net = nn.Sequential(*tanh_net(), nn.Dropout()).to(F64)
    dropping = cg.GrowthProblem(net, nn.MSELoss(), problem.data, [cg.Candidate("1", outer(3))])
    with pytest.raises(cg.DataError, match=r"model\.eval\(\)"):
        kkt_residuals(dropping, cg.solve(dropping))
