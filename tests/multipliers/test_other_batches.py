"""Batches of another kind than the first: λ is right over all of them, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import nothing_left_behind, refused
from torch import Tensor, nn

import constrained_growth as cg


def network() -> nn.Sequential:
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def data_of_two_kinds(order: tuple[bool, ...]) -> list[Any]:
    """Batches (x, (x, labels, kind)); x requires gradients."""
    found = []
    for other in order:
        x = torch.randn(8, 4, dtype=torch.double).requires_grad_()
        found.append((x, (x, torch.randint(3, (8,)), other)))
    return found


def by_autograd(model: nn.Module, loss: Any, data: list[Any], record: cg.GrowthRecord) -> Tensor:
    """λ of the layer that stands in the model."""
    mean: Any = sum(loss(model(x), target) for x, target in data) / len(data)
    (pin,) = (p for name, p in record.new_parameters(model) if name.endswith("outer.weight"))
    return -torch.autograd.grad(mean, pin)[0]


def solved(model: nn.Module, loss: Any, data: list[Any]) -> cg.Solution:
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    return cg.solve(cg.GrowthProblem(model, loss, data, [candidate]), cg.TopK(1))


def slopes(output: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(output.logsumexp(1).sum(), x, create_graph=True)
    return slope


def plain(output: Tensor, target: Any) -> Tensor:
    return F.cross_entropy(output, target[1])


def gradient_penalty(output: Tensor, target: Any) -> Tensor:
    x, _, other = target
    return plain(output, target) + (3 * slopes(output, x).square().mean() if other else 0)


def slope_alone(output: Tensor, target: Any) -> Tensor:
    x, _, other = target
    return slopes(output, x).sub(1).square().mean() if other else plain(output, target)


@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)])
@pytest.mark.parametrize("loss", [gradient_penalty, slope_alone])
def test_derivatives_in_the_loss_of_some_batches(loss: Any, order: tuple[bool, ...]) -> None:
    model, data = network(), data_of_two_kinds(order)
    solution = solved(model, loss, data)
    assert solution.method is cg.Method.IN_GRAPH
    record = cg.insert(model, solution)
    exact = by_autograd(model, loss, data, record)
    torch.testing.assert_close(solution.multipliers["1"]["outer.weight"], exact)


def test_what_one_batch_taught_is_kept() -> None:
    model, data = network(), data_of_two_kinds((False, True))
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    problem = cg.GrowthProblem(model, gradient_penalty, data, [candidate])
    assert problem.method is cg.Method.CLOSED_FORM
    with nothing_left_behind(model):
        first = cg.solve(problem, cg.TopK(1))
    assert problem.method is cg.Method.IN_GRAPH
    again = cg.solve(problem, cg.TopK(1))
    assert torch.equal(*(s.multipliers["1"]["outer.weight"] for s in (first, again)))


def test_held_out_batches_of_another_kind() -> None:
    model, data, others = network(), data_of_two_kinds((False,)), data_of_two_kinds((True, True))
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    problem = cg.GrowthProblem(model, gradient_penalty, data, [candidate])
    solution = cg.solve(problem, cg.TopK(1), validation=others)
    held_out = solution.sensitivities["1"].held_out
    record = cg.insert(model, solution)
    along = solution.multipliers["1"]["outer.weight"]
    exact = by_autograd(model, gradient_penalty, others, record)
    assert held_out is not None
    assert held_out.slope == pytest.approx(-float((along * exact).sum() / along.norm()))


def kept_part(model: nn.Sequential) -> Callable[..., Tensor]:
    first, activation = model[0], model[1]

    def loss(output: Tensor, target: Any) -> Tensor:
        x, _, other = target
        return plain(output, target) + (activation(first(x)).square().mean() if other else 0)

    return loss


def all_parameters(model: nn.Sequential) -> Callable[..., Tensor]:
    def loss(output: Tensor, target: Any) -> Tensor:
        penalty = sum((p - 1).square().sum() for p in model.parameters()) if target[2] else 0
        return plain(output, target) + 0.1 * penalty

    return loss


class Bypassing(nn.Sequential):
    """Calls the forward of its activation itself, when told to."""

    bypasses = False

    def forward(self, input: Tensor) -> Tensor:
        before, activation, *after = self
        h = before(input)
        h = activation.forward(h) if self.bypasses else activation(h)
        return nn.Sequential(*after)(h)


@pytest.mark.parametrize("loss", [kept_part, all_parameters])
@pytest.mark.parametrize("order", [(True, False), (False, True), (False, False, True)])
def test_refused_whichever_batch_shows_it(loss: Any, order: tuple[bool, ...]) -> None:
    model, data = network(), data_of_two_kinds(order)
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    with nothing_left_behind(model), refused(cg.CandidateError, 'after="1"', "derivative"):
        cg.solve(cg.GrowthProblem(model, loss(model), data, [candidate]), cg.TopK(1))


def test_a_module_whose_forward_is_called_in_a_later_batch() -> None:
    model = Bypassing(*network())

    class Told(list[Any]):
        def __iter__(self) -> Any:
            for x, target in super().__iter__():
                model.bypasses = target[2]
                yield x, target

    with refused(cg.CandidateError, 'after="1"', "module.forward(x)"):
        solved(model, plain, Told(data_of_two_kinds((False, True))))


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
def test_a_transform_in_a_later_batch() -> None:
    class Pushing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, other: bool) -> Tensor:
            if other:
                return torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))[1]
            return self.inner(x)

    data = [((x.detach(), t[2]), t) for x, t in data_of_two_kinds((False, True))]
    model = Pushing()
    candidate = cg.Candidate("inner.1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    with refused(cg.CandidateError, 'after="inner.1"', "torch.func"):
        cg.solve(cg.GrowthProblem(model, plain, data, [candidate]), cg.TopK(1))


class Repeating(nn.Module):
    """As many steps as its input says; only some batches pass the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.expert, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        self.runs = 0

    def forward(self, x: Tensor, count: int) -> Tensor:
        self.runs += 1
        for _ in range(count):
            x = x + 0.1 * torch.tanh(self.step(x))
        return self.head(self.expert(x) if count % 2 else x)


