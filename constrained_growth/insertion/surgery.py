"""What goes where: the layers to insert into a model, and the putting of them there."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError
from constrained_growth.insertion.inserted import Inserted
from constrained_growth.insertion.placement import list_of, name_of, put_around, put_next
from constrained_growth.insertion.records import InsertedLayer, describe
from constrained_growth.solution import Planned, Solution


@dataclass(frozen=True)
class Plan:
    """One layer to insert into one model.

    Attributes:
        name: Of its candidate.
        site: The module whose output it follows.
        planned: As in the solution, with a block of its own.
        list: The list in which the layer becomes the element after its site, or None: it then
            stands around the site.
        layer: What becomes part of the model: the block, or its standalone form.
    """

    name: str
    site: nn.Module
    planned: Planned
    list: nn.Module | None
    layer: nn.Module


def plans_for(
    model: nn.Module,
    solution: Solution,
    names: Iterable[str],
    original: nn.Module | None = None,
) -> list[Plan]:
    """Plans for the chosen candidates, with copies of their blocks.

    Args:
        model: What they are to be put into.
        solution: Says what they are.
        names: Of the candidates, in the order in which they stand where they share a site.
        original: The model that was solved, if `model` is a copy of it that may be elsewhere and
            in another precision.

    Raises:
        BlockError: The standalone form of a block does not hold the pinned parameters.
    """
    plans = []
    for name in names:
        planned = solution.candidates[name]
        with torch.inference_mode(False):
            planned = replace(planned, block=copy.deepcopy(planned.block))
        site = model.get_submodule(planned.after)
        here = first_parameter(site, model)
        planned.block.train(site.training)
        if here is not None:
            planned.block.to(here.device)
        if here is not None and original is not None:
            there = first_parameter(original.get_submodule(planned.after), original)
            if there is not None and there.dtype != here.dtype:
                planned.block.to(here.dtype)
        whole = planned.output in (None, 0)  # what the next element of a list is called with
        can_stand = whole and callable(getattr(planned.block, "standalone", None))
        owner = list_of(model, site) if can_stand else None
        layer = planned.block if owner is None else standing_alone(planned.block)
        plans.append(Plan(name, site, planned, owner, layer))
    return plans


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)


def standing_alone(block: nn.Module) -> nn.Module:
    """What `block.standalone()` gives.

    Raises:
        BlockError: It does not hold the pinned parameters of the block themselves.
    """
    with torch.random.fork_rng(devices=[]):
        layer = block.standalone()  # type: ignore[operator]
    pins = {id(p) for p in pinned_parameters(block).values()}
    if not isinstance(layer, nn.Module) or not pins <= {id(p) for p in layer.parameters()}:
        raise BlockError(
            f"block={type(block).__name__}: standalone() gives a {type(layer).__name__}, and not a "
            "module that holds the pinned parameters of the block themselves."
        )
    return layer


def grow(model: nn.Module, plans: Sequence[Plan]) -> list[InsertedLayer]:
    """Put the layers into the model; what was done, in the order in which it was done.

    It goes from the outermost modules inwards, as a copied block is like its neighbour before
    anything was put into that; and at each depth elements of lists come first.
    """
    anchors: dict[str, nn.Module] = {}  # candidate → what its layer follows
    tails = {plan.site: plan.site for plan in plans}
    for plan in plans:
        anchors[plan.name] = tails[plan.site]
        if plan.list is not None:
            tails[plan.site] = plan.layer
    places: dict[nn.Module, nn.Module] = {}  # what a layer follows → the last wrapper around it
    done = []
    for plan in sorted(plans, key=lambda p: (p.planned.after.count("."), p.list is None)):
        anchor = anchors[plan.name]
        place = places.get(anchor, anchor)
        sibling = None if plan.list is None else plan.layer
        after = name_of(model, place)
        layer = describe(plan.name, after, plan.planned, plan.site, sibling, model=model)
        if plan.list is None:
            places[anchor] = wrap(model, place, plan.layer, layer)
        else:
            put_next(plan.list, place, plan.layer)
        done.append(layer)
    return done


def wrap(model: nn.Module, site: nn.Module, block: nn.Module, layer: InsertedLayer) -> Inserted:
    """Put a block around a site."""
    wrapper = Inserted(site, block, overwritten=layer.overwritten, output=layer.output)
    put_around(model, site, wrapper)
    return wrapper


def counterparts(plans: Iterable[Plan]) -> dict[int, Tensor]:
    """Parameter of a new element of a list → the one of that name in its neighbour."""
    found: dict[int, Tensor] = {}
    for plan in plans:
        if plan.list is not None:
            neighbour = dict(plan.site.named_parameters())
            for name, parameter in plan.layer.named_parameters():
                if name in neighbour:
                    found[id(parameter)] = neighbour[name]
    return found
