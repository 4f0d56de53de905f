"""A training run in one file, written whole or not at all, read without executing anything.

The file is in the safetensors format: all tensors, and beside them JSON text with the record of
the growth, the optimizer's settings, the states of rule and scheduler, and the random state. The
weights are found under `model/` and their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from constrained_growth.checkpoint.files import KEY, checksum, hint, read, write
from constrained_growth.checkpoint.optimizer_states import (
    check_named_state,
    load_named_state,
    named_state,
)
from constrained_growth.checkpoint.random_states import random_state, set_random_state
from constrained_growth.checkpoint.serialization import flattened, unflattened
from constrained_growth.errors import CheckpointError
from constrained_growth.insertion.records import GrowthRecord
from constrained_growth.insertion.replaying import replay
from constrained_growth.insertion.wrapping import rewrap
from constrained_growth.models.distributed import everywhere, rank, several
from constrained_growth.models.observation import generators_of, parameter_shapes
from constrained_growth.models.sharding import is_spread, reshard, spread_like, whole

_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a file: data only.

    Attributes:
        weights: The model's state dict.
        record: How the model grew.
        optimizer: The state by names of parameters, or None.
        states: Name → state of rule, scheduler, loader and what else was saved.
        random: The random state.
        step: As it was given to `save`.
        extra: As it was given to `save`.
        num_processes: How many there were. `states`, `random` and `extra` are those that this
            process had, or the first one's where it is not one of them.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    record: GrowthRecord
    optimizer: Mapping[str, Any] | None = field(repr=False)
    states: Mapping[str, Any] = field(repr=False)
    random: Mapping[str, Any] = field(repr=False)
    step: int
    extra: Any
    num_processes: int = 1


@dataclass(frozen=True)
class Resumed:
    """A training run as it was saved.

    Attributes:
        model: The model given, grown and with its values.
        optimizer: Made by the factory, with its memory.
        scheduler: Made by its factory, or None.
        checkpoint: What was read, with `record`, `step` and `extra`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    checkpoint: Checkpoint


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    record: GrowthRecord | None = None,
    step: int = 0,
    extra: object = None,
    **stateful: object,
) -> Path:
    """Write a checkpoint, whole or not at all; the one before it stays beside it.

    The file is written under another name (`path` + ".tmp"), brought to the disk (fsync) and
    renamed: at any moment, also when the process is killed while writing, `path` is a whole
    checkpoint, the old one or the new one. The old one then is `previous(path)`.

    With `torch.distributed` all processes call this, and the first one writes. Model, optimizer
    and record are the same on all of them (what is sharded is put together on the first); of
    `extra`, the states and the random state each process finds its own again.

    Args:
        path: Of the file; the folder exists.
        model: Its `state_dict()` is kept.
        optimizer: Its state is kept by the names of the parameters.
        record: How the model grew; None for a model that did not.
        step: Any number of yours that says when this was.
        extra: Anything of yours: numbers, text, None, lists, dicts, tensors.
        **stateful: Under names of your choice, such as `rule=`, `scheduler=`, `scaler=`,
            `loader=`: the `state_dict()` of what has one, the state of a `torch.Generator`, of the
            generators of a DataLoader, and nothing of what has none of these (a plain function).

    Returns:
        The path.

    Raises:
        CheckpointError: Something cannot be kept without executing code when it is read, or the
            file cannot be written; `path` is then what it was.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = save(folder.name + "/run.safetensors", nn.Linear(2, 1), step=7)
        >>> load(path).step
        7
        >>> folder.cleanup()
    """
    path = Path(path)
    reshard(model)
    common = {
        "model": _together(dict(model.state_dict())),
        "optimizer": None if optimizer is None else _together(named_state(optimizer, model)),
        "step": step,
    }

    def own() -> tuple[dict[str, Any], dict[str, Tensor]]:
        states = {name: _state_of(thing) for name, thing in stateful.items()}
        content = {"states": states, "random": random_state(), "extra": extra}
        return _flattened(content, f"process {rank(None)}/" if rank(None) else "")

    parts = everywhere(own, None)

    def write_all() -> None:
        data, tensors = _flattened(common)
        for _, found in parts:
            tensors.update(found)
        data |= parts[0][0]
        if len(parts) > 1:
            data["others"] = [part for part, _ in parts[1:]]
        data["record"] = (record or GrowthRecord((), parameter_shapes(model))).to_json()
        text = json.dumps(data)
        metadata = {"version": _VERSION, "checksum": checksum(text, tensors)}
        write(path, tensors, {KEY: json.dumps(metadata), "content": text})

    everywhere(write_all if rank(None) == 0 else _nothing, None)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: Of the file.

    Returns:
        What is in it. Give it to `restore`, or use its parts.

    Raises:
        CheckpointError: There is no such file, or it is damaged, foreign, or of another version
            of the format. The message says whether the checkpoint before it is there.
    """
    path = Path(path)
    try:
        tensors, metadata = read(path)
        header, text = json.loads(metadata[KEY]), metadata["content"]
        version = header["version"]
        if version != _VERSION:
            raise CheckpointError(
                f'path="{path}" has version {version!r} of the format, this library reads '
                f"{_VERSION}; use the version of the library that wrote it."
            )
        if header["checksum"] != checksum(text, tensors):
            raise ValueError("its content does not have the checksum that was written with it")
        data = json.loads(text)
        record = GrowthRecord.from_json(data.pop("record"))
        others = data.pop("others", [])
        if 0 < rank(None) <= len(others):
            data |= others[rank(None) - 1]
        content = unflattened(data, tensors)
        return Checkpoint(
            weights=content["model"],
            record=record,
            optimizer=content["optimizer"],
            states=content["states"],
            random=content["random"],
            step=content["step"],
            extra=content["extra"],
            num_processes=1 + len(others),
        )
    except FileNotFoundError:
        raise CheckpointError(f'path="{path}" does not exist.{hint(path)}') from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f'path="{path}" is no checkpoint as save() writes it, or is damaged: '
            f"{type(error).__name__}: {error}.{hint(path)}"
        ) from error


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **stateful: object,
) -> None:
    """Give model, optimizer and the rest the values of a checkpoint, and put the random state back.

    Args:
        checkpoint: From `load`.
        model: Of the same architecture: `replay(fresh_model, checkpoint.record)`.
        optimizer: Trains the same parameters; the order and its groups need not be the same.
        **stateful: As for `save`, under the same names. What was saved and is not given here is
            passed over.

    Raises:
        CheckpointError: The model has other parameters or buffers, the optimizer trains others,
            or something was not saved. Nothing is changed then.
    """
    _check_weights(model, checkpoint.weights)
    if optimizer is not None:
        if checkpoint.optimizer is None:
            raise CheckpointError(
                "optimizer: the checkpoint has no state of one; save(…, optimizer=…)."
            )
        check_named_state(optimizer, model, checkpoint.optimizer)
    for name in stateful:
        if name not in checkpoint.states:
            raise CheckpointError(
                f"{name}: the checkpoint has states of {sorted(checkpoint.states)} and none of "
                f'"{name}"; save it under that name: save(…, {name}=…).'
            )
    for name, thing in stateful.items():
        _give_state(name, thing, checkpoint.states[name])
    reshard(model)
    own = model.state_dict()
    model.load_state_dict({k: spread_like(v, own[k]) for k, v in checkpoint.weights.items()})
    if optimizer is not None and checkpoint.optimizer is not None:
        load_named_state(optimizer, model, checkpoint.optimizer)
    set_random_state(checkpoint.random)


def resume(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer_factory: Callable[[Any], torch.optim.Optimizer],
    *,
    scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    **stateful: object,
) -> Resumed:
    """Take up a training run where it was saved: the same numbers from there on, bit for bit.

    Grows the fresh model as the record says, makes the optimizer for it, and gives everything
    its values and the random state it had. With `torch.distributed` all processes call this, as
    many as saved it, with the model wrapped as it was (in DistributedDataParallel, by
    `fully_shard`); what is inserted is wrapped too, as by `rewrap`.

    Args:
        path: Of the file.
        model: As it was before the first insertion; changed in place.
        optimizer_factory: `optimizer_factory(model.parameters()) -> Optimizer`.
        scheduler_factory: `scheduler_factory(optimizer)`; its state is the one saved as
            `scheduler=`. None (default) for no scheduler.
        blocks: For blocks of your own, as for `replay`.
        **stateful: As for `restore`.

    Returns:
        Model, optimizer, scheduler and the checkpoint.

    Raises:
        CheckpointError: The file cannot be used, or does not fit; the model is as it was.
        RecordError: The record does not fit the model; it is as it was.
    """
    found: list[Checkpoint] = []
    everywhere(lambda: found.append(load(path)), None)
    (checkpoint,) = found
    processes = dist.get_world_size() if several(None) else 1
    if checkpoint.num_processes != processes:
        raise CheckpointError(
            f'path="{path}" was saved by {checkpoint.num_processes} processes, and there are '
            f"{processes}: how the data and the random numbers are shared out would not be the "
            "same. Start as many, or load it and restore the model and the optimizer alone."
        )
    places = [(module, dict(module._modules)) for module in model.modules()]
    try:
        replay(model, checkpoint.record, blocks=blocks)
        rewrap(model)
        optimizer = optimizer_factory(model.parameters())
        scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)
        if scheduler is not None:
            stateful = {**stateful, "scheduler": scheduler}
        restore(checkpoint, model, optimizer=optimizer, **stateful)
    except BaseException:
        for module, children in places:
            module._modules.clear()
            module._modules.update(children)
        raise
    return Resumed(model, optimizer, scheduler, checkpoint)


def _state_of(thing: Any) -> Any:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if hasattr(thing, "state_dict"):
        return thing.state_dict()
    return [generator.get_state() for generator in generators_of(thing)]


def _give_state(name: str, thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(state)
    else:
        generators = generators_of(thing)
        if len(generators) != len(state):
            raise CheckpointError(
                f"{name}: the checkpoint has the state of {len(state)} generators, and it has "
                f"{len(generators)}; make it as it was when it was saved."
            )
        for generator, kept in zip(generators, state, strict=True):
            generator.set_state(kept)


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    have = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
    want = {name: getattr(value, "shape", None) for name, value in weights.items()}
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"model={type(model).__name__} does not fit the checkpoint: {len(differing)} entries "
            f'of the state dict differ, first "{first}" with shape {have.get(first)}, in the '
            f"checkpoint {want.get(first)}. Give the architecture that was saved: "
            "cg.replay(fresh_model, checkpoint.record)."
        )


def _flattened(content: Mapping[str, Any], place: str = "") -> tuple[dict[str, Any], Any]:
    """The items of the content, as JSON can hold them, and the tensors of all."""
    data: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, item in content.items():
        data[name], found = flattened(item, place + name)
        tensors.update(found)
    return data, tensors


def _together(tree: Any) -> Any:
    """Nested data with the tensors that are spread over processes put together on the first."""

    def one(leaf: Any) -> Any:
        if not is_spread(leaf):
            return leaf
        tensor = whole(leaf.detach())
        return tensor.cpu() if rank(None) == 0 else None

    return tree_map(one, tree)


def _nothing() -> None:
    pass
