"""Multipliers of a layer at the sites of an ensemble, and its insertion, replica by replica."""

from __future__ import annotations

import itertools
import math
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
    Stack,
    cross_entropy,
    forward,
    parts,
)
from constrained_growth.experiments.ensembles.stages import Stage, stage_of


@dataclass(frozen=True)
class NewLayer:
    """A layer to insert; `start`, its parameters at the pins, is (replicas or 1, parameters).

    `names` are those of the parameters in the plain block, `pinned` the pinned ones among them.
    """

    stage: Stage
    start: Tensor
    names: tuple[str, ...]
    pinned: tuple[str, ...]


def new_layer(blocks: nn.Module | Sequence[nn.Module], after: Stage | None = None) -> NewLayer:
    """A block of the library as a layer to insert: the same for all replicas, or one for each."""
    each = [blocks] if isinstance(blocks, nn.Module) else list(blocks)
    return NewLayer(
        stage_of(each[0], after),
        torch.stack([nn.utils.parameters_to_vector(b.parameters()).detach() for b in each]),
        tuple(name for name, _ in each[0].named_parameters()),
        tuple(pinned_parameters(each[0])),
    )


def multipliers(
    trained: Ensemble,
    data: Samples,
    layer: NewLayer,
    loss: Loss = cross_entropy,
    *,
    sites: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """λ = −∇_v L(θ, 0) of a layer at the sites of every replica, in one pass.

    As in `solve`, the candidates are not built in: λ comes from the tensor x at the site and
    δ = ∂L/∂x. Site k is the output of hidden stage k = 0, 1, …; by default all sites are measured.
    Returns for each of them: pinned parameter → λ, shape (replicas, *its shape).
    """
    at = range(len(trained.stack.stages)) if sites is None else sites
    _check_width(trained.stack, layer, at)
    with torch.enable_grad():
        leaf = trained.parameters.detach().requires_grad_()
        output, there = forward(trained.stack, leaf, data.x)
        tensors = [there[k] for k in at]
        deltas = torch.autograd.grad(loss(output, data.y).sum(), tensors)
    return [_at_site(layer, x.detach(), d) for x, d in zip(tensors, deltas, strict=True)]


def frobenius(found: Sequence[Tensor]) -> Tensor:
    """‖λ‖_F of one pinned parameter for every replica and site, shape (replicas, sites)."""
    return torch.stack([at.flatten(1).square().sum(1) for at in found], dim=1).sqrt()


def insert_layer(trained: Ensemble, sites: Tensor | Sequence[int], layer: NewLayer) -> Ensemble:
    """Insert the layer into every replica at its own site, `sites` of shape (replicas,).

    Outputs do not change. The optimizer's memory is kept; that of the new parameters is zero.

    Raises:
        CandidateError: There is no such site, the widths differ, or the replicas would no longer
            be of one architecture. Then insert into `trained.take(…)`, site by site.
    """
    places, stages = torch.as_tensor(sites), trained.stack.stages
    distinct = sorted(set(places.tolist()))
    if places.shape != (len(trained),) or distinct[0] < 0 or distinct[-1] >= len(stages):
        raise CandidateError(
            f"sites must be one number from 0 to {len(stages) - 1} for each of the "
            f"{len(trained)} replicas; got shape {tuple(places.shape)}, values {distinct}."
        )
    _check_width(trained.stack, layer, distinct)
    grown = [
        replace(trained.stack, stages=(*stages[: k + 1], layer.stage, *stages[k + 1 :]))
        for k in distinct
    ]
    if len({repr(stack) for stack in grown}) > 1:  # an activation shows its settings in its repr
        raise CandidateError(
            f"inserting at sites {distinct} gives different architectures; insert into "
            "take(…) of the replicas, one site at a time."
        )
    ends = list(itertools.accumulate(sum(map(math.prod, s)) for s in trained.stack.shapes))
    count, added = trained.parameters.shape[1], layer.start.shape[1]
    columns = torch.empty(len(stages), count + added, dtype=torch.long)
    for k in distinct:
        old, new = torch.arange(count), torch.arange(count, count + added)
        columns[k] = torch.cat([old[: ends[k]], new, old[ends[k] :]])
    index, start = columns[places], layer.start.to(trained.parameters.dtype)
    fresh = start.expand(len(trained), -1)
    return replace(
        trained,
        stack=grown[0],
        parameters=torch.cat([trained.parameters, fresh], 1).gather(1, index),
        memory={
            key: torch.cat([value, torch.zeros_like(fresh)], 1).gather(1, index)
            for key, value in trained.memory.items()
        },
    )


def _at_site(layer: NewLayer, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    shapes = layer.stage.shapes(x.shape[1])
    start = layer.start.to(x.dtype).expand(len(x), -1)
    with torch.enable_grad():
        (values,) = parts(start, (shapes,))
        leaves = [value.clone().requires_grad_() for value in values]
        found = torch.autograd.grad(layer.stage(leaves, x), leaves, delta, allow_unused=True)
    return {
        name: -value
        for name, value in zip(layer.names, found, strict=True)
        if name in layer.pinned and value is not None
    }


def _check_width(stack: Stack, layer: NewLayer, sites: Sequence[int]) -> None:
    widths = sorted({stack.stages[k].width for k in sites})
    if widths != [layer.stage.width]:
        raise CandidateError(
            f"layer has width {layer.stage.width}, the sites have {widths}; insert into take(…) "
            "of the replicas, one width at a time."
        )
