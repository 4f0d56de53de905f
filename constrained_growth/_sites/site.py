"""The central datum: one place in a model, and the blocks that could stand there."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from constrained_growth._sites.outputs import Which


@dataclass(frozen=True)
class Site:
    """One place in a model, with all the blocks that could stand there.

    Attributes:
        after: Qualified name of the module whose output is the site.
        module: That module. It may run several times in one forward pass; a layer there would
            too, and its multiplier is the sum over these uses.
        output: Which tensor of the module's output it is, as in `Candidate`.
        blocks: Candidate name → block, on the site's device and in its dtype and mode.
        conditional: The candidates whose blocks are the identity only on certain values, and so
            have to be tried on every batch.
        device: Where the tensor is.
        overwritten: Whether the model changes the tensor in place afterwards.
        needs_context: Whether a block takes what else the module was called with.
        around: Candidates that stand around the site, as the loss sees what is in its list.
        kinks: Candidate name → share of the units of the first batch at a kink of its activation.
    """

    after: str
    module: nn.Module
    output: Which
    blocks: Mapping[str, nn.Module]
    conditional: tuple[str, ...]
    device: torch.device
    overwritten: bool
    needs_context: bool
    around: Set[str] = frozenset()
    kinks: Mapping[str, float] = field(default_factory=dict)
