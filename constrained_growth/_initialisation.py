"""The free parameters of a residual block chosen, not drawn: those that make λ large."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from constrained_growth._activations import in_double, slope_at_zero
from constrained_growth._distributed import several
from constrained_growth._gathering import gather
from constrained_growth.blocks import ResidualMLP
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.errors import BlockError, DataError
from constrained_growth.problem import GrowthProblem


def best_inner(
    problem: GrowthProblem,
    candidate: Candidate,
    *,
    bound: float = 1.0,
    beyond_next: bool = False,
    restarts: int = 4,
    max_steps: int = 100,
    seed: int = 0,
) -> Candidate:
    """The same candidate with the free factor that makes its sensitivity largest.

    With the outer factor pinned, the free one is F = [W₁, b], and over all samples

        maximise ‖λ_{W₂}‖²_F = ‖Σ δ σ(F x̃)ᵀ‖²_F   over   ‖F‖₂ ≤ bound,   x̃ = (x, 1).

    The bound is on the largest singular value, as for one on ‖F‖_F all hidden units would be the
    same. For a linear σ the answer is known: F = bound · (the right singular vectors of Σ δ x̃ᵀ of
    the largest singular values). For any other σ it is found by projected gradient ascent from
    there, from its negative and from random starts: a local maximum, no less than all of these.
    With the inner factor pinned, λ = −σ′(0) W₂ᵀ Σ δ x̃ᵀ is linear in the free factor W₂, and the
    left singular vectors are the answer.

    It takes one gradient pass of the model; x and δ at the site are kept in float64 for all
    samples.

    Args:
        problem: The problem, left as it is, with a candidate at the same site.
        candidate: Of the problem, with a `ResidualMLP`; it is left as it is.
        bound: Of the largest singular value of the free factor.
        beyond_next: Count only what an affine map of x at the site could not do (to which a
            linear layer right behind the site amounts): δ is replaced by what remains of it after
            its least-squares fit by x̃, so that only the part of σ(F x̃) that is not affine in x
            counts. Needs the outer factor pinned.
        restarts: How many random starts.
        max_steps: At most so many steps of ascent from each start.
        seed: Of the random starts.

    Returns:
        A candidate of the same name, site and block but for the free factor.

    Raises:
        BlockError: The block is no `ResidualMLP`; or no free factor makes λ differ from zero.
        DataError: There are several processes.

    Source:
        Evci et al., *GradMax: Growing Neural Networks using Gradient Information*, 2022, arXiv
        2201.05125; the projection: Verbockhaven et al., *Growing Tiny Networks*, 2024.

    Example:
        >>> from torch import nn
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> drawn = cg.Candidate("1", cg.blocks.ResidualMLP(4, 3, torch.tanh))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [drawn])
        >>> chosen = best_inner(problem, drawn)
        >>> again = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [chosen])
        >>> before, after = (cg.solve(p).sensitivities["1"].value for p in (problem, again))
        >>> after > before
        True
    """
    block = candidate.block
    if not isinstance(block, ResidualMLP):
        raise BlockError(
            f"block={type(block).__name__} of the candidate has no free factor to choose; this is "
            "for ResidualMLP."
        )
    if not 0 < bound < float("inf"):
        raise BlockError(f"bound={bound!r} must be positive and finite.")
    if several(problem.group):
        raise DataError(
            "best_inner: several processes cannot choose together yet; make the problem with "
            "group=None on one of them."
        )
    samples = _samples(problem, candidate)
    if beyond_next:
        samples = _beyond_affine(samples)
    chosen = copy.deepcopy(block)
    if block.pins_outer:
        factor = _best_factor(samples, block, bound, restarts, max_steps, seed)
    else:
        factor = _best_outer(samples, block, bound)
    with torch.no_grad():
        if block.pins_outer:
            chosen.inner.weight.copy_(factor[:, :-1])
            chosen.inner.bias.copy_(factor[:, -1])
        else:
            chosen.outer.weight.copy_(factor)
    return replace(candidate, block=chosen)


@dataclass(frozen=True)
class Samples:
    """All that arrived at a site.

    Attributes:
        features: x̃ = (x, 1), shape (positions, width + 1).
        deltas: δ, weighted so that their sum is that of the mean loss, shape (positions, width).
    """

    features: Tensor
    deltas: Tensor


def _samples(problem: GrowthProblem, candidate: Candidate) -> Samples:
    xs, deltas, weights = [], [], {}
    for seen in gather(problem, candidate.after, candidate.output):
        xs.append(seen.x.flatten(0, -2).to(torch.float64))
        deltas.append(seen.delta.flatten(0, -2).to(torch.float64) * seen.weight)
        weights[seen.batch] = seen.weight
    x = torch.cat(xs)
    return Samples(
        torch.cat([x, torch.ones_like(x[:, :1])], 1), torch.cat(deltas) / sum(weights.values())
    )


def _beyond_affine(samples: Samples) -> Samples:
    """δ less its least-squares fit by x̃."""
    basis, sizes, _ = torch.linalg.svd(samples.features, full_matrices=False)
    rank = int((sizes > 1e-10 * sizes.max()).sum())
    basis = basis[:, :rank]
    return replace(samples, deltas=samples.deltas - basis @ (basis.mT @ samples.deltas))


def _best_outer(samples: Samples, block: ResidualMLP, bound: float) -> Tensor:
    """W₂ of shape (width, hidden) that maximises ‖W₂ᵀ M‖_F, for M = Σ δ x̃ᵀ."""
    moment = samples.deltas.mT @ samples.features
    if not _is_alive(moment, samples) or slope_at_zero(block.activation) == 0:
        raise BlockError("every free factor gives the multiplier 0; nothing is to be had by it.")
    return bound * _leading(moment.mT, block.inner.out_features).mT


def _best_factor(
    samples: Samples, block: ResidualMLP, bound: float, restarts: int, max_steps: int, seed: int
) -> Tensor:
    """[W₁, b] of shape (hidden, width + 1), the best of what several starts lead to."""
    sigma = in_double(block.activation)
    hidden, width = block.inner.out_features, samples.features.shape[1]

    def size(factor: Tensor) -> Tensor:
        features = sigma(samples.features @ factor.mT)
        return (samples.deltas.mT @ features).square().sum()

    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(hidden, width, generator=generator, dtype=torch.float64).to(samples.deltas)
        for _ in range(restarts)
    ]
    linear = bound * _leading(samples.deltas.mT @ samples.features, hidden)
    starts = [linear, -linear, *(bound * _polar(one) for one in drawn)]
    best = max(
        (ascend(size, start, bound, max_steps) for start in starts), key=lambda f: float(size(f))
    )
    scale = samples.deltas.norm() * sigma(samples.features @ best.mT).norm()
    if float(size(best)) <= (1e-12 * float(scale)) ** 2:
        raise BlockError(
            "every free factor gives the multiplier 0; with beyond_next=True that is so for a "
            "linear activation."
        )
    return best


def ascend(
    function: Callable[[Tensor], Tensor], start: Tensor, bound: float, max_steps: int
) -> Tensor:
    """Climb a function of a matrix within ‖F‖₂ ≤ bound, by projected gradients.

    Args:
        function: What to maximise; differentiable.
        start: Where to begin, within the bound.
        bound: On the largest singular value.
        max_steps: At most so many steps.

    Returns:
        A point where the function is at least what it is at the start.
    """
    point, length = start, 1.0
    value, slope = _with_gradient(function, point)
    for _ in range(max_steps):
        size = float(slope.norm())
        if size == 0:
            break
        for _ in range(30):
            trial = _clipped(point + (length * bound / size) * slope, bound)
            found = float(function(trial))
            if found > value * (1 + 1e-12):
                break
            length /= 2
        else:
            break
        point, length = trial, 2 * length
        value, slope = _with_gradient(function, point)
    return point


def _with_gradient(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[float, Tensor]:
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    return value.item(), slope


def _leading(matrix: Tensor, rows: int) -> Tensor:
    """The `rows` leading right singular vectors as rows; where there are fewer, all of them.

    These are then spread over the rows by a matrix with orthonormal columns.
    """
    *_, vectors = torch.linalg.svd(matrix, full_matrices=True)
    if rows <= len(vectors):
        return vectors[:rows]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, len(vectors), generator=generator, dtype=torch.float64)
    return _polar(drawn.to(matrix)) @ vectors


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all 1."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _clipped(matrix: Tensor, bound: float) -> Tensor:
    """The nearest matrix whose singular values are at most a bound."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * sizes.clamp(max=bound)) @ right


def _is_alive(moment: Tensor, samples: Samples) -> bool:
    return float(moment.norm()) > 1e-12 * float(samples.deltas.norm() * samples.features.norm())