def test_graphs_that_are_all_different_are_looked_at_some_times_only() -> None:
    model = Repeating().double()
    data: list[Any] = [
        ((torch.randn(8, 4, dtype=torch.double), count), torch.randint(3, (8,)))
        for count in range(1, 21)
    ]
    candidate = cg.Candidate("expert", cg.blocks.ResidualMLP(4, 5, torch.tanh))
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [candidate])
    model.runs = 0
    solution = cg.solve(problem, cg.TopK(1))
    assert solution.method is cg.Method.CLOSED_FORM
    assert model.runs < 2 * len(data)
    record = cg.insert(model, solution)
    mean: Any = sum(F.cross_entropy(model(*x), y) for x, y in data) / len(data)
    (pin,) = (p for name, p in record.new_parameters(model) if name.endswith("outer.weight"))
    exact = -torch.autograd.grad(mean, pin)[0]
    torch.testing.assert_close(solution.multipliers["expert"]["outer.weight"], exact)


def test_a_later_batch_of_another_kind_that_is_not_finite() -> None:
    def loss(output: Tensor, target: Any) -> Tensor:
        return plain(output, target) * (torch.inf if target[2] else 1.0)

    model, data = network(), data_of_two_kinds((False, True))
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(6, 5, torch.tanh))
    problem = cg.GrowthProblem(model, loss, data, [candidate])
    solution = cg.solve(problem, cg.TopK(1), throw=False)
    assert solution.status is cg.Status.NOT_FINITE
    with refused(cg.DataError, "NaN or Inf", "throw=False"):
        cg.solve(problem, cg.TopK(1))
