"""The record of what was inserted, as data that JSON can hold."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from constrained_growth import blocks
from constrained_growth._activations import TanhLU
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.errors import RecordError

_VERSION = 2


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
        placement: "wrapped" around the module, or "sibling", the next element of its list.
        pristine: A copy of the block as inserted; not part of the JSON text.
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
            raise RecordError(
                f"evidence={self.evidence!r:.200} cannot be written as JSON: {error}."
            ) from error

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
                    f"the growth record has version {version!r}, this library reads 1 and "
                    f"{_VERSION}; use the version of the library that wrote it."
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
    if not isinstance(output, int | str | None) or placement not in ("wrapped", "sibling"):
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
    if BLOCKS.get(type(block).__name__) is not type(block):
        return {"type": type(block).__qualname__, "arguments": None}
    arguments = dict(block.config())  # type: ignore[operator]
    arguments["activation"] = _described_activation(arguments["activation"])
    known, norm_layer = arguments["activation"] is not None, arguments.get("norm_layer")
    if norm_layer is not None:
        arguments["norm_layer"] = name = getattr(norm_layer, "__name__", "")
        known = known and NORM_LAYERS.get(name) is norm_layer
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
        known = ACTIVATION_MODULES.get(kind.__name__) is kind
        return {"module": kind.__name__, "arguments": plain} if known else None
    name = getattr(activation, "__name__", "")
    homes = [home for home, space in FUNCTIONS.items() if getattr(space, name, None) is activation]
    return {"function": f"{homes[0]}.{name}"} if homes else None


BLOCKS: dict[str, type[Any]] = {
    name: value for name, value in vars(blocks).items() if hasattr(value, "config")
}
"""The blocks of this library that know the arguments to rebuild them from."""

NORM_LAYERS: dict[str | None, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.BatchNorm2d, nn.SyncBatchNorm)
}
FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional, "torch.special": torch.special}
ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    name: cls
    for name, cls in {**vars(nn.modules.activation), "TanhLU": TanhLU}.items()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
}
