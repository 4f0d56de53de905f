"""The record of what was inserted, as data that JSON can hold, and its replay."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from torch import Tensor, nn

from constrained_growth._arguments import flag, instance
from constrained_growth._sites.model import list_of, parameter_shapes
from constrained_growth._sites.placement import Placement, place, undoing, wrapper_for
from constrained_growth._sites.snapshot import deepcopied
from constrained_growth._sites.wrapper import without_inserted
from constrained_growth.blocks import CopiedBlock
from constrained_growth.blocks.copied import standalone_form
from constrained_growth.blocks.protocol import REGISTERED
from constrained_growth.bookkeeping import open_books
from constrained_growth.errors import RecordError
from constrained_growth.insertion.description import built_block, built_copy, first_difference
from constrained_growth.solution import listed

_VERSION = 3
"""1 had no `placement` and `output`; 2 neither "joined" nor the `settings` of a copy."""


@dataclass(frozen=True)
class InsertedLayer:
    """One inserted layer.

    Attributes:
        name: Name of its candidate.
        after: Qualified name of the module it follows, at the moment of its insertion.
        block: How to rebuild the block: its `type`, and `arguments` that JSON can hold; for a copy
            also `of` which module, and the `settings` that it had. Where `arguments` is None, for
            the `reason` given, pass the block to `replay`.
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
    placement: Placement = "wrapped"
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
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
        GrowthRecord(nothing inserted)
    """

    insertions: tuple[InsertedLayer, ...] = ()
    model: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    difference: Mapping[str, float] = field(default_factory=dict)
    evidence: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        layers = [
            f"{one.block.get('type')} after {one.after!r}"
            + (f" as {one.name!r}" if one.name != one.after else "")
            for one in self.insertions
        ]
        return f"GrowthRecord({listed(layers) or 'nothing inserted'})"

    def __add__(self, other: GrowthRecord) -> GrowthRecord:
        both = [*self.difference.items(), *other.difference.items()]
        return GrowthRecord(
            self.insertions + other.insertions,
            self.model,
            {mode: max(d for m, d in both if m == mode) for mode, _ in both},
            self.evidence + other.evidence,
        )

    def new_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The names in the grown model and the parameters of the layers inserted.

        Args:
            model: As it was after the last insertion of the record.

        Raises:
            RecordError: The model did not grow by this record alone.

        Example:
            Train the new layers alone, and freeze the rest:

            >>> import torch
            >>> import constrained_growth as cg
            >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
            >>> data = [(torch.randn(8, 2), torch.randn(8, 4))]
            >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
            >>> problem = cg.GrowthProblem(net, nn.MSELoss(), data, [candidate])
            >>> record = cg.insert(net, cg.solve(problem))
            >>> new = dict(record.new_parameters(net))
            >>> for name, parameter in net.named_parameters():
            ...     _ = parameter.requires_grad_(name in new)
            >>> list(new)
            ['1.inserted.weight', '1.inserted.bias']
        """
        instance("model", model, nn.Module, RecordError, "the grown model")
        record = _without_wrappers(self, model)
        old = set(record.model)
        for layer in record.insertions:
            old = _names_afterwards(old, layer)
        new = [(name, p) for name, p in model.named_parameters() if name not in old]
        expected = [shape for layer in record.insertions for shape in layer.parameters.values()]
        # names of old parameters stay where a later layer goes in after one without any
        as_recorded = sorted(tuple(p.shape) for _, p in new) == sorted(expected)
        if not as_recorded or not old <= dict(model.named_parameters()).keys():
            raise RecordError(
                f"model={type(model).__name__} has {len(new)} parameters beside the old ones, and "
                f"the record inserted {len(expected)}; give the model as it was then, or the sum "
                "of the records of all rounds."
            )
        return new

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
            if version not in range(1, _VERSION + 1):
                raise RecordError(
                    f"the record has version {version!r}, this library reads 1 to {_VERSION}."
                )
            model = _shapes_from(content["model"])
            layers = tuple(_layer_from(item) for item in content["insertions"])
            difference = {str(m): float(d) for m, d in content.get("difference", {}).items()}
            evidence = tuple(dict(item) for item in content.get("evidence", ()))
        except _NO_RECORD as error:
            raise RecordError(
                f"text is no growth record as of to_json(): {error!r:.200}."
            ) from error
        return cls(layers, model, difference, evidence)


_NO_RECORD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _names_afterwards(names: set[str], layer: InsertedLayer) -> set[str]:
    """The names of old parameters after an insertion."""
    owner, _, place = layer.after.rpartition(".")
    prefix = f"{owner}." if owner else ""
    base = "base"
    while any(f"{name}.".startswith(f"{layer.after}.{base}.") for name in names):
        base += "_"  # as in a wrapper around a module that has this name itself

    def afterwards(name: str) -> str:
        if layer.placement == "sibling" and name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if number.isdigit() and int(number) > int(place):
                return f"{prefix}{int(number) + 1}.{rest}"
        if layer.placement == "wrapped" and name.startswith(f"{layer.after}."):
            return f"{layer.after}.{base}.{name.removeprefix(f'{layer.after}.')}"
        return name

    return {afterwards(name) for name in names}


