"""The same insertions again, on a fresh model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from constrained_growth._sites.model import parameter_shapes
from constrained_growth.errors import RecordError
from constrained_growth.insertion.inserted import Inserted
from constrained_growth.insertion.placement import list_of, put_next, structure_kept_on_error
from constrained_growth.insertion.records import (
    GrowthRecord,
    InsertedLayer,
    build,
    build_copy,
    is_copy,
)
from constrained_growth.insertion.surgery import first_parameter, standing_alone, wrap


def replay(
    model: nn.Module,
    record: GrowthRecord,
    *,
    blocks: Mapping[str, nn.Module] | None = None,
    strict: bool = True,
) -> nn.Module:
    """Repeat recorded insertions on a fresh model, so that `load_state_dict` fits.

    Args:
        model: As it was before the first insertion; changed in place. If it was compiled or in a
            DistributedDataParallel when the record was made, it may be so again, or not.
        record: From `insert`, or `GrowthRecord.from_json`.
        blocks: Name of the inserted layer → block, for blocks and activations of your own, which
            a record that comes from JSON cannot rebuild.
        strict: Whether the parameters of `model` must have the names and shapes they had when
            the record was made (default). False asks only for the sites, say for a model with
            another head.

    Returns:
        The same model, grown. The values of the new layers are those at the pins; load a state
        dict for others.

    Raises:
        RecordError: The record does not fit the model, or a block cannot be rebuilt. The model
            is then as it was.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> cg.replay(net, cg.GrowthRecord(), strict=False) is net
        True
    """
    if not isinstance(record, GrowthRecord):
        raise RecordError(
            f"record={record!r:.80} is not a GrowthRecord; make one from JSON text by "
            "cg.GrowthRecord.from_json(text)."
        )
    record = _without_wrappers(record, model)
    if strict:
        _check_shapes(model, record)
    given = blocks or {}
    with structure_kept_on_error(model):
        for layer in record.insertions:
            _repeat(model, layer, given.get(layer.name))
    return model


def _without_wrappers(record: GrowthRecord, model: nn.Module) -> GrowthRecord:
    """The record of a model that was wrapped, for one that is not."""
    for wrapper in _WRAPPERS * 2:  # in any order
        names = [*record.model, *(layer.after for layer in record.insertions)]
        wrapped = bool(names) and all(name.startswith(wrapper) for name in names)
        if wrapped and not hasattr(model, wrapper.removesuffix(".")):
            shapes = {name.removeprefix(wrapper): shape for name, shape in record.model.items()}
            layers = tuple(_moved(layer, wrapper) for layer in record.insertions)
            record = replace(record, insertions=layers, model=shapes)
    return record


def _moved(layer: InsertedLayer, wrapper: str) -> InsertedLayer:
    of = layer.block.get("of")
    block = {**layer.block, "of": str(of).removeprefix(wrapper)} if of else layer.block
    return replace(layer, after=layer.after.removeprefix(wrapper), block=block)


_WRAPPERS = ("module.", "_orig_mod.")
"""How the names begin in DistributedDataParallel and DataParallel, and after torch.compile."""


def _repeat(model: nn.Module, layer: InsertedLayer, given: nn.Module | None) -> None:
    site = dict(model.named_modules(remove_duplicate=False)).get(layer.after)
    if site is None or site is model:
        raise RecordError(
            f'model={type(model).__name__} has no submodule "{layer.after}", after which the '
            f'record puts the layer "{layer.name}"; give the model as it was before it was '
            "grown."
        )
    block = _rebuilt(layer, given, site, model)
    like = first_parameter(site, model)
    if like is not None:
        block = block.to(device=like.device, dtype=like.dtype)
    block.train(site.training)
    if layer.placement == "wrapped":
        wrap(model, site, block, layer)
        return
    owner = list_of(model, site)
    if owner is None:
        raise RecordError(
            f'the record makes the layer "{layer.name}" the element after "{layer.after}", which '
            f"is no element of an nn.ModuleList or nn.Sequential in {type(model).__name__}."
        )
    put_next(owner, site, block)


def _rebuilt(
    layer: InsertedLayer, given: nn.Module | None, site: nn.Module, model: nn.Module
) -> nn.Module:
    neighbour = site
    while isinstance(neighbour, Inserted):
        neighbour = neighbour.base
    if given is not None:
        block = copy.deepcopy(given)
        if layer.placement == "sibling" and callable(getattr(block, "standalone", None)):
            block = standing_alone(block)
    elif layer.pristine is not None:
        block = copy.deepcopy(layer.pristine)
    else:
        block = build_copy(layer, neighbour, model) if is_copy(layer) else build(layer)
    shapes = parameter_shapes(block)
    if shapes != dict(layer.parameters):
        raise RecordError(
            f'the block for the layer "{layer.name}" has parameters {shapes}, the record says '
            f"{dict(layer.parameters)}."
        )
    return block


def _check_shapes(model: nn.Module, record: GrowthRecord) -> None:
    have, want = parameter_shapes(model), dict(record.model)
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differing:
        first = differing[0]
        raise RecordError(
            f"model={type(model).__name__} does not fit the record: {len(differing)} parameters "
            f'differ, first "{first}" with shape {have.get(first)}, in the record '
            f"{want.get(first)}. Give the model as it was before it was grown, or strict=False."
        )
