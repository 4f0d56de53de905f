"""What was inserted, as data that survives in a JSON file; and blocks made from it again."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from constrained_growth import activations, blocks
from constrained_growth.errors import RecordError
from constrained_growth.observation import parameter_shapes

_VERSION = 1


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
        pristine: The block as it was inserted, while the record lives in the process that made
            it; JSON does not hold it.
    """

    name: str
    after: str
    block: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    overwritten: bool = False
    output: int | str | None = None
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class GrowthRecord:
    """The insertions into one model, in their order.

    Records of several rounds add up: `replay(model, first + second)`.

    Attributes:
        insertions: The layers.
        model: Name → shape of the parameters the model had before.

    Example:
        >>> GrowthRecord.from_json(GrowthRecord().to_json())
        GrowthRecord(insertions=(), model={})
    """

    insertions: tuple[InsertedLayer, ...] = ()
    model: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __add__(self, other: GrowthRecord) -> GrowthRecord:
        return GrowthRecord(self.insertions + other.insertions, self.model)

    def to_json(self) -> str:
        """The record as JSON text."""
        layers = [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "pristine"}
            for layer in self.insertions
        ]
        content = {"version": _VERSION, "insertions": layers, "model": self.model}
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> GrowthRecord:
        """The record from JSON text; nothing in it is executed.

        Raises:
            RecordError: The text is no growth record, or of a newer version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version != _VERSION:
                raise RecordError(
                    f"the growth record has version {version!r}, this library reads {_VERSION}; "
                    "use the version of the library that wrote it."
                )
            model = _shapes_from(content["model"])
            layers = tuple(
                InsertedLayer(
                    name=str(item["name"]),
                    after=str(item["after"]),
                    block=dict(item["block"]),
                    parameters=_shapes_from(item["parameters"]),
                    overwritten=bool(item["overwritten"]),
                    output=item.get("output"),
                )
                for item in content["insertions"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"text is no growth record as to_json() writes it: {error!r}."
            ) from error
        return cls(layers, model)


def describe(
    name: str,
    after: str,
    block: nn.Module,
    *,
    overwritten: bool = False,
    output: int | str | None = None,
) -> InsertedLayer:
    """The record of a block about to be inserted."""
    return InsertedLayer(
        name,
        after,
        _described_block(block),
        parameter_shapes(block),
        overwritten,
        output,
        copy.deepcopy(block),
    )


def build(layer: InsertedLayer) -> nn.Module:
    """The block of a record again: the architecture, not its values. Draws no random numbers.

    Raises:
        RecordError: It is a block or an activation of the user's own.
    """
    maker, arguments = _BLOCKS.get(str(layer.block.get("type"))), layer.block.get("arguments")
    if maker is None or arguments is None:
        raise RecordError(
            f'the layer "{layer.name}" is {layer.block.get("type")!r}, a block or activation that '
            "a record cannot rebuild; pass it: "
            f"replay(model, record, blocks={{{layer.name!r}: block}})."
        )
    try:
        arguments = dict(arguments)
        arguments["activation"] = _built_activation(arguments["activation"])
        if arguments.get("norm_layer") is not None:
            arguments["norm_layer"] = _NORM_LAYERS[arguments["norm_layer"]]
        with torch.random.fork_rng(devices=[]):
            return maker(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecordError(
            f'the record of the layer "{layer.name}" is damaged: {error!r}.'
        ) from error


def _shapes_from(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(int(size) for size in shape) for name, shape in content.items()}


def _described_block(block: nn.Module) -> dict[str, Any]:
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
