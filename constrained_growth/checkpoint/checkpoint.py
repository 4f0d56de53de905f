"""Save a training run to one file, and resume it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from constrained_growth._arguments import function, instance, integer
from constrained_growth._distributed import everywhere, num_processes, rank
from constrained_growth._random_state import random_state, set_random_state
from constrained_growth._sharding import is_spread, reshard, whole
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.placement import undoing
from constrained_growth.checkpoint.file import (
    as_path,
    flattened,
    previous,
    read,
    unflattened,
    write,
)
from constrained_growth.checkpoint.optimizer_state import (
    check_named_state,
    load_named_state,
    named_state,
    parameter_names,
)
from constrained_growth.checkpoint.states import (
    check_weights,
    load_weights,
    set_state,
    state_of,
)
from constrained_growth.errors import CheckpointError, GrowthError
from constrained_growth.insertion.distributed import rewrap
from constrained_growth.insertion.record import GrowthRecord, replay
from constrained_growth.insertion.training_state import (
    Copies,
    as_copies,
    as_optimizers,
    groups_and_states,
    grown_in,
)

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file: data only.

    Attributes:
        weights: The model's state dict.
        record: How the model grew.
        optimizer: The state by names of parameters, a list of them for several optimizers, or
            None.
        averaged: The state dicts of the averaged copies.
        states: Name → state of rule, scheduler, loader and whatever else was saved.
        random: The random state.
        step, extra: As given to `save`.
        num_processes: How many processes saved it. `states`, `random` and `extra` are those of
            this process, or of the first one if there was no such process.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    record: GrowthRecord
    optimizer: Any = field(repr=False)
    states: Mapping[str, Any] = field(repr=False)
    random: Mapping[str, Any] = field(repr=False)
    step: int
    extra: Any
    num_processes: int = 1
    averaged: Sequence[Mapping[str, Tensor]] = field(default=(), repr=False)


@dataclass(frozen=True)
class Resumed:
    """A training run resumed: the model that was given, what the factories made, what was read."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    checkpoint: Checkpoint


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizers | None = None,
    averaged: Copies = (),
    record: GrowthRecord | None = None,
    step: int = 0,
    extra: object = None,
    **stateful: object,
) -> Path:
    """Write a checkpoint, whole or not at all; the one before it is kept as `previous(path)`.

    Even if the process is killed while writing, `path` is a whole checkpoint, the old one or the
    new one: the file is written under another name, flushed to the disk and renamed.

    With `torch.distributed` all processes call this, and the first one writes. Model, optimizer
    and record are the same on all of them (sharded tensors are gathered on the first); each
    process later gets back its own `extra`, states and random state.

    Args:
        path: The file; its folder exists.
        model: Its `state_dict()` is saved.
        optimizer: One or several; their state is saved by the names of the parameters.
        averaged: Copies of the model that grew too, as for `insert`: their `state_dict()`.
        record: How the model grew; by default that of a `Grower` among the `stateful`, and else
            that of a model that did not grow.
        step: Any number that tells when this was.
        extra: Any numbers, text, None, lists, dicts and tensors.
        **stateful: Under names of your choice, such as `rule=`, `scheduler=`, `scaler=`,
            `loader=`: the `state_dict()` of an object that has one, the state of a
            `torch.Generator`, those of the generators of a DataLoader, a list of such states for
            a list or a tuple; else nothing.

    Returns:
        The path.

    Raises:
        CheckpointError: Something cannot be kept without executing code when it is read, or the
            file cannot be written; `path` is then what it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(folder + "/run.safetensors", nn.Linear(2, 1), step=7)).step
        7
    """
    _check_model(model)
    instance("record", record, GrowthRecord, CheckpointError, "that of insert", optional=True)
    integer("step", step, CheckpointError, 0)
    owned = [record, *(getattr(thing, "record", None) for thing in stateful.values())]
    records = [one for one in owned if isinstance(one, GrowthRecord)]
    record = records[0] if records else GrowthRecord((), parameter_shapes(model))
    path, here = as_path(path), rank(None)
    reshard(model)
    states = [named_state(one, parameter_names(one, model)) for one in as_optimizers(optimizer)]
    alone = optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    common: dict[str, Any] = {
        "model": _gathered(dict(model.state_dict())),
        "optimizer": _gathered(next(iter(states), None) if alone else states),
        "averaged": [_gathered(dict(one.state_dict())) for one in as_copies(averaged)],
    }
    data = dict[str, Any]()
    tensors, seen = dict[str, Tensor](), dict[Any, str]()  # of the model: not sent to the others

    def own() -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not here:
            data.update(_flattened({**common, "step": step}, "", tensors, seen))
        # each process has a random state, a loader and a seed of its own
        states = {name: state_of(thing) for name, thing in stateful.items()}
        content = {"states": states, "random": random_state(), "extra": extra}
        found = dict[str, Tensor]()
        return _flattened(content, f"process {here}/" if here else "", found, seen), found

    parts = everywhere(own, None)  # whatever cannot be kept is found before a file is touched

    def write_all() -> None:
        data.update(parts[0][0])
        for _, found in parts:
            tensors.update(found)
        if len(parts) > 1:
            data["others"] = [part for part, _ in parts[1:]]
        data["record"] = record.to_json()
        write(path, data, tensors)

    everywhere(lambda: None if here else write_all(), None)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, for `restore` or to use its parts; nothing in it is executed.

    Raises:
        CheckpointError: There is no such file, or it is damaged, foreign, or of another version
            of the format. The message says if the checkpoint before it exists.
    """
    path = as_path(path)
    hint = f' The checkpoint before it is "{previous(path)}".' if previous(path).exists() else ""
    try:
        data, tensors = read(path)
        record = GrowthRecord.from_json(data.pop("record"))
        others = data.pop("others", [])
        if 0 < rank(None) <= len(others):
            data |= others[rank(None) - 1]
        content = unflattened(data, tensors)
        keys = ("optimizer", "states", "random", "step", "extra")
        return Checkpoint(
            content["model"],
            record,
            *(content[key] for key in keys),
            num_processes=1 + len(others),
            averaged=content.get("averaged", []),  # files of version 0.1.0 have none
        )
    except FileNotFoundError:
        raise CheckpointError(f'path="{path}" does not exist.{hint}') from None
    except GrowthError:
        raise
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise CheckpointError(
            f'path="{path}" is no checkpoint as save() writes it, or is damaged: '
            f"{type(error).__name__}: {error!s:.200}.{hint}"
        ) from error


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    optimizer: Optimizers | None = None,
    averaged: Copies = (),
    **stateful: object,
) -> None:
    """Load a checkpoint into model, optimizer and the rest, and restore the random state.

    Args:
        checkpoint: From `load`.
        model: `replay(fresh_model, checkpoint.record)`.
        optimizer: Trains the same parameters; their order and the groups may differ. As many as
            were saved.
        averaged: As many copies as were saved, grown as the model is.
        **stateful: As for `save`, under the same names; other saved states are ignored.

    Raises:
        CheckpointError: The model has other parameters or buffers, the optimizer trains others,
            or something was not saved or cannot be loaded. The model is as it was then.
    """
    instance("checkpoint", checkpoint, Checkpoint, CheckpointError, "what load returned")
    _check_model(model)
    optimizers, copies = as_optimizers(optimizer), as_copies(averaged)
    states: Any = checkpoint.optimizer or []
    states = states if isinstance(states, list) else [states]
    # everything that can fail comes before the weights: the model is the last to change
    now = random_state()
    try:
        _check_number("optimizer", optimizers or states, states)
        _check_number("averaged", copies or checkpoint.averaged, checkpoint.averaged)
        for name in stateful:
            if name not in checkpoint.states:
                known = sorted(checkpoint.states)
                raise CheckpointError(f"{name}: only {known} were saved; save(…, {name}=…).")
        pairs = [(model, checkpoint.weights), *zip(copies, checkpoint.averaged, strict=False)]
        set_random_state(checkpoint.random)  # tried, as the file may hold any; `finally` undoes it
        for one, weights in pairs:
            check_weights(one, weights)
        for one, state in zip(optimizers, states, strict=False):
            check_named_state(one, model, state)
        loaded: list[tuple[str, Any, Any]] = []
        try:
            with undoing([], *map(vars, optimizers), *groups_and_states(optimizers)):
                for name, thing in stateful.items():
                    before = copy.deepcopy(state_of(thing))
                    set_state(name, thing, checkpoint.states[name])
                    loaded.append((name, thing, before))
                for one, state in zip(optimizers, states, strict=False):
                    load_named_state(one, model, state)
                reshard(model)
                load_weights(pairs)
        except BaseException:
            for each in loaded:
                set_state(*each)
            raise
    except GrowthError:
        raise
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise CheckpointError(
            f"checkpoint: it does not hold what save() writes ({error!r:.200}); give another file."
        ) from error
    finally:
        set_random_state(now)
    set_random_state(checkpoint.random)


def resume(
    path: str | os.PathLike[str] | Checkpoint,
    model: nn.Module,
    optimizer_factory: Callable[[Any], Optimizers],
    *,
    scheduler_factory: Callable[[Any], Any] | None = None,
    averaged: Copies = (),
    blocks: Mapping[str, nn.Module] | None = None,
    **stateful: object,
) -> Resumed:
    """Resume a training run: from there on the numbers are the same, bit for bit.

    With `torch.distributed` all processes call this, as many as saved it, with the model wrapped
    as it was (in DistributedDataParallel, by `fully_shard`); new layers are wrapped too, as by
    `rewrap`.

    Args:
        path: The file, or what `load` read from it.
        model: As it was before the first insertion; changed in place.
        optimizer_factory: `optimizer_factory(model.parameters()) -> Optimizer`, or several.
        scheduler_factory: `scheduler_factory(optimizer)`, called with what the other factory
            returned; the state is the one saved as `scheduler=`. None (default) for no scheduler.
        averaged: Copies of the model before the first insertion; they grow too.
        blocks: Your own blocks, as for `replay`.
        **stateful: As for `restore`.

    Raises:
        CheckpointError: The file cannot be used, or does not fit; the model is as it was.
        RecordError: The record does not fit the model; it is as it was.
    """
    _check_model(model)
    example = "functools.partial(torch.optim.Adam, lr=1e-3)"
    function("optimizer_factory", optimizer_factory, CheckpointError, example, or_class=True)
    given = "scheduler_factory", scheduler_factory, CheckpointError
    function(*given, optional=True, or_class=True)
    found: list[Checkpoint] = [path] if isinstance(path, Checkpoint) else []
    everywhere(lambda: found or found.append(load(path)), None)  # type: ignore[arg-type]
    checkpoint, now = found[0], num_processes(None)
    if checkpoint.num_processes != now:
        raise CheckpointError(
            f"path: the run was saved by {checkpoint.num_processes} processes, and there are "
            f"{now}. Start as many, or restore model and optimizer alone."
        )
    copies = as_copies(averaged)
    _check_number("averaged", copies, checkpoint.averaged)
    models = [model, *map(grown_in, copies)]
    with undoing(models):
        for one in models:
            replay(one, checkpoint.record, blocks=blocks)
        rewrap(model)
        optimizer = optimizer_factory(model.parameters())
        scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)
        if scheduler is not None:
            stateful = {**stateful, "scheduler": scheduler}
        restore(checkpoint, model, optimizer=optimizer, averaged=averaged, **stateful)
    return Resumed(model, optimizer, scheduler, checkpoint)


def _check_model(model: nn.Module) -> None:
    instance("model", model, nn.Module, CheckpointError, "the network")


def _check_number(name: str, given: Sequence[object], saved: Sequence[object]) -> None:
    if len(given) != len(saved):
        have = f"the state of {len(saved)}" if saved else "no state of one"
        raise CheckpointError(
            f"{name}: {len(given)} to restore, and in the checkpoint there is {have}; give as many "
            f"to save(…, {name}=…) as here."
        )


def _flattened(
    content: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor], seen: dict[Any, str]
) -> dict[str, Any]:
    try:
        return {name: flattened(x, prefix + name, tensors, seen) for name, x in content.items()}
    except (RuntimeError, TypeError) as error:  # sparse tensors, lists in themselves
        raise CheckpointError(
            f"{', '.join(content)}: something in it cannot be kept ({error!s:.200}); give numbers, "
            "text, lists, dicts and dense tensors."
        ) from error


def _gathered(tree: Any) -> Any:
    """Nested data, with tensors that are sharded over processes whole on the first of them."""

    def one(leaf: Any) -> Any:
        tensor = whole(leaf.detach()).cpu() if is_spread(leaf) else leaf
        return None if is_spread(leaf) and rank(None) else tensor

    return tree_map(one, tree)
