"""Running sums over samples: from (x, δ) at a site to λ and its variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.uses import Use, differentiated, over_uses
from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.norms import SecondMoments


@dataclass(frozen=True)
class Estimate:
    """What a pass over the data says of one candidate.

    Attributes:
        multiplier: Pinned parameter → λ, the mean over the samples.
        variance: tr Cov(λ), unbiased. NaN where it cannot be known: from a single sample or
            batch, or where some batches came by samples and some as a whole.
        moments: Pinned weight → second moments of its features and cotangents, where asked for
            and the block has `factors`.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: dict[str, SecondMoments]


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of `factor` times the loss."""
    moments = {
        name: replace(moment, cotangents=moment.cotangents * factor**2)
        for name, moment in estimate.moments.items()
    }
    multiplier = {name: value * factor for name, value in estimate.multiplier.items()}
    return Estimate(multiplier, estimate.variance * factor**2, moments)


class Squares:
    """Σ_n ‖λ_n‖² of all candidates on one device; to be used without autocast, as `Tally`.

    Without further dimensions at a site, ‖λ_n‖² = ‖ψ_n‖²(‖φ_n‖² + 1), the 1 for the bias. The
    norms of the rows of ψ and φ are noted as they come, in memory that is made once, and put
    together for all candidates after each batch.

    Attributes:
        values: The sums, one for each candidate, in float64.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, dtype=torch.float64, device=device)
        self._noted: set[int] = set()
        self._with_bias: set[int] = set()
        self._make_room(torch.zeros(0, 0, device=device))

    def note(self, index: int, psi: Tensor, phi: Tensor, size: int, *, has_bias: bool) -> None:
        """Take in one batch at one candidate: ψ and φ, shape (samples, out) and (samples, in)."""
        if psi.shape[0] != self._length or psi.dtype != self._psi.dtype:
            self.settle(size)
            self._make_room(psi)
        elif index in self._noted:
            self.settle(size)
        if has_bias != (index in self._with_bias):
            self._with_bias ^= {index}
            self._biases[index] = float(has_bias)
        self._noted.add(index)
        psi_row, phi_row = self._rows[index]
        _row_norm(psi, dim=1, out=psi_row)
        _row_norm(phi, dim=1, out=phi_row)

    def settle(self, size: int) -> None:
        """Put together what was noted, from batches of `size` samples each."""
        if not self._noted:
            return
        if len(self._noted) < len(self._rows):
            for index in set(range(len(self._rows))) - self._noted:
                for row in self._rows[index]:
                    row.zero_()
        phi = self._phi.square_().add_(self._biases)
        self.values.add_(torch.linalg.vecdot(self._psi.square_(), phi), alpha=size**2)
        self._noted.clear()

    def _make_room(self, psi: Tensor) -> None:
        self._length = len(psi)
        self._psi = psi.new_zeros(len(self.values), len(psi))
        self._phi = torch.zeros_like(self._psi)
        self._biases = psi.new_zeros(len(self.values), 1)
        self._with_bias.clear()
        self._rows = list(zip(self._psi.unbind(), self._phi.unbind(), strict=True))


_row_norm = torch.linalg.vector_norm


@dataclass
class _MomentSums:
    """Σ φ̃φ̃ᵀ and Σ ψψᵀ of one affine map (or of several), and over how many rows."""

    features: Tensor
    cotangents: Tensor
    bias: str | None
    rows: int = 0

    def means(self, index: int | None, num_samples: int) -> SecondMoments:
        here = ... if index is None else index
        return SecondMoments(
            self.features[here] / self.rows, self.cotangents[here] / num_samples, self.bias
        )


@dataclass(frozen=True)
class Counts:
    """What a tally has taken in, apart from the sums.

    Attributes:
        samples: How many samples, by closed forms.
        batches: For each candidate, how many batches as a whole.
        moments: Pinned weight → the bias that goes with it, the shapes of its two sums, and over
            how many rows they are.
    """

    samples: int
    batches: list[int]
    moments: dict[str, tuple[str | None, torch.Size, torch.Size, int]]


