"""What was inserted, as data that survives in a JSON file; and blocks made from it again."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from constrained_growth import _activations as activations
from constrained_growth import blocks
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.errors import BlockError, RecordError
from constrained_growth.solution import Planned

_VERSION = 2


@dataclass(frozen=True)
class InsertedLayer:
    """One layer that was inserted.

    Attributes:
        name: Name of its candidate.
        after: Qualified name of the module it was put after, when it was.
        block: How to build the block again: its `type`, and `arguments` that JSON can hold. A
            block or activation of the user's own has `arguments` None: pass it to `replay`.
        parameters: Name → shape of the block's parameters.
        overwritten: Whether the model changes the output in place afterwards.
        output: Which tensor of the module's output the layer works on, as in `Candidate`.
        placement: "wrapped" if it stands around the module, as `Inserted`; "sibling" if it became
            the next element of the list that the module is in, those after it renumbered. Then
            `block` says of which class it is and which of its parameters are pinned.
        pristine: The block as it was inserted, while the record lives in the process that made
            it; JSON does not hold it.
    """

    name: str
    after: str
    block: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    overwritten: bool = False
    output: int | str | None = None
    placement: Literal["wrapped", "sibling"] = "wrapped"
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class GrowthRecord:
    """The insertions into one model, in their order.

    Records of several rounds add up: `replay(model, first + second)`.

    Attributes:
        insertions: The layers.
        model: Name → shape of the parameters the model had before.
        difference: "train" and "eval" → by how much the output moved at most, on the batch that
            `insert` looked at; of several rounds the largest. Empty when it was not looked at.
        evidence: What each round's decision rested on, as its rule says (`Decision.evidence`).

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
            RecordError: There is something in the evidence that JSON cannot hold.
        """
        layers = [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "pristine"}
            for layer in self.insertions
        ]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "insertions"}
        try:
            return json.dumps({"version": _VERSION, "insertions": layers, **rest}, indent=2)
        except TypeError as error:
            raise RecordError(
                f"evidence={self.evidence!r:.200} cannot be written as JSON: {error}; a rule's "
                "evidence is numbers, texts, lists and dicts of them."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> GrowthRecord:
        """The record from JSON text; nothing in it is executed.

        Raises:
            RecordError: The text is no growth record, or of a newer version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version not in (1, _VERSION):
                raise RecordError(
                    f"the growth record has version {version!r}, this library reads 1 and "
                    f"{_VERSION}; use the version of the library that wrote it."
                )
            model = _shapes_from(content["model"])
            layers = tuple(_layer_from(item) for item in content["insertions"])
            difference = {str(m): float(d) for m, d in content.get("difference", {}).items()}
            evidence = tuple(dict(item) for item in content.get("evidence", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"text is no growth record as to_json() writes it: {error!r}."
            ) from error
        return cls(layers, model, difference, evidence)


def describe(
    name: str,
    after: str,
    planned: Planned,
    site: nn.Module,
    sibling: nn.Module | None = None,
    *,
    model: nn.Module,
) -> InsertedLayer:
    """The record of a layer about to be inserted.

    Args:
        name: Of its candidate.
        after: Qualified name of the module after which it is put, now.
        planned: Its block, and what is known of the site.
        site: The site as it was when the problem was solved.
        sibling: The standalone form of the block, if that is what becomes part of the model.
        model: Into which it is put; in it is what a `CopiedBlock` may be a copy of.
    """
    layer = planned.block if sibling is None else sibling
    return InsertedLayer(
        name,
        after,
        _described_block(planned.block, site, model),
        parameter_shapes(layer),
        planned.overwritten,
        planned.output,
        "wrapped" if sibling is None else "sibling",
        pristine=copy.deepcopy(layer),
    )


def is_copy(layer: InsertedLayer) -> bool:
    """Whether a layer was a copy of another one, pinned at zero."""
    return layer.block.get("type") == blocks.CopiedBlock.__name__


def build_copy(layer: InsertedLayer, neighbour: nn.Module, model: nn.Module) -> nn.Module:
    """The layer of a record again, that was a copy of its neighbour, or of another module.

    Raises:
        RecordError: That module is not there or of another class, or the record is damaged.
    """
    if layer.block.get("arguments") is None:
        raise _cannot_build(layer)
    copied, of = layer.block.get("copied"), layer.block.get("of")
    original = neighbour if of is None else dict(model.named_modules()).get(str(of))
    if original is None or type(original).__qualname__ != copied:
        raise RecordError(
            f'the layer "{layer.name}" is a copy of the {copied} "{of or layer.after}", which in '
            f"this model is a {type(original).__qualname__}."
        )
    try:
        block = blocks.CopiedBlock(original, list(layer.block["arguments"]["pinned"]))
    except (TypeError, KeyError, BlockError) as error:
        raise _damaged(layer, error) from error
    return block.standalone() if layer.placement == "sibling" else block


def build(layer: InsertedLayer) -> nn.Module:
    """The block of a record again: the architecture, not its values. Draws no random numbers.

    Raises:
        RecordError: It is a block or an activation of the user's own.
    """
    maker, arguments = _BLOCKS.get(str(layer.block.get("type"))), layer.block.get("arguments")
    if maker is None or arguments is None:
        raise _cannot_build(layer)
    try:
        arguments = dict(arguments)
        arguments["activation"] = _built_activation(arguments["activation"])
        if arguments.get("norm_layer") is not None:
            arguments["norm_layer"] = _NORM_LAYERS[arguments["norm_layer"]]
        with torch.random.fork_rng(devices=[]):
            return maker(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(layer, error) from error


def _cannot_build(layer: InsertedLayer) -> RecordError:
    return RecordError(
        f'the layer "{layer.name}" is {layer.block.get("type")!r}, a block or activation that '
        "a record cannot rebuild; pass it: "
        f"replay(model, record, blocks={{{layer.name!r}: block}})."
    )


def _damaged(layer: InsertedLayer, error: Exception) -> RecordError:
    return RecordError(f'the record of the layer "{layer.name}" is damaged: {error!r}.')


def _layer_from(item: Mapping[str, Any]) -> InsertedLayer:
    output, placement = item.get("output"), item.get("placement", "wrapped")
    if not isinstance(output, int | str | None) or placement not in ("wrapped", "sibling"):
        raise ValueError(f"output={output!r}, placement={placement!r}")
    return InsertedLayer(
        name=str(item["name"]),
        after=str(item["after"]),
        block=dict(item["block"]),
        parameters=_shapes_from(item["parameters"]),
        overwritten=bool(item["overwritten"]),
        output=output,
        placement=placement,
    )


def _shapes_from(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(int(size) for size in shape) for name, shape in content.items()}


def _described_block(block: nn.Module, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    if isinstance(block, blocks.CopiedBlock):
        return _described_copy(block, site, model)
    if _BLOCKS.get(type(block).__name__) is not type(block):
        return {"type": type(block).__qualname__, "arguments": None}
    arguments = block.config()  # type: ignore[operator]
    described = {**arguments, "activation": _described_activation(arguments["activation"])}
    known = described["activation"] is not None
    norm_layer = arguments.get("norm_layer")
    if norm_layer is not None:
        described["norm_layer"] = getattr(norm_layer, "__name__", None)
        known = known and _NORM_LAYERS.get(described["norm_layer"]) is norm_layer
    return {"type": type(block).__name__, "arguments": described if known else None}


def _described_copy(block: blocks.CopiedBlock, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Of which class it is a copy and of which pins, and `of` which module if not of its site."""
    kind, shapes = type(block.module), parameter_shapes(block.module)

    def is_alike(module: nn.Module) -> bool:
        return type(module) is kind and parameter_shapes(module) == shapes

    pinned = [name.removeprefix("module.") for name in block.pinned]
    described = {"type": type(block).__qualname__, "copied": kind.__qualname__}
    if is_alike(site):
        return {**described, "arguments": {"pinned": pinned}}
    of = next((name for name, module in model.named_modules() if is_alike(module)), None)
    return {**described, "of": of, "arguments": None if of is None else {"pinned": pinned}}


def _described_activation(activation: object) -> dict[str, Any] | None:
    """An activation as data, or None for one of the user's own."""
    if not isinstance(activation, nn.Module):
        for home, space in _FUNCTIONS.items():
            name = getattr(activation, "__name__", "")
            if name and getattr(space, name, None) is activation:
                return {"function": f"{home}.{name}"}
        return None
    name = type(activation).__name__
    if _MODULES.get(name) is not type(activation):
        return None
    known = inspect.signature(type(activation)).parameters
    values = {key: getattr(activation, key, None) for key in known}
    kept = {key: v for key, v in values.items() if isinstance(v, bool | int | float | str)}
    return {"module": name, "arguments": kept}


def _built_activation(described: Mapping[str, Any]) -> activations.Activation:
    if "function" in described:
        home, _, name = described["function"].rpartition(".")
        function: activations.Activation | None = getattr(_FUNCTIONS.get(home), name, None)
        if function is not None:
            return function
    elif described["module"] in _MODULES:
        return _MODULES[described["module"]](**described["arguments"])
    raise RecordError(f"the record names an activation that is not known here: {described}.")


_BLOCKS: dict[str, type[Any]] = {
    name: value for name, value in vars(blocks).items() if hasattr(value, "config")
}
"""The blocks of this library that say from which arguments they can be built again."""

_NORM_LAYERS: dict[str | None, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.BatchNorm2d, nn.SyncBatchNorm)
}
_FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional, "torch.special": torch.special}
_MODULES: dict[str, type[nn.Module]] = {
    **{
        name: cls
        for name, cls in vars(nn.modules.activation).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    },
    "TanhLU": activations.TanhLU,
}
