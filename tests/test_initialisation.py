"""Free factors that make λ large, against singular values and many drawn ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    autograd_multipliers,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    squared_norm,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth._initialisation import ascend, best_inner
from constrained_growth.blocks import ResidualMLP


def squared(model: nn.Module, data: Any, one: cg.Candidate) -> float:
    """‖λ‖² from a model in which the candidate really stands."""
    return squared_norm(autograd_multipliers(model, data, one).values())


def problem_of(model: nn.Module, data: Any, one: cg.Candidate) -> cg.GrowthProblem:
    return cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])


def factor(one: cg.Candidate) -> Tensor:
    block = one.block
    assert isinstance(block, ResidualMLP)
    inner = torch.cat([block.inner.weight, block.inner.bias.unsqueeze(1)], 1)
    return (inner if block.pins_outer else block.outer.weight).detach()


def with_factor(one: cg.Candidate, value: Tensor) -> cg.Candidate:
    block = ResidualMLP(value.shape[1] - 1, len(value), one.block.activation)  # type: ignore[arg-type]
    with torch.no_grad():
        block.inner.weight.copy_(value[:, :-1])
        block.inner.bias.copy_(value[:, -1])
    return replace(one, block=block)


def moment(model: nn.Sequential, data: Any, after: int) -> Tensor:
    """Σ δ x̃ᵀ with x̃ = (x, 1), from the pieces of a Sequential."""
    total, count = torch.zeros(()), sum(len(x) for x, _ in data)
    for input, target in data:
        x = model[: after + 1](input).detach().requires_grad_()
        (delta,) = torch.autograd.grad(CROSS_ENTROPY(model[after + 1 :](x), target), x)
        features = torch.cat([x.detach(), torch.ones(len(x), 1)], 1)
        total = total + delta.mT @ features * len(x) / count
    return total


@pytest.mark.parametrize("hidden", [1, 3, 5, 9])
@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_linear_activation_gives_the_singular_vectors(hidden: int, bound: float) -> None:
    """‖λ‖² = bound² times the sum of the largest squared singular values of Σ δ x̃ᵀ."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(30, batch=12)
    drawn = cg.Candidate("1", ResidualMLP(4, hidden, nn.Identity()))
    with nothing_left_behind(model):
        chosen = best_inner(problem_of(model, data, drawn), drawn, bound=bound)
    values = torch.linalg.svdvals(moment(model, data, 1))[:hidden]
    expected = bound**2 * squared_norm([values])
    assert squared(model, data, chosen) == pytest.approx(expected, rel=1e-10)
    assert float(torch.linalg.svdvals(factor(chosen))[0]) == pytest.approx(bound, rel=1e-10)
    assert chosen.name == drawn.name
    assert chosen.block is not drawn.block


@pytest.mark.parametrize("hidden", [2, 4, 7])
def test_outer_factor_in_closed_form(hidden: int) -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(30, batch=12)
    drawn = cg.Candidate("1", ResidualMLP(4, hidden, torch.tanh, "inner"))
    chosen = best_inner(problem_of(model, data, drawn), drawn, bound=2.0)
    values = torch.linalg.svdvals(moment(model, data, 1))[:hidden]
    assert squared(model, data, chosen) == pytest.approx(4 * squared_norm([values]), rel=1e-10)
    assert float(torch.linalg.svdvals(factor(chosen))[0]) == pytest.approx(2.0)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_no_drawn_factor_is_better(activation: Any) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(40, batch=16)
    drawn = cg.Candidate("1", ResidualMLP(4, 3, activation()))
    problem = problem_of(model, data, drawn)
    chosen = best_inner(problem, drawn)
    best = squared(model, data, chosen)
    again = cg.solve(problem_of(model, data, chosen)).sensitivities["1"].value
    assert again**2 == pytest.approx(best, rel=1e-10)
    others = [torch.linalg.qr(torch.randn(5, 3))[0].mT for _ in range(200)]
    others.append(torch.linalg.svd(moment(model, data, 1))[2][:3])
    sizes = [squared(model, data, with_factor(drawn, other)) for other in others]
    assert best >= max(sizes)
    assert best > 1.5 * sum(sizes) / len(sizes)
    assert float(torch.linalg.svdvals(factor(chosen))[0]) <= 1 + 1e-10
    repeated = best_inner(problem, drawn)
    assert torch.equal(factor(chosen), factor(repeated))


