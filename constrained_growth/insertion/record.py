"""The record of what was inserted, as data that JSON can hold, and its replay."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from constrained_growth import blocks
from constrained_growth._activations import Activation, TanhLU
from constrained_growth._sites.model import list_of, parameter_shapes
from constrained_growth._sites.wrapper import WithInsertedLayer, add_layer, without_inserted
from constrained_growth.bookkeeping import open_books
from constrained_growth.errors import BlockError, RecordError
from constrained_growth.insertion.layer import (
    first_parameter,
    standalone_form,
    structure_kept_on_error,
    wrapper_for,
)

_VERSION = 2
_PLACEMENTS = ("wrapped", "joined", "sibling")


@dataclass(frozen=True)
class InsertedLayer:
    """One inserted layer.

    Attributes:
        name: Name of its candidate.
        after: Qualified name of the module it follows, at the moment of its insertion.
        block: How to rebuild the block: its `type`, and `arguments` that JSON can hold. For a
            user's own block or activation `arguments` is None: pass it to `replay`.
        parameters: Name → shape of the block's parameters.
        overwritten: Whether the model changes the output in place afterwards.
        output: Which tensor of the module's output the layer works on, as in `Candidate`.
        placement: "wrapped" around the module, "joined" to the wrapper that stood there already,
            or "sibling", the next element of its list.
        pristine: A copy of the block as inserted; not part of the JSON text.
    """

    name: str
    after: str
    block: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    overwritten: bool = False
    output: int | str | None = None
    placement: Literal["wrapped", "joined", "sibling"] = "wrapped"
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class GrowthRecord:
    """The insertions into one model, in order; records of several rounds add up.

    Attributes:
        insertions: The layers.
        model: Name → shape of the parameters the model had before.
        difference: "train" and "eval" → largest change of the output on the batch of the check,
            over all rounds. Empty when there was no check.
        evidence: `Decision.evidence` of each round.

    Example:
        >>> GrowthRecord.from_json(GrowthRecord().to_json())
        GrowthRecord(insertions=(), model={}, difference={}, evidence=())
    """

    insertions: tuple[InsertedLayer, ...] = ()
    model: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    difference: Mapping[str, float] = field(default_factory=dict)
    evidence: tuple[Mapping[str, Any], ...] = ()

    def __add__(self, other: GrowthRecord) -> GrowthRecord:
        both = [*self.difference.items(), *other.difference.items()]
        return GrowthRecord(
            self.insertions + other.insertions,
            self.model,
            {mode: max(d for m, d in both if m == mode) for mode, _ in both},
            self.evidence + other.evidence,
        )

    def to_json(self) -> str:
        """The record as JSON text.

        Raises:
            RecordError: The evidence holds something that JSON cannot.
        """
        layers = [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "pristine"}
            for layer in self.insertions
        ]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "insertions"}
        try:
            return json.dumps({"version": _VERSION, "insertions": layers, **rest}, indent=2)
        except TypeError as error:
            raise RecordError(f"evidence cannot be written as JSON: {error}.") from error

    @classmethod
    def from_json(cls, text: str) -> GrowthRecord:
        """The record from JSON text; nothing in it is executed.

        Raises:
            RecordError: The text is no growth record, or one of a newer version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version not in (1, _VERSION):
                raise RecordError(
                    f"the record has version {version!r}, this library reads 1 and {_VERSION}."
                )
            model = _shapes_from(content["model"])
            layers = tuple(_layer_from(item) for item in content["insertions"])
            difference = {str(m): float(d) for m, d in content.get("difference", {}).items()}
            evidence = tuple(dict(item) for item in content.get("evidence", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"text is no growth record as of to_json(): {error!r}.") from error
        return cls(layers, model, difference, evidence)


def _layer_from(item: Mapping[str, Any]) -> InsertedLayer:
    output, placement = item.get("output"), item.get("placement", "wrapped")
    if not isinstance(output, int | str | None) or placement not in _PLACEMENTS:
        raise ValueError(f"output={output!r}, placement={placement!r}")
    name, after, overwritten = str(item["name"]), str(item["after"]), bool(item["overwritten"])
    block, parameters = dict(item["block"]), _shapes_from(item["parameters"])
    return InsertedLayer(name, after, block, parameters, overwritten, output, placement)


def _shapes_from(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(int(size) for size in shape) for name, shape in content.items()}


def described_block(block: nn.Module, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    """How to rebuild a block that is about to be inserted after a site of the model."""
    if isinstance(block, blocks.CopiedBlock):
        return _described_copy(block, site, model)
    if _BLOCKS.get(type(block).__name__) is not type(block):
        return {"type": type(block).__qualname__, "arguments": None}
    arguments = dict(block.config())  # type: ignore[operator]
    arguments["activation"] = _described_activation(arguments["activation"])
    known, norm_layer = arguments["activation"] is not None, arguments.get("norm_layer")
    if norm_layer is not None:
        arguments["norm_layer"] = name = getattr(norm_layer, "__name__", "")
        known = known and _NORM_LAYERS.get(name) is norm_layer
    return {"type": type(block).__name__, "arguments": arguments if known else None}


def _described_copy(block: blocks.CopiedBlock, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    """The copied class and its pins, and `of` which module it is a copy if not of its site."""
    kind, shapes = type(block.module), parameter_shapes(block.module)

    def is_alike(module: nn.Module) -> bool:
        return type(module) is kind and parameter_shapes(module) == shapes

    pinned = [name.removeprefix("module.") for name in block.pinned]
    described = {"type": type(block).__qualname__, "copied": kind.__qualname__}
    if is_alike(site):
        return {**described, "arguments": {"pinned": pinned}}
    of = next((name for name, module in model.named_modules() if is_alike(module)), None)
    return {**described, "of": of, "arguments": of and {"pinned": pinned}}


def _described_activation(activation: object) -> dict[str, Any] | None:
    """An activation as data, or None for a user's own."""
    if isinstance(activation, nn.Module):
        kind = type(activation)
        values = {key: getattr(activation, key, None) for key in inspect.signature(kind).parameters}
        plain = {key: v for key, v in values.items() if isinstance(v, bool | int | float | str)}
        known = _ACTIVATION_MODULES.get(kind.__name__) is kind
        return {"module": kind.__name__, "arguments": plain} if known else None
    name = getattr(activation, "__name__", "")
    homes = [home for home, space in _FUNCTIONS.items() if getattr(space, name, None) is activation]
    return {"function": f"{homes[0]}.{name}"} if homes else None


def put_into(
    model: nn.Module, site: nn.Module, layer: nn.Module, record: InsertedLayer
) -> nn.Module:
    """Insert a layer after a site as its record says; returns the module now at its place."""
    if record.placement == "sibling":
        owner = list_of(model, site)
        if owner is None:
            raise RecordError(
                f'model: "{record.after}", the site of the layer "{record.name}" in the record, is '
                "no element of an nn.ModuleList or nn.Sequential."
            )
        place = next(i for i, element in enumerate(owner) if element is site)
        owner.insert(place + 1, layer)
        return layer
    if record.placement == "joined":
        wrapper = wrapper_for(model, site)
        if wrapper is None:
            raise RecordError(
                f'model: at "{record.after}", the site of the layer "{record.name}" in the record, '
                "joined others that are not there; replay the records of all rounds in their order."
            )
        add_layer(wrapper, site, layer, record.output, record.overwritten)
        return site if site is wrapper else layer
    wrapper = WithInsertedLayer(site)
    add_layer(wrapper, wrapper, layer, record.output, record.overwritten)
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if child is site and owner is not wrapper:  # under every name that it has
                owner._modules[key] = wrapper
    return wrapper


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
        CandidateError: The class of the model could not hold the layers, as for `insert`.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> cg.replay(net, cg.GrowthRecord(), strict=False) is net
        True
    """
    if not isinstance(record, GrowthRecord):
        raise RecordError(f"record={record!r:.80} is no GrowthRecord; use GrowthRecord.from_json.")
    record = _without_wrappers(record, model)
    have, want = parameter_shapes(model), dict(record.model)
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if strict and differing:
        first = differing[0]
        raise RecordError(
            f"model={type(model).__name__} does not fit the record: {len(differing)} parameters "
            f'differ, first "{first}" with shape {have.get(first)} for {want.get(first)}. Give '
            "the model as it was before it was grown, or strict=False."
        )
    books = open_books(model)
    with structure_kept_on_error(model):
        for layer in record.insertions:
            _insert_again(model, layer, (blocks or {}).get(layer.name))
        books.update()
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
    is_copy = kind == blocks.CopiedBlock.__name__
    if arguments is None or not (is_copy or kind in _BLOCKS):
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
            arguments["norm_layer"] = _NORM_LAYERS[arguments["norm_layer"]]
        with torch.random.fork_rng(devices=[]):
            return _BLOCKS[kind](**arguments)
    except (TypeError, ValueError, KeyError, AttributeError, BlockError) as error:
        raise RecordError(f'record: the layer "{layer.name}" is damaged: {error!r}.') from error


def _copied(
    layer: InsertedLayer, pinned: list[str], site: nn.Module, model: nn.Module
) -> nn.Module:
    """A copy of the site, or of the other module that the record names."""
    site = without_inserted(site)
    copied, of = layer.block.get("copied"), layer.block.get("of")
    original = site if of is None else dict(model.named_modules()).get(str(of))
    if original is None or type(original).__qualname__ != copied:
        raise RecordError(
            f'the layer "{layer.name}" is a copy of the {copied} "{of or layer.after}", here a '
            f"{type(original).__qualname__}."
        )
    block = blocks.CopiedBlock(original, list(pinned))
    return block.standalone() if layer.placement == "sibling" else block


def _activation(described: Mapping[str, Any]) -> Activation:
    if "function" in described:
        home, _, name = described["function"].rpartition(".")
        function: Activation | None = getattr(_FUNCTIONS.get(home), name, None)
        if function is not None:
            return function
    elif described["module"] in _ACTIVATION_MODULES:
        return _ACTIVATION_MODULES[described["module"]](**described["arguments"])
    raise RecordError(f"the record names an unknown activation: {described}.")


_BLOCKS: dict[str, type[Any]] = {
    name: value for name, value in vars(blocks).items() if hasattr(value, "config")
}
"""The blocks of this library that know the arguments to rebuild them from."""

_NORM_LAYERS: dict[str | None, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.BatchNorm2d, nn.SyncBatchNorm)
}
_FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional, "torch.special": torch.special}
_ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    name: cls
    for name, cls in {**vars(nn.modules.activation), "TanhLU": TanhLU}.items()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
}
