"""The Frobenius norm of a multiplier from a few random numbers, without the multiplier itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.grouping import Site
from constrained_growth.blocks import AffineFactors, has_factors, pinned_parameters

RandomRows = Callable[[int, torch.dtype, torch.device], Tensor]
"""`(width, dtype, device)` → Ω of shape (k, width), with E[ΩᵀΩ] the identity."""


class Sketched(nn.Module):
    """A block whose pinned parameters may move in a random subspace only.

    For each affine map W φ + b of the block, with Ω (k, in) and ω (k,) random,

        W = W⁰ + VᵀΩ,  b = b⁰ + Vᵀω,  V (k, out) pinned at 0      ⇒      λ_V = Ω λ_Wᵀ + ω λ_bᵀ,

    and with entries ±1/√k of independent signs E‖λ_V‖² = ‖λ_W‖² + ‖λ_b‖². Its factors are
    ψ and Ωφ + ω: per sample 2k (in + out) operations instead of 2 in · out, and it is a block
    like any other, so that what sums up multipliers sums up sketches.

    Args:
        block: A block with `factors`, on the device and in the precision of its site.
        shape: Shape of the tensor at its site.
        rows: Draws (Ω, ω) for a given in + 1.

    Parameters:
        sketches.0 (k, out), one for each pinned affine map: pinned at 0.

    Source:
        Hutchinson (1990), whose estimator of the trace, here of λλᵀ, this is; Achlioptas (2003).
    """

    def __init__(self, block: nn.Module, shape: Sequence[int], rows: RandomRows) -> None:
        super().__init__()
        self.block: Any = block
        nothing = next(iter(pinned_parameters(block).values())).new_zeros(shape)
        with torch.no_grad():
            found = self.block.factors(nothing, nothing)  # of one map in several parts, maybe
            self._maps = list(dict.fromkeys((f.weight, f.bias) for f in found))
        self._rows: list[Tensor] = []
        self._shifts: list[Tensor | None] = []
        self.sketches = nn.ParameterList()
        for name, bias in self._maps:
            weight = block.get_parameter(name)
            width = weight[0].numel()
            drawn = rows(width + 1, weight.dtype, weight.device)
            self._rows.append(drawn[:, :width].contiguous())
            self._shifts.append(None if bias is None else drawn[:, width:].contiguous())
            self.sketches.append(drawn.new_zeros(len(drawn), len(weight)))
        self.pinned = tuple(f"sketches.{i}" for i in range(len(self._maps)))

    def forward(self, x: Tensor) -> Tensor:
        """What the block does with its parameters moved to V."""
        moved = {}
        for (weight, bias), rows, shift, v in zip(
            self._maps, self._rows, self._shifts, self.sketches, strict=True
        ):
            before = self.block.get_parameter(weight)
            moved[weight] = before + (v.T @ rows).view_as(before)
            if bias is not None and shift is not None:
                moved[bias] = self.block.get_parameter(bias) + (v.T @ shift).squeeze(1)
        return torch.func.functional_call(self.block, moved, (x,))

    def factors(self, x: Tensor, delta: Tensor) -> list[AffineFactors]:
        """Cotangent Ωφ + ω and features ψ, so that λ_V = −Σ (Ωφ + ω) ψᵀ."""
        return self._sketch(self.block.factors(x, delta))

    def joint_factors(
        self, blocks: Sequence[Sketched], x: Tensor, delta: Tensor
    ) -> list[AffineFactors]:
        """As `factors`; sketches of blocks of one kind share Ω."""
        return self._sketch(self.block.joint_factors([b.block for b in blocks], x, delta))

    def _sketch(self, factors: Iterable[AffineFactors]) -> list[AffineFactors]:
        drawn = zip(self.pinned, self._rows, self._shifts, strict=True)
        by_map = dict(zip(self._maps, drawn, strict=True))
        found = []
        for f in factors:
            name, rows, shift = by_map[f.weight, f.bias]
            projected = _projected(f.features, rows, shift)
            found.append(AffineFactors(name, None, projected, f.cotangent))
        return found


def _projected(phi: Tensor, rows: Tensor, shift: Tensor | None) -> Tensor:
    """Ωφ + ω, shape (..., in) to (..., k)."""
    flat = phi.reshape(-1, rows.shape[1]).T
    # in this order the thin product takes half the time or less, also with the copy after it
    found = rows @ flat if shift is None else torch.addmm(shift, rows, flat)
    return found.T.contiguous().view(*phi.shape[:-1], len(rows))


def sketched_sites(
    sites: Sequence[Site], size: int, generator: torch.Generator
) -> tuple[Site, ...]:
    """The sites with their blocks sketched, apart from those without `factors`.

    Args:
        sites: From `GrowthProblem`.
        size: k, how many random numbers stand for a row of λ.
        generator: Where Ω comes from; maps of one width share it.
    """
    drawn: dict[tuple[Any, ...], Tensor] = {}

    def rows(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = width, dtype, device
        if key not in drawn:
            signs = torch.randint(0, 2, (size, width), generator=generator) * 2 - 1
            drawn[key] = signs.to(device, dtype) / math.sqrt(size)
        return drawn[key]

    return tuple(
        replace(
            site,
            blocks={
                name: Sketched(block, site.shape, rows) if has_factors(block) else block
                for name, block in site.blocks.items()
            },
        )
        for site in sites
    )


def sketch_variance(multiplier: Mapping[str, Tensor]) -> float:
    """Variance of ‖λ_V‖ as an estimate of ‖λ‖, to first order, from the spread over the rows of V.

    The k rows give independent estimates k‖λ_V,j‖² of ‖λ‖², so that
    Var ‖λ_V‖² ≈ k s², s² the sample variance of ‖λ_V,j‖², and Var ‖λ_V‖ ≈ k s²/(4‖λ_V‖²).

    Args:
        multiplier: λ_V of one candidate, every tensor of shape (k, out).

    Returns:
        The variance; NaN for k = 1, which has no spread.
    """
    squares = torch.stack([v.square().sum(1, dtype=torch.float64) for v in multiplier.values()])
    each = squares.sum(0)
    if len(each) < 2:
        return math.nan
    whole = float(each.sum())
    return len(each) * float(each.var()) / (4 * whole) if whole > 0 else 0.0
