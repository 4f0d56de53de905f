"""Which way to λ is right, and is it the λ of the layer that goes in? The first batch tells.

λ has to be the derivative of the network that `insert` makes. So for the first batch the layers are
really put in, where `insert` would put them, and the loss is differentiated by their pins. What λ
in closed form says is held against that. Where they differ, the blocks are let stand at their
sites by hooks, and that tells the reasons apart:

* λ in the graph is that of the layers put in: the loss has derivatives of the output in it.
* Next elements of lists make other networks: the model has an output more for each (hidden states,
  losses of routers), which the loss reads. Then they stand around their sites.
* Layers around their sites do not have λ in the graph: someone runs the module at a site without
  having got it from the model, or the loss reads the parameters that there are. Refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size
from constrained_growth._multipliers.fit import refuse_dead
from constrained_growth._multipliers.grown import (
    FirstBatch,
    FirstLook,
    Grown,
    Multipliers,
    norm_of,
)
from constrained_growth._multipliers.in_graph import rounds
from constrained_growth._multipliers.measure import Pass
from constrained_growth._sites.site import Site
from constrained_growth.bookkeeping import Books
from constrained_growth.errors import BlockError, CandidateError
from constrained_growth.solution import Method


def settle(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    sites: Sequence[Site],
    first: FirstBatch,
    books: Books,
    listed: Mapping[str, bool],
    *,
    later: bool = False,
) -> tuple[bool, set[str]]:
    """Whether λ in closed form is right, and which candidates have to stand around their sites.

    The `listed` ones could be the next elements of lists, which the books may count. On a `later`
    batch λ may be zero.

    Raises:
        CandidateError: A layer put in has another λ, or a counted list would be another network.
        BlockError: A block moves the loss, or its λ would be zero on any batch.
    """
    look = FirstLook(model, loss_fn, first, sites, books, listed)
    closed = Pass(model, loss_fn, sites, Method.CLOSED_FORM, gradients=False)
    with first.again(model):  # blocks may draw, as the layers that are put in do
        closed.accumulate(first.uses, batch_size(first.input, first.target), 1.0)
    found = {name: estimate.multiplier for name, estimate in closed.estimates().items()}

    def judge(exact: Multipliers) -> None:
        if not later:
            _refuse_dead(sites, first, exact)

    # all sites are passed, or in the graph it is seen whether the loss depends on them
    inserted = _as_inserted(look, found) if look.can_grow and all(first.uses) else None
    if inserted is not None:
        judge(inserted)
        return True, set()
    exact = _in_graph(look, later=later)
    if exact is None:  # the model is not a function of its input: nothing can be compared
        judge({})
        return False, set()
    judge(exact)
    around = _around(look, exact) if look.can_grow else set()
    pairs = ((name, found[name], value) for name, value in exact.items())
    return all(look.agree(*each, both_in_graph=False) for each in pairs), around


def _as_inserted(look: FirstLook, found: Multipliers) -> Multipliers | None:
    """λ of the layers that are put in, if it is `found` and nothing else is to be said."""
    inserted: dict[str, Mapping[str, Tensor]] = {}
    expected = Grown(look.first.loss, found, look.first.drawn)
    for names in rounds(look.sites):
        elements = [name for name in names if name in look.listed]
        for part in _parts(names, elements):
            # the loss alone tells that it is made of each element, which the copies of all hide
            grown = look.grown(part, {*part} & {*elements}, derivatives=part is names)
            if elements:  # what copies compute at their pins is the same to the last bit
                same = look.same_loss(grown, expected) and look.alike(grown, expected)
            else:
                same = look.first.is_same(grown.loss, look.epsilon)
            if not same or not look.agrees(grown, found, both_in_graph=False):
                return None
            inserted |= grown.multipliers if part is names else {}
    return inserted


def _in_graph(look: FirstLook, *, later: bool) -> Multipliers | None:
    """λ with the blocks standing at their sites; None where the model gives another loss each time.

    Raises:
        BlockError: The blocks change the loss.
        CandidateError: The loss has no gradient, or, on the first batch, depends not on all sites.
    """
    model, loss_fn, first = look.model, look.loss_fn, look.first
    in_graph = Pass(model, loss_fn, look.sites, Method.IN_GRAPH, gradients=False)
    names = [*look.site_of]
    try:
        with first.again(model, loss_fn), in_graph.watching():
            loss = float(in_graph.add(first.input, first.target, 1.0))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the model alone has just been differentiated
        raise CandidateError(
            f"candidates={names}: with a layer at each of these sites the loss of the first batch "
            f"cannot be differentiated: {error}. Often the model changes in place what a layer "
            "there needs; choose another submodule, or change a copy."
        ) from error
    if not first.is_same(loss, look.epsilon):
        # whose fault is it? the model itself may give another loss each time that it runs
        if not first.is_same(first.loss_unwatched(model, loss_fn), look.epsilon):
            return None
        raise BlockError(
            f"candidates={names}: with their blocks standing at their pins the loss of the "
            f"first batch is {loss:.6g} instead of {first.loss:.6g}. One of them is not the "
            "identity as it is called there, or something else than the model reads the "
            "tensor at its site; make a problem with each alone to see which."
        )
    for site, uses in zip(look.sites, first.uses, strict=True):
        if not (uses or later) and in_graph.reached.isdisjoint(site.blocks):
            raise CandidateError(
                f'after="{site.after}": the loss does not depend on the output of this module, '
                "so no layer there could change it; choose another submodule."
            )
    return {name: estimate.multiplier for name, estimate in in_graph.estimates().items()}


def _around(look: FirstLook, exact: Multipliers) -> set[str]:
    """The `listed` candidates that make another network as next elements of their lists.

    Refused are layers that have another λ than the exact one, and those of lists that are counted,
    where they have to stand.
    """
    suspects: list[str] = []
    around: list[str] = []
    for names in rounds(look.sites):
        elements = [name for name in names if name in look.listed]
        around += [name for name in names if name not in elements]
        for part in _parts(elements, elements):
            if _fault(look, part, exact):
                suspects += elements
                break
    faults = {name: why for name in suspects if (why := _fault(look, [name], exact))}
    counted = [name for name in faults if look.listed[name]]
    if counted:
        raise CandidateError(
            f"candidates={counted}: as the next element of its list a layer there makes "
            f"another network than the one λ is for ({faults[counted[0]]}). The loss may read "
            "something of each layer (hidden states, a loss of routers). Choose other sites, let "
            "the loss read the entries it needs, or ask for Candidate(wrapped=True): a layer "
            "around its site, which its class could not load."
        )
    for names in rounds(look.sites):
        _refuse_others(look, [name for name in names if name in faults or name in around], exact)
    return set(faults)


def _fault(look: FirstLook, names: Sequence[str], exact: Multipliers) -> str:
    """What is different with candidates in their lists, not around their sites; "" if nothing."""
    # who draws a number for each element may leave some out, but not in each run
    for draw in (None, *range(_DRAWS)):
        one = look.grown(names, names, draw)
        if draw is None and not look.agrees(one, exact):
            return one.error or f"a loss of {one.loss:.9g}, with another derivative by its pins"
        # what the loss makes of all parameters, it makes of those of the layers in both
        other = look.grown(names, (), draw)
        same = other.error or (look.same_loss(one, other) and look.agrees(one, other.multipliers))
        if not same:
            return one.error or f"a loss of {one.loss:.9g} instead of {other.loss:.9g}"
        if other.error or look.alike(one, other):
            break
    return ""


def _refuse_others(look: FirstLook, names: Sequence[str], exact: Multipliers) -> None:
    """Refuse candidates whose layers, put in around their sites, have another λ."""
    if not names or look.agrees(look.grown(names, ()), exact):
        return
    for name in names:
        grown, after = look.grown([name], ()), look.site_of[name].after
        if look.agrees(grown, exact):
            continue
        found, expected = (
            math.hypot(*(norm_of(value) for value in some.get(name, {}).values()))
            for some in (grown.multipliers, exact)
        )
        what = grown.error or f"‖λ‖ = {found:.4g}, and by the tensor at its site {expected:.4g}"
        raise CandidateError(
            f'after="{after}": with a layer really put in there the loss of a batch has '
            f"another derivative by its pins than it should ({what}). Either this module is also "
            "run by someone who has not got it from the model: a plain list or attribute beside "
            "the model's own, a bound method that was kept, module.forward(x), a variable of the "
            "loss. Then keep modules in nn.ModuleList, call module(x), and let the loss call "
            f"model.{after}(x). Or the loss reads something of all of model.parameters() or "
            "model.modules(), to which a new layer adds: let it take those that it is meant for "
            "once, before. Or choose another submodule."
        )


_DRAWS = 8


def _parts(names: Sequence[str], elements: Sequence[str]) -> list[Sequence[str]]:
    """All at once, and every second element: a mean over a list may be the same with all copied."""
    return [part for part in (names, elements[1::2]) if part]


def _refuse_dead(sites: Sequence[Site], first: FirstBatch, exact: Multipliers) -> None:
    """Refuse blocks whose λ is zero whatever is at their sites; first those where it is here."""
    alive = [name for name, some in exact.items() if any(bool(t.any()) for t in some.values())]
    for site, seen in zip(sites, first.seen, strict=True):
        for name in (name for name in site.blocks if name not in alive):
            for use in seen:
                refuse_dead(name, site.blocks[name], use.x, use.context)
