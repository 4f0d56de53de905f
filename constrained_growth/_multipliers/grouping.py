"""The sites of a problem, and which of their candidates are worked off together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.tallies import Squares, Tally
from constrained_growth._sites.outputs import Which
from constrained_growth.blocks import has_factors


@dataclass(frozen=True)
class Site:
    """One place in the model, with all the blocks that could stand there.

    Attributes:
        after: Qualified name of the module whose output is the site.
        module: That module.
        blocks: Candidate name → block, on the site's device and dtype.
        unsure: The candidates whose blocks have to be tried on every batch, since they are the
            identity only on certain values.
        kinds: Candidate name → what its block has in common with those that can be worked off
            together with it, or None for one that is worked off alone.
        shape: Shape of the tensor there on the first batch.
        device: Where it is.
        bytes: Its size on the first batch.
        pinned_bytes: Size of the pinned parameters of all its blocks.
        overwritten: Whether the model changes the tensor in place afterwards.
        copied: Whether the model has to go on with a copy of it while it is watched: it is
            overwritten, or the module gives on a tensor that came from elsewhere.
        anchor: Whether backward has to be asked for δ here; at the other sites it passes anyway
            on its way to the anchors.
        output: Which tensor of the module's output it is, as in `Candidate`.
        shared: Whether the module runs several times in one forward pass; a layer there would
            too, and its multiplier is the sum over its uses.
        context: Whether there is a block that takes the context.
    """

    after: str
    module: nn.Module
    blocks: Mapping[str, nn.Module]
    unsure: tuple[str, ...]
    kinds: Mapping[str, Hashable]
    shape: tuple[int, ...]
    device: torch.device
    bytes: int
    pinned_bytes: int
    overwritten: bool
    copied: bool
    anchor: bool
    output: Which
    shared: bool
    context: bool


@dataclass(frozen=True)
class Member:
    """Where a candidate is summed up: which tally, and which of its blocks."""

    name: str
    site: int
    tally: Tally
    index: int
    closed: bool


STROKE = 2**18
"""Bytes of (x, δ) of one batch that are worked off in one stroke: they should stay in the cache."""


def stacked(tensors: list[Tensor], count: int) -> Tensor:
    """Batches of one site as (samples, ...), of several as (sites, samples, ...)."""
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole if count == 1 else whole.view(count, -1, *whole.shape[1:])


def grouped(
    sites: Sequence[Site],
    squares: dict[torch.device, Squares],
    *,
    joint: bool,
    moments: bool,
) -> list[list[Member]]:
    """The candidates, those together that can be worked off in one stroke; fills in `squares`."""
    gathered: dict[Hashable, list[tuple[str, int, nn.Module]]] = {}
    found: Counter[Hashable] = Counter()
    for index, site in enumerate(sites):
        together = joint and all(has_factors(block) for block in site.blocks.values())
        most = max(1, STROKE // (2 * max(site.bytes, 1)))
        for name, block in site.blocks.items():
            key: Hashable = name
            kind = site.kinds[name]
            if together and most > 1 and kind is not None:
                key = (kind, found[kind] // most)
                found[kind] += 1
            gathered.setdefault(key, []).append((name, index, block))
    devices = Counter(site.device for site in sites for _ in site.blocks)
    squares.update({device: Squares(count, device) for device, count in devices.items()})
    places = Counter[torch.device]()
    groups = []
    for members in gathered.values():
        blocks = [block for _, _, block in members]
        device = sites[members[0][1]].device
        tally = Tally(blocks, squares[device], places[device], moments=moments)
        places[device] += len(blocks)
        groups.append(
            [
                Member(name, site, tally, index, has_factors(block))
                for index, (name, site, block) in enumerate(members)
            ]
        )
    return groups