class Tally:
    """Σ n_b λ_b and Σ ‖·‖² for one candidate, or for several of one kind worked off together.

    Batches are to be taken in without autocast, which would multiply in a lower precision.

    Args:
        blocks: The blocks of the candidates; more than one only if their `joint_kind()` is equal.
        squares: Where Σ ‖·‖² is kept; the part of it that belongs here is an attribute.
        first: The place of the first candidate there.
        moments: Whether to collect second moments too, for norms that need them.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], squares: Squares, first: int, *, moments: bool = False
    ) -> None:
        self._blocks = tuple(blocks)
        self._joint = len(blocks) > 1
        several = (len(blocks),) if self._joint else ()
        self._sums = {
            name: torch.zeros(
                (*several, *p.shape), dtype=accumulation_dtype(p.dtype), device=p.device
            )
            for name, p in pinned_parameters(blocks[0]).items()
        }
        self._matrices = {  # a kernel as a matrix
            name: total.flatten(1 + len(several))
            for name, total in self._sums.items()
            if total.dim() > 1 + len(several)
        }
        self._dtype = next(iter(pinned_parameters(blocks[0]).values())).dtype
        self._all_squares = squares
        self._first = first
        self.squares = squares.values[first : first + len(blocks)]
        self._moments: dict[str, _MomentSums] | None = {} if moments else None
        self._samples = 0
        self._batches = [0] * len(blocks)

    def add_samples(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in batches of `size` samples each by closed forms, for all candidates at once.

        Args:
            x: The tensor at the site, shape (samples, ..., width); for several candidates the
                tensors at their sites, shape (candidates, samples, ..., width).
            delta: ∂L/∂x of the mean loss of each batch, same shape.
            size: How many samples each of the batches had; λ_n = −size · ψ_n φ_nᵀ.
        """
        self._add_factors(self._factors(x, delta), size)
        self._samples += x.shape[int(self._joint)]

    def add_uses(self, uses: Sequence[Use], size: int) -> None:
        """Take in one batch by closed forms, at a site that is used several times.

        Args:
            uses: One for each time; `x` has shape (samples, ..., width).
            size: How many samples the batch had.
        """
        factors = [self._factors(use.x, use.delta) for use in uses]
        self._add_factors(factors[0] if len(uses) == 1 else over_uses(factors), size)
        self._samples += size

    def _factors(self, x: Tensor, delta: Tensor) -> Iterable[AffineFactors]:
        if x.dtype != self._dtype or delta.dtype != self._dtype:
            x, delta = x.to(self._dtype), delta.to(self._dtype)
        first: Any = self._blocks[0]
        if self._joint:
            return first.joint_factors(self._blocks, x, delta)
        return first.factors(x, delta)

    def _add_factors(self, factors: Iterable[AffineFactors], size: int) -> None:
        joint = int(self._joint)
        for factor in factors:
            weight = self._matrices[factor.weight]
            psi, phi = factor.cotangent, factor.features
            if psi.dtype != weight.dtype or phi.dtype != weight.dtype:
                psi, phi = psi.to(weight.dtype), phi.to(weight.dtype)
            if psi.dim() > 2 + joint:
                psi, phi = psi.flatten(1 + joint, -2), phi.flatten(1 + joint, -2)
                sizes = sample_sizes(psi, phi, factor.bias is not None)
                self.squares.add_(sizes.sum(-1, dtype=torch.float64), alpha=size**2)
                psi, phi = psi.flatten(joint, -2), phi.flatten(joint, -2)
            elif joint:
                sizes = row_sizes(psi, phi, factor.bias is not None)
                self.squares.add_(sizes, alpha=size**2)
            else:
                has_bias = factor.bias is not None
                self._all_squares.note(self._first, psi, phi, size, has_bias=has_bias)
            if self._moments is not None:
                self._add_moments(factor, psi, phi, size)
            if joint:
                weight.baddbmm_(psi.mT, phi, alpha=-size)
            else:
                weight.addmm_(psi.T, phi, alpha=-size)
            if factor.bias is not None:
                self._sums[factor.bias].sub_(psi.sum(-2), alpha=size)

    def add_batch(self, index: int, uses: Sequence[Use], size: int) -> list[Tensor]:
        """Take in one batch of one candidate as a whole, by differentiating its block alone.

        Args:
            index: Which of the blocks.
            uses: What each run of the module at its site brings.
            size: How many samples the batch had.

        Returns:
            What the block makes of x, at each use.
        """
        here = index if self._joint else ...
        ys = []
        whole: dict[str, Tensor] = {}
        for use in uses:
            x, delta = use.x.to(self._dtype), use.delta.to(self._dtype)
            y, multipliers = differentiated(self._blocks[index], x, delta, use.context)
            ys.append(y)
            whole = {name: whole[name] + m if whole else m for name, m in multipliers.items()}
        for name, value in whole.items():
            square = torch.linalg.vector_norm(value, dtype=torch.float64).square()
            self.squares[index].add_(square, alpha=size)
            self._sums[name][here].add_(value, alpha=size)
        self._batches[index] += 1
        return ys

    def _add_moments(self, factor: AffineFactors, psi: Tensor, phi: Tensor, size: int) -> None:
        """Add Σ φ̃φ̃ᵀ and Σ ψψᵀ over samples and positions, φ̃ = (φ, 1) where there is a bias."""
        assert self._moments is not None
        if factor.bias is not None:
            phi = torch.cat([phi, phi.new_ones(*phi.shape[:-1], 1)], -1)
        features, cotangents = phi.mT @ phi, psi.mT @ psi * size**2
        sums = self._moments.get(factor.weight)
        if sums is None:
            sums = _MomentSums(features, cotangents, factor.bias)
            self._moments[factor.weight] = sums
        else:
            sums.features.add_(features)
            sums.cotangents.add_(cotangents)
        sums.rows += phi.shape[-2]

    def counts(self) -> Counts:
        """How much was taken in."""
        moments = {
            name: (sums.bias, sums.features.shape, sums.cotangents.shape, sums.rows)
            for name, sums in (self._moments or {}).items()
        }
        return Counts(self._samples, list(self._batches), moments)

    def join(self, counts: Sequence[Counts]) -> list[Tensor]:
        """Count what several tallies have taken in, of which this is one.

        Args:
            counts: Of all of them.

        Returns:
            The sums, which the caller is to add up over the tallies, in place.
        """
        self._samples = sum(count.samples for count in counts)
        self._batches = [sum(each) for each in zip(*(c.batches for c in counts), strict=True)]
        moments: dict[str, _MomentSums] = {}
        like = next(iter(self._sums.values()))
        for name, (bias, features, cotangents, rows) in (
            item for count in counts for item in count.moments.items()
        ):
            if name not in moments:
                zeros = _MomentSums(like.new_zeros(features), like.new_zeros(cotangents), bias)
                moments[name] = replace((self._moments or {}).get(name, zeros), rows=0)
            moments[name].rows += rows
        self._moments = moments or self._moments
        sums = [tensor for m in moments.values() for tensor in (m.features, m.cotangents)]
        return [*self._sums.values(), *sums]

    def total(self, index: int) -> dict[str, Tensor]:
        """Σ n_b λ_b of one candidate as it stands, not a copy."""
        here = index if self._joint else ...
        return {name: total[here] for name, total in self._sums.items()}

    def means(self, num_samples: int, *, last: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """λ of all candidates, with a first dimension that counts them, and Σ λ² of each.

        With `last` the sums are no longer needed, and become the means in place.
        """
        count = len(self._blocks)
        means = {
            name: (total.div_(num_samples) if last else total / num_samples).view(
                count, *total.shape[self._joint :]
            )
            for name, total in self._sums.items()
        }
        rows = [_row_norm(m.view(count, -1), dim=1, dtype=torch.float64) for m in means.values()]
        squares = rows[0] if len(rows) == 1 else torch.linalg.vector_norm(torch.stack(rows), dim=0)
        return means, squares.square()

    def estimate(
        self, index: int, means: Mapping[str, Tensor], spread: float, num_samples: int
    ) -> Estimate:
        """What is known of one candidate.

        Args:
            index: Which of the blocks.
            means: From `means`.
            spread: Σ ‖·‖² over the units (samples or batches), less N‖λ‖².
            num_samples: N.
        """
        moments = self._moments or {}
        here = index if self._joint else None
        return Estimate(
            multiplier={name: mean[index] for name, mean in means.items()},
            variance=self._variance(spread, self._batches[index], num_samples),
            moments={name: sums.means(here, num_samples) for name, sums in moments.items()},
        )

    def _variance(self, spread: float, batches: int, num_samples: int) -> float:
        units = self._samples or batches
        mixed = self._samples > 0 and batches > 0
        return math.nan if mixed or units < 2 else max(spread, 0.0) / (units - 1) / num_samples


def row_sizes(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """Σ_n ‖ψ_n‖²(‖φ_n‖² + 1) over the samples, the 1 for the bias.

    Args:
        psi: Cotangents, shape (candidates, samples, out).
        phi: Features, shape (candidates, samples, in).
        has_bias: Whether a bias is pinned too.

    Returns:
        Shape (candidates,).
    """
    sizes = _squared_rows(phi)
    return torch.linalg.vecdot(_squared_rows(psi), sizes.add_(1.0) if has_bias else sizes)


def _squared_rows(tensor: Tensor) -> Tensor:
    """Σ_i t_ni² of each row n; for narrow rows as a product, which is twice as fast."""
    width = tensor.shape[-1]
    if width > 16:
        return _row_norm(tensor, dim=-1).square_()
    squares = tensor.square().reshape(-1, width)
    return torch.mv(squares, squares.new_ones(width)).view(tensor.shape[:-1])


def sample_sizes(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """‖λ_n‖² of samples with several positions, without forming λ_n where that is dearer.

    With T positions ‖λ_n‖² = Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), the 1 for the bias, or the square of
    the product itself where that is smaller.

    Args:
        psi: Cotangents, shape (..., samples, positions, out).
        phi: Features, shape (..., samples, positions, in).
        has_bias: Whether a bias is pinned too.

    Returns:
        Shape (..., samples).
    """
    positions, out, width = psi.shape[-2], psi.shape[-1], phi.shape[-1]
    if positions * (out + width) <= out * width:
        return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum((-2, -1))
    squares = (psi.mT @ phi).square().sum((-2, -1))
    return squares + psi.sum(-2).square().sum(-1) if has_bias else squares


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
