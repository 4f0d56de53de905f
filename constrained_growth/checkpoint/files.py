"""Files that are written whole or not at all, and the one before kept beside them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from constrained_growth.errors import CheckpointError

KEY = "constrained_growth"
VERSION = 1
"""Of the format."""


def previous(path: str | os.PathLike[str]) -> Path:
    """Where `save` keeps the checkpoint that it replaced."""
    path = Path(path)
    return path.with_name(path.name + ".previous")


def checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over the text and the names, kinds and bytes of the tensors."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Under another name first; then it takes the place of the one before, which is kept."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, unfinished, metadata)
        _bring_to_disk(unfinished)
        if path.exists():
            _keep(path)
        os.replace(unfinished, path)
        if hasattr(os, "O_DIRECTORY"):
            _bring_to_disk(path.parent)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f'path="{path}" cannot be written: {type(error).__name__}: {error}; give a file in a '
            "folder that exists, on a disk with room."
        ) from error


def _keep(path: Path) -> None:
    """A second name for the checkpoint that is about to be replaced; both stay whole throughout."""
    second = path.with_name(path.name + ".link")
    second.unlink(missing_ok=True)
    os.link(path, second)
    os.replace(second, previous(path))
    second.unlink(missing_ok=True)  # still there when both names were the same file already


def _bring_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; a ValueError for a file of another program."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise ValueError("it is a file of another program")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def hint(path: Path) -> str:
    """Where the checkpoint before a damaged one is, as the end of a message."""
    before = previous(path)
    return f' The checkpoint before it is "{before}".' if before.exists() else ""
