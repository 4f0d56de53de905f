"""The first batch with layers put into the model, as `insert` would put them, for a while."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._random_state import seed, set_random_state
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.collector import Use
from constrained_growth._sites.model import call, coarsest_epsilon, loss_of, unchangeable
from constrained_growth._sites.placement import place, placement_around, undoing
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import drawing_apart, full_precision, untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.copied import listed_form
from constrained_growth.bookkeeping import Books

Multipliers = Mapping[str, Mapping[str, Tensor]]
"""Candidate → pin → λ of the first batch."""


@dataclass(frozen=True)
class FirstBatch:
    """The first batch, and what was seen when the model ran on it."""

    input: Any
    target: Any
    loss: float  # with the model watched
    random: Any  # the random state before
    drawn: Tensor  # that of PyTorch afterwards
    uses: list[list[Use]]  # at each site those on which the loss depends
    seen: list[list[Use]]  # at each site all, without δ
    nodes: int  # that autograd made in its forward pass

    def loss_unwatched(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> float:
        """The loss of the model as it is, left as it is."""
        with self.again(model, loss_fn):
            return float(loss_of(loss_fn, call(model, self.input), self.target).detach())

    @contextmanager
    def again(self, *roots: Any, draw: int | None = None) -> Iterator[None]:
        """Run it again from the same random state, or from a seed, and leave all as it was."""
        with untouched(*roots):
            if draw is None:
                set_random_state(self.random)
            else:
                seed(draw)
            yield

    def is_same(self, loss: float, epsilon: float) -> bool:
        """Whether rounding at the sites, amplified by a deep model, explains the difference."""
        # to first order, an x that is off by ε of its size moves the loss by ε‖δ‖‖x‖; √ε leaves
        # room for the layers behind, and for a loss that is near zero itself
        slopes = [norm_of(use.delta) * norm_of(use.x) for here in self.uses for use in here]
        return abs(loss - self.loss) <= 10 * math.sqrt(epsilon) * max([abs(self.loss), *slopes])


@dataclass(frozen=True)
class Grown:
    """The first batch with some layers put in.

    λ, if asked for, has pins on which the loss depends. `drawn` is the random state afterwards;
    `error` says why the model fails, if it does.
    """

    loss: float
    multipliers: Multipliers
    drawn: Tensor | None
    error: str = ""


@dataclass(frozen=True)
class FirstLook:
    """What is looked at; the `listed` candidates could be next elements of their lists."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    first: FirstBatch
    sites: Sequence[Site]
    books: Books
    listed: Mapping[str, bool]

    @functools.cached_property
    def site_of(self) -> dict[str, Site]:
        """The site of each candidate."""
        return {name: site for site in self.sites for name in site.blocks}

    @functools.cached_property
    def epsilon(self) -> float:
        """The coarsest machine precision of the model and the blocks."""
        blocks = [site.blocks[name] for name, site in self.site_of.items()]
        return coarsest_epsilon(p for module in (self.model, *blocks) for p in module.parameters())

    @property
    def can_grow(self) -> bool:
        """Whether layers can be put in for a while."""
        return not (is_sharded(self.model) or unchangeable(self.model))

    def grown(
        self,
        names: Collection[str],
        elements: Collection[str],
        draw: int | None = None,
        *,
        derivatives: bool = True,
    ) -> Grown:
        """Put layers in, the `elements` into their lists and the others around their sites."""
        forms = {
            name: listed_form(block) if name in elements else (block, pinned_parameters(block))
            for name in names
            for block in [self.site_of[name].blocks[name]]
        }
        model, layers = self.model, [layer for layer, _ in forms.values()]
        pins = [pin for _, some in forms.values() for pin in some.values()]
        ends: dict[nn.Module, nn.Module] = {}  # site → the last module there so far
        with ExitStack() as stack:
            stack.enter_context(self.first.again(model, self.loss_fn, *layers, draw=draw))
            stack.enter_context(undoing([model], always=True))
            stack.enter_context(drawing_apart(layers))
            for name in sorted(names, key=lambda name: self.site_of[name].after.count(".")):
                site, layer = self.site_of[name], forms[name][0]
                end = ends.get(site.module, site.module)
                form = "sibling" if name in elements else placement_around(model, end, layer)
                ends[site.module] = place(model, end, layer, form, site.output, site.overwritten)
            try:
                if elements:
                    self.books.update()
                for pin in pins:
                    pin.requires_grad_()
                loss = loss_of(self.loss_fn, call(model, self.first.input), self.first.target)
                drawn = torch.get_rng_state()
                if not derivatives:
                    return Grown(float(loss.detach()), {}, drawn)
                grads: Sequence[Tensor | None] = [None] * len(pins)
                if loss.requires_grad:
                    with full_precision(*{site.device for site in self.sites}):
                        grads = torch.autograd.grad(loss, pins, allow_unused=True)
            except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of a layer
                raise
            except Exception as error:
                return Grown(math.nan, {}, None, f"{type(error).__name__}: {error}")
        found = iter(grads)
        multipliers = {
            name: {key: -grad for key, grad in zip(some, found, strict=False) if grad is not None}
            for name, (_, some) in forms.items()
        }
        return Grown(float(loss.detach()), multipliers, drawn)

    def agree(
        self,
        name: str,
        found: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        *,
        both_in_graph: bool = True,
    ) -> bool:
        """Whether two multipliers are the same up to rounding; one may lack pins, where it is 0.

        Both rest on a δ that was rounded, and their sums may be in different orders, which costs ε
        of the summands; by autograd both are of the same operations. A difference to the closed
        form that is larger by chance makes λ dearer, not wrong.
        """
        uses = self.first.uses[self.sites.index(self.site_of[name])]
        summands = sum(norm_of(u.delta) * (norm_of(u.x) + math.sqrt(u.x.numel())) for u in uses)
        differences = [
            norm_of(found[key] - exact[key] if key in found and key in exact else value)
            for key, value in {**found, **exact}.items()
        ]
        size = math.hypot(*(norm_of(value) for value in exact.values()))
        # "not >", so that NaN counts as agreement: the status of the solution reports it
        relative = self.epsilon**0.75 if both_in_graph else math.sqrt(self.epsilon) / 3
        allowed = relative * size + 3 * self.epsilon * summands
        return not math.hypot(*differences) > allowed

    def alike(self, one: Grown, other: Grown) -> bool:
        """Whether both have drawn the same random numbers."""
        a, b = one.drawn, other.drawn
        return a is not None and b is not None and torch.equal(a, b)

    def agrees(self, grown: Grown, exact: Multipliers, *, both_in_graph: bool = True) -> bool:
        """Whether the layers that were put in have these multipliers."""
        return not grown.error and all(
            self.agree(name, found, exact[name], both_in_graph=both_in_graph)
            for name, found in grown.multipliers.items()
        )

    def same_loss(self, one: Grown, other: Grown) -> bool:
        """Whether two networks of the same operations have the same loss."""
        # rounding differs at most where a cache changes strides
        allowed = min(4 * coarsest_epsilon(self.model.parameters()), 0.01) * abs(other.loss)
        return abs(one.loss - other.loss) <= allowed or not math.isfinite(other.loss)


def norm_of(tensor: Tensor) -> float:
    """‖t‖₂, in double precision."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