def _layer_from(item: Mapping[str, Any]) -> InsertedLayer:
    output, placement = item.get("output"), item.get("placement", "wrapped")
    is_place = isinstance(output, int | str | None) and not isinstance(output, bool)
    if not is_place or placement not in get_args(Placement):
        raise ValueError(f"output={output!r}, placement={placement!r}")
    name, after, overwritten = item["name"], item["after"], item["overwritten"]
    if not (isinstance(name, str) and isinstance(after, str) and isinstance(overwritten, bool)):
        raise ValueError(f"name={name!r}, after={after!r}, overwritten={overwritten!r}")
    block, parameters = dict(item["block"]), _shapes_from(item["parameters"])
    return InsertedLayer(name, after, block, parameters, overwritten, output, placement)


def _shapes_from(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(shape) for name, shape in content.items()}
    if any(type(size) is not int or size < 0 for shape in shapes.values() for size in shape):
        raise ValueError(f"sizes that are no whole numbers: {shapes!r:.100}")
    return shapes


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
        blocks: Name of the inserted layer → block, for what a record read from JSON cannot
            rebuild: activations of your own, and blocks whose class is not registered by
            `constrained_growth.blocks.register`.
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
    instance("model", model, nn.Module, RecordError, "the model as it was before it was grown")
    instance("record", record, GrowthRecord, RecordError, "one, or GrowthRecord.from_json(text)")
    given = instance("blocks", blocks or {}, Mapping, RecordError, "name → block")
    for name, block in given.items():
        instance(f"blocks[{name!r}]", block, nn.Module, RecordError, "the block of that layer")
    flag("strict", strict, RecordError)
    record = _without_wrappers(record, model)
    differing = first_difference(parameter_shapes(model), record.model)
    if strict and differing:
        raise RecordError(
            f"model={type(model).__name__} does not fit the record: its parameter {differing} in "
            "the record. Give the model as it was before it was grown, or strict=False."
        )
    _check_size(record, model, given)
    books = open_books(model)
    with undoing([model]):
        for layer in record.insertions:
            _insert_again(model, layer, given.get(layer.name))
        books.update()
    return model


def _check_size(record: GrowthRecord, model: nn.Module, given: Mapping[str, nn.Module]) -> None:
    """Refuse a record that builds blocks of another order of size than the model."""
    described = [one for one in record.insertions if not (one.pristine or one.name in given)]
    described = [one for one in described if one.block.get("type") != CopiedBlock.__qualname__]
    new = sum(math.prod(shape) for one in described for shape in one.parameters.values())
    # a record from elsewhere may name any width, which would be allocated
    own = sum(parameter.numel() for parameter in model.parameters())
    most = max(2**24, 16 * own)
    if new > most:
        raise RecordError(
            f"record: its layers have more than {most:,} parameters, and "
            f"model={type(model).__name__} has {own:,}. If that is meant, pass the blocks: "
            f"blocks={{{described[0].name!r}: block, …}}."
        )


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


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)


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
    if layer.placement == "sibling" and list_of(model, site) is None:
        raise RecordError(
            f'model: "{layer.after}", the site of the layer "{layer.name}" in the record, is '
            "no element of an nn.ModuleList or nn.Sequential."
        )
    if layer.placement == "joined" and wrapper_for(model, site) is None:
        raise RecordError(
            f'model: at "{layer.after}", the site of the layer "{layer.name}" in the record, '
            "joined others that are not there; replay the records of all rounds in their order."
        )
    place(model, site, block, layer.placement, layer.output, layer.overwritten)


def _rebuilt(
    layer: InsertedLayer, given: nn.Module | None, site: nn.Module, model: nn.Module
) -> nn.Module:
    """The block given, the one that the record still holds, or one made from its description."""
    described, is_sibling = layer.block, layer.placement == "sibling"
    if given is not None:
        block = deepcopied(given)
        stands_alone = is_sibling and callable(getattr(block, "standalone", None))
        return standalone_form(block) if stands_alone else block
    if layer.pristine is not None:
        return deepcopied(layer.pristine)
    kind = str(described.get("type"))
    if described.get("arguments") is None or kind not in REGISTERED:
        why = described.get("reason", "its class is not registered in this process")
        raise RecordError(
            f'the layer "{layer.name}" is {kind!r}, which a record cannot rebuild ({why}); pass '
            f"it: replay(model, record, blocks={{{layer.name!r}: block}}). For classes of your "
            "own with a method config() see constrained_growth.blocks.register."
        )
    try:
        if kind != CopiedBlock.__qualname__:
            return built_block(REGISTERED[kind], dict(described["arguments"]), layer.parameters)
        block = built_copy(described, without_inserted(site), model)
        return block.standalone() if is_sibling else block
    except Exception as error:
        raise RecordError(
            f'record: the layer "{layer.name}" cannot be built: {error!s:.300}. Give the model as '
            f"it was before it was grown, or the block: blocks={{{layer.name!r}: block}}."
        ) from error
