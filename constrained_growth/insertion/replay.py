"""Repeat recorded insertions on a fresh model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from constrained_growth._activations import Activation
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.blocks import CopiedBlock
from constrained_growth.errors import BlockError, RecordError
from constrained_growth.insertion.layer import (
    WithInsertedLayer,
    first_parameter,
    put_into,
    standalone_form,
    structure_kept_on_error,
)
from constrained_growth.insertion.record import (
    ACTIVATION_MODULES,
    BLOCKS,
    FUNCTIONS,
    NORM_LAYERS,
    GrowthRecord,
    InsertedLayer,
)


def replay(
    model: nn.Module,
    record: GrowthRecord,
    *,
    blocks: Mapping[str, nn.Module] | None = None,
    strict: bool = True,
) -> nn.Module:
    """Repeat recorded insertions on a fresh model, so that `load_state_dict` fits.

    Args:
        model: As it was before the first insertion; changed in place. It need not be compiled or
            in a DistributedDataParallel, as it may have been when the record was made.
        record: From `insert`, or `GrowthRecord.from_json`.
        blocks: Name of the inserted layer → block, for your own blocks and activations, which a
            record read from JSON cannot rebuild.
        strict: Whether the parameters of `model` must have the names and shapes that they had
            when the record was made (default). False requires only the sites.

    Returns:
        The same model, grown, the new layers at their pins.

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
            f"record={record!r:.80} is not a GrowthRecord; use cg.GrowthRecord.from_json(text)."
        )
    record = _without_wrappers(record, model)
    if strict:
        _check_shapes(model, record)
    with structure_kept_on_error(model):
        for layer in record.insertions:
            _insert_again(model, layer, (blocks or {}).get(layer.name))
    return model


def _without_wrappers(record: GrowthRecord, model: nn.Module) -> GrowthRecord:
    """The record of a wrapped model, with the names that an unwrapped one has."""
    # DistributedDataParallel or DataParallel, and torch.compile, in either order
    for prefix in ("module.", "_orig_mod.") * 2:
        names = [*record.model, *(layer.after for layer in record.insertions)]
        wrapped = bool(names) and all(name.startswith(prefix) for name in names)
        if wrapped and not hasattr(model, prefix.removesuffix(".")):
            layers = []
            for layer in record.insertions:
                of = str(layer.block.get("of") or "").removeprefix(prefix)
                block = {**layer.block, "of": of} if of else layer.block
                layers.append(replace(layer, after=layer.after.removeprefix(prefix), block=block))
            shapes = {name.removeprefix(prefix): shape for name, shape in record.model.items()}
            record = replace(record, insertions=tuple(layers), model=shapes)
    return record


def _check_shapes(model: nn.Module, record: GrowthRecord) -> None:
    have, want = parameter_shapes(model), dict(record.model)
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differing:
        first = differing[0]
        raise RecordError(
            f"model={type(model).__name__} does not fit the record: {len(differing)} parameters "
            f'differ, first "{first}" with shape {have.get(first)} for {want.get(first)}. Give '
            "the model as it was before it was grown, or strict=False."
        )


def _insert_again(model: nn.Module, layer: InsertedLayer, given: nn.Module | None) -> None:
    site = dict(model.named_modules(remove_duplicate=False)).get(layer.after)
    if site is None or site is model:
        raise RecordError(
            f'model={type(model).__name__} has no submodule "{layer.after}" for the layer '
            f'"{layer.name}"; give the model as it was before it was grown.'
        )
    block = _rebuilt(layer, given, site, model)
    shapes = parameter_shapes(block)
    if shapes != dict(layer.parameters):
        raise RecordError(
            f'the block for the layer "{layer.name}" has parameters {shapes}, the record says '
            f"{dict(layer.parameters)}."
        )
    like = first_parameter(site, model)
    if like is not None:
        block = block.to(device=like.device, dtype=like.dtype)
    block.train(site.training)
    put_into(model, site, block, layer)


def _rebuilt(
    layer: InsertedLayer, given: nn.Module | None, site: nn.Module, model: nn.Module
) -> nn.Module:
    """The block given, the one that the record still holds, or one made from its description."""
    if given is not None:
        block = copy.deepcopy(given)
        stands_alone = callable(getattr(block, "standalone", None))
        return standalone_form(block) if stands_alone and layer.placement == "sibling" else block
    if layer.pristine is not None:
        return copy.deepcopy(layer.pristine)
    kind, arguments = str(layer.block.get("type")), layer.block.get("arguments")
    is_copy = kind == CopiedBlock.__name__
    if arguments is None or not (is_copy or kind in BLOCKS):
        raise RecordError(
            f'the layer "{layer.name}" is {kind!r}, which a record cannot rebuild; pass it: '
            f"replay(model, record, blocks={{{layer.name!r}: block}})."
        )
    try:
        if is_copy:
            return _copied(layer, dict(arguments)["pinned"], site, model)
        arguments = dict(arguments)
        arguments["activation"] = _activation(arguments["activation"])
        if arguments.get("norm_layer") is not None:
            arguments["norm_layer"] = NORM_LAYERS[arguments["norm_layer"]]
        with torch.random.fork_rng(devices=[]):
            return BLOCKS[kind](**arguments)
    except (TypeError, ValueError, KeyError, AttributeError, BlockError) as error:
        raise RecordError(
            f'the layer "{layer.name}" of the record is damaged: {error!r}.'
        ) from error


def _copied(
    layer: InsertedLayer, pinned: list[str], site: nn.Module, model: nn.Module
) -> nn.Module:
    """A copy of the site, or of the other module that the record names."""
    while isinstance(site, WithInsertedLayer):
        site = site.base
    copied, of = layer.block.get("copied"), layer.block.get("of")
    original = site if of is None else dict(model.named_modules()).get(str(of))
    if original is None or type(original).__qualname__ != copied:
        raise RecordError(
            f'the layer "{layer.name}" is a copy of the {copied} "{of or layer.after}", here a '
            f"{type(original).__qualname__}."
        )
    block = CopiedBlock(original, list(pinned))
    return block.standalone() if layer.placement == "sibling" else block


def _activation(described: Mapping[str, Any]) -> Activation:
    if "function" in described:
        home, _, name = described["function"].rpartition(".")
        function: Activation | None = getattr(FUNCTIONS.get(home), name, None)
        if function is not None:
            return function
    elif described["module"] in ACTIVATION_MODULES:
        return ACTIVATION_MODULES[described["module"]](**described["arguments"])
    raise RecordError(f"the record names an unknown activation: {described}.")
