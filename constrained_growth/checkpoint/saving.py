"""Write a training run to one file.

The file is in the safetensors format: all tensors, and beside them JSON text with the record of
the growth, the optimizer's settings, the states of rule and scheduler, and the random state. The
weights are found under `model/` and their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from constrained_growth._distributed import everywhere, rank
from constrained_growth._sharding import is_spread, reshard, whole
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.checkpoint.files import KEY, VERSION, checksum, write
from constrained_growth.checkpoint.optimizer_states import named_state
from constrained_growth.checkpoint.random_states import random_state
from constrained_growth.checkpoint.serialization import flattened
from constrained_growth.checkpoint.states import state_of
from constrained_growth.insertion.record import GrowthRecord


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
        >>> from constrained_growth.checkpoint import load
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
        states = {name: state_of(thing) for name, thing in stateful.items()}
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
        metadata = {"version": VERSION, "checksum": checksum(text, tensors)}
        write(path, tensors, {KEY: json.dumps(metadata), "content": text})

    everywhere(write_all if rank(None) == 0 else _nothing, None)
    return path


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
