"""A block to try, and tools to try it with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import Context, arguments, takes_context
from constrained_growth.blocks import AffineFactors, pinned_parameters


@dataclass(frozen=True)
class Case:
    """A block to try on x; the context is what else the module at its site is called with."""

    block: nn.Module
    x: Tensor
    context: Context

    def fresh(self, *, training: bool = False) -> nn.Module:
        """A copy of the block in one of the modes, whose pins can be differentiated."""
        copied = copy.deepcopy(self.block).train(training)
        for parameter in pinned_parameters(copied).values():
            parameter.requires_grad_()
        return copied

    def call(self, block: nn.Module, x: Tensor | None = None) -> Tensor:
        """What a block makes of x, from the same random state each time."""
        args, kwargs = arguments(block, self.x if x is None else x, self.context)
        torch.manual_seed(0)
        return block(*args, **kwargs)


def mode(training: bool) -> str:
    """The mode in words."""
    return f"in {'train' if training else 'eval'} mode"


def has_context(case: Case) -> bool:
    """Whether the block is called with more than x, which other x would not fit."""
    return takes_context(case.block) and bool(case.context.args or case.context.kwargs)


def cotangent(case: Case) -> Tensor:
    """A random δ = ∂L/∂(tensor at the site), the same each time."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(case.x.shape, generator=generator, dtype=torch.float64)
    return drawn.to(case.x)


def autograd_multipliers(case: Case, block: nn.Module, delta: Tensor) -> dict[str, Tensor | None]:
    """−∂⟨δ, block(x)⟩ of the pinned parameters by autograd; None for one that does not enter."""
    pins = pinned_parameters(block)
    y = case.call(block)
    if not y.requires_grad:
        return dict.fromkeys(pins)
    grads = torch.autograd.grad(y, list(pins.values()), delta, allow_unused=True)
    return {n: None if g is None else -g for n, g in zip(pins, grads, strict=True)}


def or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    """The value, or zeros where there is none."""
    return torch.zeros_like(like) if value is None else value


def by_sample(factors: Sequence[AffineFactors], samples: int) -> Mapping[str, Tensor]:
    """Pinned parameter → λ_n of every sample, from factors that may come in parts."""
    found: dict[str, list[Tensor]] = {}
    for f in factors:
        psi = f.cotangent.reshape(len(f.cotangent), -1, f.cotangent.shape[-1])
        phi = f.features.reshape(len(f.features), -1, f.features.shape[-1])
        found.setdefault(f.weight, []).append(-psi.mT @ phi)
        if f.bias is not None:
            found.setdefault(f.bias, []).append(-psi.sum(1))
    rows = {name: torch.cat(parts) for name, parts in found.items()}
    wrong = [name for name, value in rows.items() if len(value) != samples]
    if wrong:
        raise ValueError(f"the factors of {wrong} are not of {samples} samples")
    return rows


def differ(found: Tensor, expected: Tensor) -> bool:
    """More than rounding may do."""
    if found.numel() == 0:
        return False
    scale = float(expected.abs().max()) or 1.0
    allowed = 1e4 * torch.finfo(expected.dtype).eps * scale
    return not float((found.to(expected) - expected).abs().max()) <= allowed


def perturbed(block: nn.Module, *, but: Mapping[str, Any] | None = None) -> nn.Module:
    """The block with its parameters moved at random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name not in (but or {}):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}"
