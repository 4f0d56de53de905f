"""A block to try, and how checks of blocks and rules are run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import Context, arguments, takes_context
from constrained_growth.blocks import AffineFactors, pinned_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """A block to try on x; the context is what else the module at its site is called with."""

    block: nn.Module
    x: Tensor
    context: Context

    @property
    def other_x_fits(self) -> bool:
        """Whether the context, if there is any, leaves x free."""
        return not (takes_context(self.block) and (self.context.args or self.context.kwargs))

    def fresh(self, *, training: bool = False) -> nn.Module:
        """A copy of the block in one of the modes, with differentiable pins."""
        copied = copy.deepcopy(self.block).train(training)
        for parameter in pinned_parameters(copied).values():
            parameter.requires_grad_()
        return copied

    def perturbed(self) -> nn.Module:
        """A copy of the block with its parameters moved at random."""
        block = self.fresh()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return block

    def call(self, block: nn.Module, x: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """The block's output for x."""
        args, kwargs = arguments(block, self.x if x is None else x, self.context)
        torch.manual_seed(seed)
        return block(*args, **kwargs)

    def cotangent(self) -> Tensor:
        """A random δ = ∂L/∂(tensor at the site), always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.x.shape, generator=generator, dtype=torch.float64).to(self.x)

    def multipliers(
        self, block: nn.Module, delta: Tensor, *, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """−∂⟨δ, block(x)⟩ by autograd; None for a pinned parameter that does not enter."""
        pins = pinned_parameters(block)
        y = self.call(block, seed=seed)
        if not y.requires_grad:
            return dict.fromkeys(pins)
        grads = torch.autograd.grad(y, list(pins.values()), delta, allow_unused=True)
        return {n: None if g is None else -g for n, g in zip(pins, grads, strict=True)}


def by_sample(factors: Collection[AffineFactors], samples: int) -> dict[str, Tensor]:
    """Pinned parameter → λ_n of every sample; the factors may come in parts."""
    found: dict[str, list[Tensor]] = {}
    for f in factors:
        weight = torch.einsum("n...o,n...i->noi", f.cotangent, f.features)
        found.setdefault(f.weight, []).append(-weight)
        if f.bias is not None:
            found.setdefault(f.bias, []).append(-torch.einsum("n...o->no", f.cotangent))
    rows = {name: torch.cat(parts) for name, parts in found.items()}
    wrong = [name for name, value in rows.items() if len(value) != samples]
    if wrong:
        raise ValueError(f"the factors of {wrong} are not of {samples} samples")
    return rows


def differ(found: Tensor, expected: Tensor | None) -> bool:
    """Whether they differ by more than rounding may do; None stands for zeros."""
    if found.numel() == 0:
        return False
    expected = torch.zeros_like(found) if expected is None else expected
    tolerance = 1e4 * torch.finfo(expected.dtype).eps * (float(expected.abs().max()) or 1.0)
    return not float((found.to(expected) - expected).abs().max()) <= tolerance


def tried(
    check: Callable[[T], Iterator[str]],
    case: T,
    shown: str = "",
    clear: tuple[type[Exception], ...] = (),
) -> Iterator[str]:
    """What a check finds; an error inside it is a finding too, a clear one in its own words."""
    try:
        yield from check(case)
    except clear as error:
        yield str(error)
    except Exception as error:
        what = (check.__doc__ or "").rstrip(".")
        yield f"it fails where this is tried: {what}{shown} ({said(error)})."


def listed(problems: Collection[str]) -> str:
    """One line each, without repetitions."""
    return "".join(f"\n  * {problem}" for problem in dict.fromkeys(problems))


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"
