"""Read a training run from its file, without executing anything."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from constrained_growth._distributed import rank
from constrained_growth.checkpoint.files import KEY, VERSION, checksum, hint, read
from constrained_growth.checkpoint.serialization import unflattened
from constrained_growth.errors import CheckpointError
from constrained_growth.insertion.record import GrowthRecord


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
        if version != VERSION:
            raise CheckpointError(
                f'path="{path}" has version {version!r} of the format, this library reads '
                f"{VERSION}; use the version of the library that wrote it."
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