def test_it_is_a_local_maximum() -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(40)
    drawn = cg.Candidate("1", ResidualMLP(4, 3, torch.tanh))
    chosen = best_inner(problem_of(model, data, drawn), drawn, max_steps=400)
    best, center = squared(model, data, chosen), factor(chosen)
    for _ in range(30):
        u, s, v = torch.linalg.svd(center + 1e-3 * torch.randn(3, 5), full_matrices=False)
        near = with_factor(drawn, (u * s.clamp(max=1)) @ v)
        assert squared(model, data, near) <= best * (1 + 1e-7)


def test_what_an_affine_map_could_do_does_not_count() -> None:
    """δ less its least-squares fit by x̃: λ of features whose affine part was taken out."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(40)
    drawn = cg.Candidate("1", ResidualMLP(4, 6, nn.GELU()))
    problem = problem_of(model, data, drawn)
    ((input, target),) = data
    x = model[:2](input).detach().requires_grad_()
    (delta,) = torch.autograd.grad(CROSS_ENTROPY(model[2:](x), target), x)
    design = torch.cat([x.detach(), torch.ones(40, 1)], 1)

    def bent(one: cg.Candidate) -> float:
        features = torch.nn.functional.gelu(design @ factor(one).mT)
        fit = design @ torch.linalg.lstsq(design, features).solution
        return squared_norm([delta.mT @ (features - fit)])

    plain, beyond = (
        best_inner(problem, drawn, beyond_next=flag, bound=3.0) for flag in (False, True)
    )
    assert bent(beyond) > bent(plain)
    assert squared(model, data, plain) > squared(model, data, beyond)
    linear = cg.Candidate("1", ResidualMLP(4, 3, nn.Identity()))
    with refused(cg.BlockError, "linear activation"):
        best_inner(problem_of(model, data, linear), linear, beyond_next=True)


def test_sequences() -> None:
    """Positions count like samples."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(8, 3, 2), torch.randint(3, (8,)))]
    drawn = cg.Candidate("1", ResidualMLP(4, 2, torch.tanh))
    chosen = best_inner(problem_of(model, data, drawn), drawn)
    assert squared(model, data, chosen) > squared(model, data, drawn)


def test_ascent_never_goes_down_or_out() -> None:
    target = torch.randn(3, 4)

    def function(point: Tensor) -> Tensor:
        return -(point - target).square().sum()

    start = torch.zeros(3, 4)
    end = ascend(function, start, 0.5, 200)
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    torch.testing.assert_close(end, (u * s.clamp(max=0.5)) @ v, rtol=0, atol=1e-5)
    assert torch.equal(ascend(function, target, 10.0, 5), target)


def test_what_it_is_not_for() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    gain = cg.Candidate("1", Gain(4))
    with nothing_left_behind(model), refused(cg.BlockError, "Gain", "ResidualMLP"):
        best_inner(problem_of(model, data, gain), gain)
    mlp = cg.Candidate("1", ResidualMLP(4, 2, torch.tanh))
    for bound in (0.0, -1.0, float("inf")):
        with refused(cg.BlockError, f"bound={bound}"):
            best_inner(problem_of(model, data, mlp), mlp, bound=bound)
    nn.init.zeros_(model.get_parameter("2.weight"))
    with refused(cg.BlockError, "every free factor"):
        best_inner(problem_of(model, data, mlp), mlp)
