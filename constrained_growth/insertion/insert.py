"""Insert the chosen layers into a model without changing its function.

Everything that can be refused is refused first; the outputs on one batch are noted; then, inside a
context that undoes everything after an error, the layers go in, the books of the model follow, the
outputs are compared, and the optimizers take the new parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from constrained_growth._arguments import data_again, instance
from constrained_growth._distributed import everywhere
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import check_can_change, parameter_shapes
from constrained_growth._sites.placement import place, placement_around, undoing
from constrained_growth._sites.snapshot import deepcopied
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.copied import standalone_form
from constrained_growth.blocks.protocol import check_deviations, move_pins
from constrained_growth.bookkeeping import Books, open_books
from constrained_growth.errors import CandidateError, RuleError
from constrained_growth.insertion import preservation
from constrained_growth.insertion.description import described_block
from constrained_growth.insertion.record import GrowthRecord, InsertedLayer, first_parameter
from constrained_growth.insertion.training_state import (
    add_parameters,
    as_optimizers,
    check_optimizers,
    checked_copies,
    groups_and_states,
)
from constrained_growth.solution import Planned, Solution


def insert(
    model: nn.Module,
    solution: Solution,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    data: Iterable[Any] | None = None,
) -> GrowthRecord:
    """Insert the layers that a solution chose, in place and without changing the function.

    A layer is wrapped around its site: a module with the children `base` and `inserted` takes the
    place of the site, and `inserted2`, … joins them where one more goes in, so that no name changes
    again. All other attributes are those of the site. A copy of one of the model's own blocks (a
    block with a method `standalone()`) whose site is an element of an `nn.ModuleList` or
    `nn.Sequential` becomes the next element of that list, as a plain module, and later elements are
    renumbered: if on the batch of the check that is the same network as the layer around its site,
    also with the pins moved, and had the same loss on the first batch of the problem. It is another
    one where the model collects the outputs of a list, runs it in step with a second list, or picks
    elements by their numbers, or where the loss reads something of each element.
    `Candidate(wrapped=True)` asks for the layer around its site.

    What else depends on the depth follows (`constrained_growth.bookkeeping`): a model of
    Transformers gets a new config, and the old one stays as it was.

    Residual blocks pinned at zero leave the output unchanged to the last bit, identity layers up
    to rounding. This is checked: the model runs on one batch before and after, in train and in
    eval mode, and each layer has to run where its site does. Then the layers take the values of the
    decision, if it has any. After any error everything is as it was.

    Args:
        model: The model of the problem, or a copy of it; changed in place. Inside a
            DistributedDataParallel or `fully_shard`, call `rewrap(model, optimizer)` afterwards:
            they do not know the new parameters (a warning says so). With several processes each
            checks on its own data, and all call `insert` with the same solution.
        solution: From `solve`. If nothing was chosen, nothing changes. The inserted layers are
            copies: the candidates can be used again.
        optimizer: One or several optimizers that train `model`. The state of the old parameters
            is kept; new parameters join the groups of their neighbours, with their settings and
            without state. No group is added, so learning-rate schedulers go on. None (default)
            leaves optimizers to the caller.
        averaged: Copies of the model that grow too, such as an exponential moving average
            (`torch.optim.swa_utils.AveragedModel`). They get the layers at the pins: the average
            of a network that has always had them there. Those that run on the batch are checked.
        data: `(input, target)` batches; the function is checked on the first one. None (default)
            takes the first batch of the problem; `()` skips the check, and with it whether the
            model reaches the layers: one that calls a site by a reference of its own, such as a
            plain list of modules, does not.

    Returns:
        The record, which `replay` can repeat on a fresh model. `record.difference` is the largest
        change of the output in each mode.

    Raises:
        CandidateError: A site is not in the model, modules in it cannot be replaced, or its class
            could not hold the layer in that list (`from_pretrained` would make another model).
        OptimizerError: The optimizer cannot take the new parameters.
        RuleError: The values of the decision do not fit the blocks.
        BlockError: The output changed by more than rounding in the model's own mode, a layer is
            not reached where its site is, or the grown model fails.
        DataError: The model does not run on the batch.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> solution = cg.solve(cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate]))
        >>> record = cg.insert(net, solution)
        >>> sorted(record.difference), max(record.difference.values()) < 1e-6
        (['eval', 'train'], True)
        >>> sorted(net.state_dict())[2:4]
        ['1.inserted.bias', '1.inserted.weight']
    """
    names = _checked_choice(model, solution)
    if data is not None:
        data_again("data", data)
    shapes, evidence = parameter_shapes(model), solution.decision.evidence
    models = [model, *checked_copies(model, averaged)]
    planned = {name: solution.candidates[name] for name in names}
    optimizers = as_optimizers(optimizer)
    check_optimizers(model, optimizers, [one.block for one in planned.values()])
    if not names:
        return GrowthRecord((), shapes)
    books = [open_books(one) for one in models]
    example = solution.example if data is None else preservation.first_input(data, model)
    siblings = _siblings(model, books[0], planned, example)
    new = [_new_layers(one, model, planned, siblings) for one in models]
    before = [preservation.outputs_of(m, example, optional=m is not model) for m in models]
    old = {id(parameter) for parameter in model.parameters()}
    # the books come before the check: what a layer does may depend on its number
    with undoing(models, *groups_and_states(optimizers)):
        inserted = [_put_into(*pair) for pair in zip(models, new, strict=True)]
        for one in books:
            one.update()
        differences = [
            preservation.check_preserved(
                one,
                example,
                outputs,
                {new.name: new.module for new in here},
                {new.name: new.site for new in here if not new.is_sibling},
            )
            for one, outputs, here in zip(models, before, new, strict=True)
        ]
        added = [p for p in model.parameters() if id(p) not in old]
        add_parameters(optimizers, model, added, _counterparts(new[0]))
        # after the check, at the pins; averages stay there
        with torch.no_grad():
            for layer in new[0]:
                pins = pinned_parameters(layer.planned.block)
                for key, value in solution.decision.values.get(layer.name, {}).items():
                    pins[key].add_(value.to(pins[key]))
        is_wrapped = any(isinstance(m, DistributedDataParallel) for m in model.modules())
        if is_wrapped or is_sharded(model):
            warnings.warn(
                "the model is wrapped in DistributedDataParallel or fully_shard, which do not know "
                "the new parameters; call cg.rewrap(model, optimizer) on all processes.",
                stacklevel=2,
            )
    return GrowthRecord(
        tuple(inserted[0]), shapes, differences[0], (dict(evidence),) if evidence else ()
    )


@dataclass(frozen=True)
class _NewLayer:
    """A layer about to go into one model."""

    name: str  # of its candidate
    planned: Planned  # as in the solution, with a copy of the block
    site: nn.Module
    module: nn.Module  # the block, or its standalone form
    is_sibling: bool  # whether it becomes the next element of the list that the site is in


def _siblings(
    model: nn.Module, books: Books, planned: Mapping[str, Planned], example: object
) -> frozenset[str]:
    """Those of the layers that become the next element of the list that their site is in.

    λ is measured with the layer around its site, so there must be no difference, and not only at
    the pins: where a loop keeps the output of its third element, an identity before it moves the
    derivative alone. So the outputs are compared with the pins moved.
    """
    listed = {
        name: one
        for name, one in planned.items()
        if books.can_list(one.after, one.block, one.output, wrapped=one.wrapped)
    }
    counted = frozenset(name for name, one in listed.items() if books.counts(one.after))
    for name in counted:
        layer = standalone_form(deepcopied(listed[name].block))
        refusal = books.refusal(listed[name].after, layer)
        if refusal is not None:
            raise CandidateError(f'"{name}" cannot follow "{listed[name].after}": {refusal}')

    def outputs(siblings: Collection[str]) -> preservation.Outputs:
        new = _new_layers(model, model, listed, siblings)
        for one in new:
            move_pins(one.planned.block)
        with undoing([model], always=True):
            _put_into(model, new)
            books.update()
            return preservation.outputs_of(model, example, optional=True)

    def look() -> frozenset[str]:
        around = outputs(()) if example is not None else {}
        if not around:
            return frozenset(listed)
        fault = ""
        # the problem has compared each alone, and together they may differ all the same
        for siblings in dict.fromkeys((frozenset(listed), counted)):
            # a library that counts its layers may return an entry for each
            growing = not counted.isdisjoint(siblings)
            if siblings:
                fault = preservation.disagreement(model, around, outputs(siblings), growing=growing)
            if not (siblings and fault):
                return siblings
        raise CandidateError(
            f"{sorted(counted)} as next elements of their lists make another network than the one "
            f"λ is for: {fault}. The model may return something of each layer (a loss of routers), "
            "or call it with other arguments there. Choose another site, or ask for "
            "Candidate(wrapped=True), which its class could not load."
        )

    if not listed:
        return frozenset()
    # processes look at other batches, and have to build the same model
    return frozenset.intersection(*everywhere(look, None, collective=is_sharded(model)))


def _new_layers(
    model: nn.Module, original: nn.Module, planned: Mapping[str, Planned], siblings: Collection[str]
) -> list[_NewLayer]:
    """The layers for the original model or a copy of it, which may have another precision."""
    found = []
    for name, given in planned.items():
        with torch.inference_mode(False):  # or it could never be trained
            one = replace(given, block=deepcopied(given.block))
        site = model.get_submodule(one.after)
        one.block.train(site.training)
        # an average may be kept in another precision than the model, and on another device
        here = first_parameter(site, model)
        there = first_parameter(original.get_submodule(one.after), original)
        if here is not None:
            is_other = there is not None and there.dtype != here.dtype
            one.block.to(here.device, here.dtype if is_other else None)
        is_sibling = name in siblings
        module = standalone_form(one.block) if is_sibling else one.block
        found.append(_NewLayer(name, one, site, module, is_sibling))
    return found


def _put_into(model: nn.Module, new_layers: Iterable[_NewLayer]) -> list[InsertedLayer]:
    """Put the layers into the model; returns what was done, in its order."""
    ends: dict[nn.Module, nn.Module] = {}  # site → the last module there so far
    done = []
    # Outer sites come first: a copied block is a copy of its neighbour as it was.
    for new in sorted(new_layers, key=lambda new: new.planned.after.count(".")):
        end, planned = ends.get(new.site, new.site), new.planned
        placement = "sibling" if new.is_sibling else placement_around(model, end, new.module)
        record = InsertedLayer(
            name=new.name,
            after=next(name for name, module in model.named_modules() if module is end),
            block=described_block(planned.block, new.site, model),
            parameters=parameter_shapes(new.module),
            overwritten=planned.overwritten,
            output=planned.output,
            placement=placement,
            pristine=deepcopied(new.module),  # at the pins; the module itself is trained
        )
        where = placement, planned.output, planned.overwritten
        ends[new.site] = place(model, end, new.module, *where)
        done.append(record)
    return done


def _counterparts(new_layers: Iterable[_NewLayer]) -> dict[int, Tensor]:
    """`id` of a parameter of a new list element → the parameter of that name in its neighbour."""
    return {
        id(parameter): old[name]
        for new in new_layers
        if new.is_sibling
        for old in [dict(new.site.named_parameters())]
        for name, parameter in new.module.named_parameters()
        if name in old
    }


def _checked_choice(model: nn.Module, solution: Solution) -> tuple[str, ...]:
    """Names of the chosen candidates, in the order of the problem."""
    instance("model", model, nn.Module, CandidateError, "the model of the problem")
    instance("solution", solution, Solution, CandidateError, "what cg.solve returns")
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = solution.decision.chosen
    for name in chosen:
        if name not in solution.candidates:
            raise CandidateError(
                f'solution: the decision chose "{name}", none of {tuple(solution.candidates)}.'
            )
        after = solution.candidates[name].after
        if after not in modules:
            raise CandidateError(
                f'model={type(model).__name__} has no submodule "{after}", the site of "{name}"; '
                "give the model of the problem, as it was when solved."
            )
    if chosen and parameter_shapes(model) != dict(solution.parameters):
        raise CandidateError(
            f"model={type(model).__name__} does not have the parameters, by name and shape, of the "
            "model that was solved; after an insertion, solve a new problem."
        )
    check_can_change(model)
    for name, values in solution.decision.values.items():
        if name not in solution.candidates:
            raise RuleError(f'decision.values: "{name}" is none of {tuple(solution.candidates)}.')
        if name in chosen:
            block = solution.candidates[name].block
            check_deviations(block, values, f'decision.values["{name}"]', RuleError)
    return tuple(name for name in solution.candidates if name in chosen)
