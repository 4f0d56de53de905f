"""Which way to λ is right, and is the layer the one that goes in? The first batch tells.

In the graph λ is right for every loss; in closed form, which is cheaper, it is where the loss sees
a layer through the value of its output alone. That the *loss* is the same with the blocks at
their pins as without is the check that no block moves it.

λ is that of a layer around its site. Where it goes in as the next element of a list, the model may
have an output more for it (hidden states, losses of routers), which the loss may read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size
from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._multipliers.fit import refuse_dead
from constrained_growth._multipliers.in_graph import Standing, rounds
from constrained_growth._multipliers.measure import Pass
from constrained_growth._sites.collector import Use
from constrained_growth._sites.model import (
    call,
    checked_loss,
    coarsest_epsilon,
    list_of,
)
from constrained_growth._sites.site import Site
from constrained_growth._sites.snapshot import deepcopied
from constrained_growth._sites.untouched import drawing_apart, untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.copied import listed_form
from constrained_growth.blocks.protocol import move_pins
from constrained_growth.bookkeeping import Books
from constrained_growth.errors import BlockError, CandidateError
from constrained_growth.solution import Method


@dataclass(frozen=True)
class FirstBatch:
    """The first batch, and what was seen when the model ran on it."""

    input: Any
    target: Any
    loss: float  # with the model watched
    uses: list[list[Use]]  # at each site those on which the loss depends
    seen: list[list[Use]]  # at each site all, without δ

    def loss_unwatched(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> float:
        """The loss of the model as it is, left as it is."""
        with untouched(model, loss_fn):
            return self.loss_of(model, loss_fn)

    def loss_of(
        self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], draw: int | None = None
    ) -> float:
        """The loss of the model as it is now; `draw` is a seed for other random numbers."""
        if draw is not None:
            torch.manual_seed(draw)
        return float(checked_loss(loss_fn(call(model, self.input), self.target)).detach())

    def is_same(self, loss: float, epsilon: float) -> bool:
        """Whether rounding at the sites, amplified by a deep model, explains the difference."""
        # to first order, an x that is off by ε of its size moves the loss by ε‖δ‖‖x‖; √ε leaves
        # room for the layers behind, and for a loss that is near zero itself
        slopes = [_norm(use.delta) * _norm(use.x) for here in self.uses for use in here]
        return abs(loss - self.loss) <= 10 * math.sqrt(epsilon) * max([abs(self.loss), *slopes])


def closed_form_holds(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    sites: Sequence[Site],
    first: FirstBatch,
) -> bool:
    """Whether λ of the first batch in closed form is what autograd gives through the blocks.

    Where that is zero, a block whose λ would be zero on any other batch is refused.
    """
    closed = Pass(model, loss_fn, sites, Method.CLOSED_FORM, gradients=False)
    in_graph = Pass(model, loss_fn, sites, Method.IN_GRAPH, gradients=False)
    closed.accumulate(first.uses, batch_size(first.input, first.target), 1.0)
    names = [name for site in sites for name in site.blocks]
    try:
        with untouched(model, loss_fn), in_graph.watching():
            loss = float(in_graph.add(first.input, first.target, 1.0))
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of a site
        raise
    except RuntimeError as error:  # the model alone has just been differentiated
        raise CandidateError(
            f"candidates={names}: with a layer at each of these sites the loss of the first batch "
            f"cannot be differentiated: {error}. Often the model changes in place what a layer "
            "there needs; choose another submodule, or change a copy."
        ) from error
    blocks = [block for site in sites for block in site.blocks.values()]
    epsilon = coarsest_epsilon(p for module in (model, *blocks) for p in module.parameters())
    if not first.is_same(loss, epsilon):
        # whose fault is it? the model itself may give another loss each time that it runs
        if first.is_same(first.loss_unwatched(model, loss_fn), epsilon):
            raise BlockError(
                f"candidates={names}: with their blocks standing at their pins the loss of the "
                f"first batch is {loss:.6g} instead of {first.loss:.6g}. One of them is not the "
                "identity as it is called there, or something else than the model reads the "
                "tensor at its site; make a problem with each alone to see which."
            )
        _refuse_dead(sites, first, ())
        return False  # the model is not a function of its input: nothing can be compared
    found, exact = closed.estimates(), in_graph.estimates()
    for site, uses in zip(sites, first.uses, strict=True):
        if not uses and in_graph.reached.isdisjoint(site.blocks):
            raise CandidateError(
                f'after="{site.after}": the loss does not depend on the output of this module, '
                "so no layer there could change it; choose another submodule."
            )
    alive = [n for n, e in exact.items() if any(bool(t.any()) for t in e.multiplier.values())]
    _refuse_dead(sites, first, alive)
    return all(
        _agree(found[name], exact[name], uses, epsilon)
        for site, uses in zip(sites, first.uses, strict=True)
        for name in site.blocks
    )


def _refuse_dead(sites: Sequence[Site], first: FirstBatch, alive: Collection[str]) -> None:
    """Refuse blocks, but for the ones `alive`, whose λ is zero whatever is at their sites."""
    for site, seen in zip(sites, first.seen, strict=True):
        for name in (name for name in site.blocks if name not in alive):
            for use in seen:
                refuse_dead(name, site.blocks[name], use.x, use.context)


def other_networks(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    sites: Sequence[Site],
    first: FirstBatch,
    books: Books,
    listed: Mapping[str, bool],
) -> set[str]:
    """The `listed` candidates that have another loss as next elements of their lists.

    The pins are moved, as what the loss reads by its number may have the same value at them. Those
    of lists that are counted, where they have to stand, are refused.
    """
    places = {name: site for site in sites for name in site.blocks if name in listed}

    def losses(names: Sequence[str], draw: int | None) -> tuple[float, float, str, bool]:
        """Around the sites and in the lists, what failed there, and whether both drew alike."""
        blocks = {name: _with_own_pins(places[name].blocks[name]) for name in names}
        around = [replace(places[name], blocks={name: block}) for name, block in blocks.items()]
        with untouched(model, loss_fn), Standing(around, names).in_model():
            expected = first.loss_of(model, loss_fn, draw)
            drawn = torch.get_rng_state()
        layers = {name: listed_form(block) for name, block in blocks.items()}
        try:
            with untouched(model, loss_fn), drawing_apart(layers.values()):
                for name, layer in layers.items():
                    elements: Any = list_of(model, places[name].module)
                    elements.insert([*elements].index(places[name].module) + 1, layer)
                books.update()
                loss = first.loss_of(model, loss_fn, draw)
                return expected, loss, "", torch.equal(drawn, torch.get_rng_state())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return expected, math.nan, f"{type(error).__name__}: {error}", True

    def fault(*names: str) -> str:
        # who draws a number for each element may leave some out, but not in each run
        for draw in (None, *range(_DRAWS)):
            expected, loss, error, alike = losses(names, draw)
            # the operations are the same: rounding differs at most where a cache changes strides
            allowed = min(4 * coarsest_epsilon(model.parameters()), 0.01) * abs(expected)
            same = abs(loss - expected) <= allowed or not (error or math.isfinite(expected))
            if not same:
                return error or f"a loss of {loss:.9g} instead of {expected:.9g}"
            if alike:
                break
        return ""

    # one at each place at a time; what a loss reads of a layer may be another thing for each block
    together = [[name for name in names if name in places] for names in rounds(sites)]
    # a mean over the list may be the same with a copy of each
    suspects = [n for names in together if any(fault(*s) for s in _parts(names)) for n in names]
    faults = {name: why for name in suspects if (why := fault(name))}
    counted = [name for name in faults if listed[name]]
    if counted:
        raise CandidateError(
            f"candidates={counted}: as the next element of its list a layer there makes "
            f"another network than the one λ is for ({faults[counted[0]]}, with its pins "
            "moved). The loss may read something of each layer (hidden states, a loss of "
            "routers). Choose other sites, let the loss read the entries it needs, or ask for "
            "Candidate(wrapped=True): a layer around its site, which its class could not load."
        )
    return set(faults)


_DRAWS = 8


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    return [part for part in (names, names[1::2]) if part]


def _with_own_pins(block: nn.Module) -> nn.Module:
    """A copy with its pins moved and buffers of its own, but the block's other parameters."""
    pins = {id(pin) for pin in pinned_parameters(block).values()}
    block = deepcopied(block, {id(p): p for p in block.parameters() if id(p) not in pins})
    move_pins(block)
    return block


def _agree(found: Estimate, exact: Estimate, uses: Sequence[Use], epsilon: float) -> bool:
    """Whether two multipliers are the same up to rounding.

    Both rest on a δ that was rounded, and their sums are in different orders, which costs ε of
    the summands. A difference that is larger by chance makes λ dearer, not wrong.
    """
    summands = sum(_norm(u.delta) * (_norm(u.x) + math.sqrt(u.x.numel())) for u in uses)
    pairs = [(found.multiplier[key], value) for key, value in exact.multiplier.items()]
    difference = math.hypot(*(_norm(one - other) for one, other in pairs))
    size = math.hypot(*(_norm(other) for _, other in pairs))
    # "not >", so that NaN counts as agreement: the status of the solution reports it
    return not difference > math.sqrt(epsilon) / 3 * size + 3 * epsilon * summands


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
