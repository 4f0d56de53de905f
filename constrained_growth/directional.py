"""The slope of the loss along a step of the pins, to the side of the step where there is a kink."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from constrained_growth._activations import derivative
from constrained_growth._arguments import instance
from constrained_growth._random_state import random_state, set_random_state
from constrained_growth._sites.collector import Collector, Use
from constrained_growth._sites.context import arguments
from constrained_growth._sites.model import call, checked_loss
from constrained_growth._sites.snapshot import deepcopied
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.protocol import called_with, check_deviations
from constrained_growth.curvature import mean_over
from constrained_growth.errors import CandidateError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Method


def directional_derivative(
    problem: GrowthProblem, candidate: str, step: Mapping[str, Tensor]
) -> float:
    """The limit of (L(θ, t s) − L(θ, 0))/t as t falls to 0, along a step s of a candidate's pins.

    At a ReLU identity layer that is not −⟨λ, s⟩: the units that are off stand at the kink, where
    autograd takes the derivative 0, and a step that would wake them counts for nothing in λ. Here
    every elementwise activation of the block is differentiated to the side to which the step
    moves what goes into it; so is what a block's `forward` computes with a kink at 0, such as
    `torch.relu`, `clamp(min=0)` or `abs`. For blocks without kinks at their pins both agree.

    The part of the model behind the site is differentiated by autograd: a kink right behind the
    site (a second ReLU without a layer between) is taken by its convention.

    Args:
        problem: The problem, left as it is.
        candidate: Name of one of its candidates.
        step: Pinned parameter → s, in its shape; a parameter that is not in it does not move.

    Returns:
        The slope; negative where the step lowers the loss.

    Raises:
        CandidateError: There is no such candidate, the step does not fit its pins, or the block
            has a kink elsewhere that no activation module makes.

    Source:
        Clarke, *Optimization and Nonsmooth Analysis*, 1983, for one-sided derivatives; forward
        mode: Griewank and Walther, *Evaluating Derivatives*, 2nd ed. 2008, sections 3.1 and 14.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> step = cg.solve(problem).multipliers["1"]
        >>> linear = -sum(float((v * v).sum()) for v in step.values())
        >>> directional_derivative(problem, "1", step) == linear
        False
    """
    instance("problem", problem, GrowthProblem, CandidateError, "a cg.GrowthProblem")
    site = next((s for s in problem.sites if candidate in list(s.blocks)), None)
    if site is None:
        names = tuple(c.name for c in problem.candidates)
        raise CandidateError(f"candidate={candidate!r} is none of the problem; they are {names}.")
    if problem.method is Method.IN_GRAPH:
        raise CandidateError(
            f"candidate={candidate!r}: the loss contains derivatives of the output, say, and one-"
            "sided slopes cannot be had. Without a kink at the pins the slope is −⟨λ, step⟩."
        )
    block = one_sided(site.blocks[candidate])
    if any(p.is_floating_point() and torch.finfo(p.dtype).bits < 32 for p in block.parameters()):
        block = block.float()  # or its rounding would hide on which side of a kink something is
    pins = {name: pin.detach() for name, pin in pinned_parameters(block).items()}
    instance("step", step, Mapping, CandidateError, "pinned parameter → tensor")
    check_deviations(block, step, "step", CandidateError)
    tangents = {
        n: step[n].to(pin) if n in step else torch.zeros_like(pin) for n, pin in pins.items()
    }
    zero = torch.zeros((), dtype=torch.float64, device=site.device)
    collector = Collector([site])

    def one(input: Any, target: Any) -> Tensor:
        slopes = [zero]

        def take(_: int, uses: list[Use], batch: object) -> None:
            slopes.extend(_slope(candidate, block, pins, tangents, use) for use in uses)

        with collector.watching():
            collector.begin(take)
            loss = checked_loss(problem.loss_fn(call(problem.model, input), target))
            collector.backward(loss)
        return torch.stack(slopes).sum()

    return float(mean_over(problem.data, problem, one))


def _slope(
    candidate: str,
    block: nn.Module,
    pins: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    use: Use,
) -> Tensor:
    """⟨δ, ∂b/∂v s⟩ of one use, in forward mode."""
    dtype = next(iter(pins.values())).dtype
    use = replace(use, x=use.x.to(dtype), delta=use.delta.to(dtype))
    zero = torch.zeros((), dtype=torch.float64, device=use.x.device)
    # a tiny part of the step lifts what is exactly 0 to its side, and moves nothing else
    state = random_state()
    slope = _pushed(block, pins, tangents, use, _TINY)
    if slope is None or not bool(slope.any()):
        return zero
    # as much as other numbers notice: near a kink elsewhere the derivative is another one then
    epsilon = 2**10 * torch.finfo(slope.dtype).eps
    share = epsilon * float(use.x.abs().max().clamp(min=1) / slope.abs().max())
    set_random_state(state)  # dropout in the block draws the same again
    there = _pushed(block, pins, tangents, use, share)
    weighted, other = use.delta * slope, use.delta * (zero if there is None else there)
    if float((weighted - other).abs().sum()) > _KINKED * float(weighted.abs().sum()):
        raise CandidateError(
            f'candidate="{candidate}": its {type(block).__name__} has a kink at its pins that is '
            "not at 0, and that no module of torch.nn makes; write it as one (nn.ReLU6(), say)."
        )
    return weighted.sum(dtype=torch.float64)


_TINY = 1e-30

_KINKED = 1e-3
"""The share of a slope that may change within rounding: single units may be near a kink."""


def _pushed(
    block: nn.Module,
    pins: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    use: Use,
    share: float,
) -> Tensor | None:
    """∂b/∂v s at a share of the step."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        # PyTorch itself scripts a few rules when forward mode is first used
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", DeprecationWarning)
        moving = {
            n: forward_ad.make_dual(pin + share * tangents[n], tangents[n])
            for n, pin in pins.items()
        }
        y = called_with(block, moving, *arguments(block, use.x, use.context))
        return forward_ad.unpack_dual(y).tangent


def one_sided(block: nn.Module) -> nn.Module:
    """A copy of a block whose activations have one-sided derivatives in forward mode.

    These are its attribute `activation`, if there is one, and PyTorch's activation modules in it.
    """
    copied = deepcopied(block).requires_grad_(False)  # forward mode needs no graph
    activation = getattr(copied, "activation", None)
    if callable(activation):
        if "activation" in copied._modules:
            del copied._modules["activation"]
        copied.activation = OneSided(activation)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child).__module__ == nn.ReLU.__module__ and not any(child.parameters()):
                setattr(module, name, OneSided(child))
    return copied


class OneSided(nn.Module):
    """An elementwise activation, in forward mode differentiated to the side of the tangent."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self._activation = [activation]  # in a list, not to be found among the modules

    def forward(self, x: Tensor) -> Tensor:
        """σ(x)."""
        result = _OneSided.apply(x, self._activation[0])
        assert isinstance(result, Tensor)
        return result


class _OneSided(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, activation: Any) -> Tensor:
        return activation(x.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        x, ctx.activation = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,), tangent = ctx.saved_tensors, tangents[0]
        return tangent * derivative(ctx.activation, _beside(x.detach(), tangent))


def _beside(x: Tensor, tangent: Tensor) -> Tensor:
    """The next number to the side of the tangent; at 0 the smallest that is never taken for 0."""
    far = torch.copysign(torch.full_like(x, torch.inf), tangent)
    next_ = torch.where(
        x == 0, torch.copysign(x.new_tensor(torch.finfo(x.dtype).tiny), tangent), x.nextafter(far)
    )
    return torch.where(tangent == 0, x, next_)
