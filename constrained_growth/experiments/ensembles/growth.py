"""Multipliers of a layer at the sites of an ensemble, and its insertion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import CandidateError
from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Loss,
    Samples,
    apply,
    cross_entropy,
    forward,
    is_site,
    split,
)


@dataclass(frozen=True)
class NewLayer:
    """A layer to insert; `start`, its parameters at the pins, is (replicas or 1, parameters)."""

    block: nn.Module
    start: Tensor

    @classmethod
    def of(cls, *blocks: nn.Module) -> NewLayer:
        """Blocks of the library: one for all replicas, or one for each."""
        rows = [nn.utils.parameters_to_vector(b.parameters()).detach() for b in blocks]
        return cls(blocks[0], torch.stack(rows))


def multipliers(
    trained: Ensemble, data: Samples, layers: Sequence[NewLayer], loss: Loss = cross_entropy
) -> list[dict[str, Tensor]]:
    """λ = −∇_v L(θ, 0) of one layer for each site of every replica, in one pass.

    As in `solve`, the candidates are not built in: λ comes from the tensor x at the site and
    δ = ∂L/∂x. Returns for each site: pinned parameter → λ, shape (replicas, *its shape).
    """
    with torch.enable_grad():
        leaf = trained.parameters.detach().requires_grad_()
        output, sites = forward(trained.model, leaf, data.x)
        deltas = torch.autograd.grad(loss(output, data.y).sum(), sites)
    at_sites = zip(layers, sites, deltas, strict=True)
    return [_at_site(layer, x.detach(), delta) for layer, x, delta in at_sites]


def _at_site(layer: NewLayer, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    start = layer.start.to(x.dtype).expand(len(x), -1)
    with torch.enable_grad():
        leaves = [value.clone().requires_grad_() for value in split(layer.block, start)]
        output = apply(layer.block, leaves, x)
        found = torch.autograd.grad(output, leaves, delta, allow_unused=True)
    named = zip((name for name, _ in layer.block.named_parameters()), found, strict=True)
    pinned = pinned_parameters(layer.block)
    return {name: -value for name, value in named if name in pinned and value is not None}


def frobenius(found: Sequence[Tensor]) -> Tensor:
    """‖λ‖_F of one pinned parameter for every replica and site, shape (replicas, sites)."""
    return torch.stack([at.flatten(1).square().sum(1) for at in found], dim=1).sqrt()


def insert_layer(trained: Ensemble, site: int, layer: NewLayer) -> Ensemble:
    """Insert the layer into every replica after site 0, 1, …; outputs do not change.

    The optimizer's memory is kept; that of the new parameters is zero.

    Raises:
        CandidateError: There is no such site.
    """
    modules = list(trained.model)
    places = [i + 1 for i, module in enumerate(modules) if is_site(module)]
    if not 0 <= site < len(places):
        raise CandidateError(f"site={site} must be a number from 0 to {len(places) - 1}.")
    before, after = modules[: places[site]], modules[places[site] :]
    end = sum(p.numel() for module in before for p in module.parameters())
    start = layer.start.to(trained.parameters.dtype).expand(len(trained), -1)

    def with_new(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old[:, :end], new, old[:, end:]], dim=1)

    blank = torch.zeros_like(start)
    return replace(
        trained,
        model=nn.Sequential(*before, layer.block, *after),
        parameters=with_new(trained.parameters, start),
        memory={key: with_new(value, blank) for key, value in trained.memory.items()},
    )
