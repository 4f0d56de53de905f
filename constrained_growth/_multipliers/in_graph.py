"""λ with the blocks standing in the network, at their pins, while model and loss run.

Each block is called at its site as the inserted layer will be, its pinned parameters replaced by
leaves v at their pins, and autograd gives −∇_v L. That is right by construction, for every loss
that autograd can follow: also where the loss contains derivatives of the model's output
(physics-informed networks, forces, gradient penalties), to which a layer contributes by its
Jacobian, which (x, δ) do not show. It costs the passes through the blocks, and gives λ batch by
batch, not sample by sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from constrained_growth._multipliers.closed_form import at_pins
from constrained_growth._sites.collector import See, Use, collecting, transformed
from constrained_growth._sites.context import Context, detached
from constrained_growth._sites.site import Site
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.protocol import change


class Standing:
    """Blocks that stand at their sites, at most one at each.

    The loss is to be differentiated by the `leaves`, the v of each candidate; `moved` says by how
    much its block moved x at most, in units of rounding. With `keeps`, `uses` has what each block
    was called with, δ still to come, and what it made of that.
    """

    def __init__(self, sites: Sequence[Site], names: Sequence[str], *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._places = [(s, n) for s in sites for n in names if n in s.blocks]
        self.leaves = {
            name: {
                key: pin.detach().requires_grad_()
                for key, pin in pinned_parameters(site.blocks[name]).items()
            }
            for site, name in self._places
        }
        self.moved: dict[str, Tensor] = {}
        self.uses: dict[str, list[tuple[Use, Tensor]]] = {name: [] for name in self.leaves}

    def in_model(self) -> AbstractContextManager[None]:
        """Let the blocks stand; what backward runs again (checkpointing) finds them there too."""
        return collecting((s.after, s.module, s.output, self._layer(s, n)) for s, n in self._places)

    def _layer(self, site: Site, name: str) -> See:
        block, leaves = site.blocks[name], self.leaves[name]

        def layer(x: Tensor, context: Context) -> Tensor | None:
            if not torch.is_grad_enabled():  # a part without gradients, and the layer at its pins
                return None
            y = at_pins(block, leaves, x, context)
            if self._keeps and not transformed(x):
                self.uses[name].append((Use(x.detach(), x.detach(), detached(context)), y))
            if name in site.conditional and not transformed(x):
                here = change(x.detach(), y.detach().to(x.dtype)).double()
                self.moved[name] = here.maximum(self.moved.get(name, here))
            # what the model then writes to y would destroy what y's own backward pass needs
            return y.clone() if site.overwritten else y

        return layer


def rounds(sites: Sequence[Site]) -> list[list[str]]:
    """The candidates in as few lists as there are at most at one site, one of each in a list."""
    found = itertools.zip_longest(*(site.blocks for site in sites))
    return [[name for name in names if name is not None] for names in found]
