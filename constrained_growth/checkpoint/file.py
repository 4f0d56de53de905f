"""The file format: safetensors, named as `model/0.weight`, with nested data as JSON metadata.

In the JSON text `{"$tensor": name}` stands for a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from constrained_growth._arguments import instance
from constrained_growth.errors import CheckpointError

_KEY = "constrained_growth"
_VERSION = 1


def as_path(path: str | os.PathLike[str]) -> Path:
    """The name of a file as a path; a CheckpointError where it is none."""
    found = Path(instance("path", path, (str, os.PathLike), CheckpointError, "the name of a file"))
    if not found.name or found.is_dir():
        raise CheckpointError(f'path="{path}" is a folder; give the name of a file in it.')
    return found


def previous(path: str | os.PathLike[str]) -> Path:
    """Where `save` keeps the checkpoint that it replaced.

    Raises:
        CheckpointError: `path` is not the name of a file.
    """
    path = as_path(path)
    return path.with_name(path.name + ".previous")


def write(path: Path, data: object, tensors: dict[str, Tensor]) -> None:
    """Write a new file, then let it take the place of the old one, which is kept."""
    text = json.dumps(data)
    header = json.dumps({"version": _VERSION, "checksum": _checksum(text, tensors)})
    # in the same folder, since a file is renamed in one step within one file system only
    second, folder = (path.with_name(path.name + end) for end in (".link", ".tmp"))
    unfinished = folder / path.name
    try:
        # safetensors writes to a file beside it, which only this folder tells from others' if the
        # process is killed
        _remove(folder)
        folder.mkdir()
        safetensors.torch.save_file(tensors, unfinished, {_KEY: header, "content": text})
        _flush_to_disk(unfinished)  # or after a power cut the new name may lead to an empty file
        if path.exists():
            _keep(path, second)
        os.replace(unfinished, path)
        if hasattr(os, "O_DIRECTORY"):
            _flush_to_disk(path.parent)  # the new name is on the disk only then
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f'path="{path}" cannot be written: {type(error).__name__}: {error}; give a file in a '
            "folder that exists, on a disk with room."
        ) from error
    finally:
        _remove(folder)
        with suppress(OSError):  # after an error
            second.unlink()


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The JSON data and the tensors of a file; raises whatever error it meets in a damaged one."""
    while True:
        before = _identity(path)
        try:
            return _read(path)
        except Exception:
            # safetensors opens the path twice; another process may have saved in between
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if _KEY not in metadata:
            raise ValueError("it is a file of another program")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header, text = json.loads(metadata[_KEY]), metadata["content"]
    if header["version"] != _VERSION:
        raise CheckpointError(
            f'path="{path}" has version {header["version"]!r}, this library reads {_VERSION}.'
        )
    if header["checksum"] != _checksum(text, tensors):
        raise ValueError("its content does not have the checksum that was written with it")
    return json.loads(text), tensors


def _keep(path: Path, second: Path) -> None:
    """Keep the checkpoint to be replaced under another name; both files stay whole throughout."""
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a disk without hard links
        shutil.copyfile(path, second)
        _flush_to_disk(second)
    os.replace(second, previous(path))  # does nothing if both are already the same file


def _remove(folder: Path) -> None:
    """What an earlier call has left, or this one."""
    with suppress(OSError):
        folder.unlink()  # of version 0.1
    shutil.rmtree(folder, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the text and of the names, dtypes, shapes and bytes of the tensors."""
    # safetensors checks lengths, not content; against accidents, for which 32 bits do
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def flattened(tree: object, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """Nested data for JSON, with the tensors in a table; `seen` maps places in memory to names."""
    # PyTorch's pytree cannot serve: its JSON form turns the tuples among the keys of a dict into
    # lists and knows no Counter, of which MultiStepLR's state has one.
    for kind in (bool, int, float, str):
        if isinstance(tree, kind):
            return kind(tree)  # JSON would write subclasses, such as enums, in another way
    if tree is None:
        return None
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, Tensor):
        return {"$tensor": _added(tree.detach(), path, tensors, seen)}
    if isinstance(tree, np.ndarray):
        try:
            return {"$array": _added(torch.from_numpy(tree.copy()), path, tensors, {})}
        except TypeError as error:
            raise CheckpointError(f"{path} is an array of {tree.dtype}: {error}.") from error
    if isinstance(tree, list | tuple):
        items = [flattened(x, f"{path}/{i}", tensors, seen) for i, x in enumerate(tree)]
        return {"$tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping):
        values = [flattened(x, f"{path}/{key}", tensors, seen) for key, x in tree.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
        if plain and not isinstance(tree, Counter):
            return dict(zip(tree, values, strict=True))
        keys = [flattened(key, path, tensors, seen) for key in tree]
        tag = "$counter" if isinstance(tree, Counter) else "$dict"
        return {tag: [list(pair) for pair in zip(keys, values, strict=True)]}
    raise CheckpointError(
        f"{path} is a {type(tree).__qualname__}, which cannot be kept without executing code when "
        "it is read; a state_dict() for a checkpoint holds numbers, text, lists, dicts and tensors."
    )


def unflattened(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested data that `flattened` was given."""
    if isinstance(data, list):
        return [unflattened(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        ((tag, content),) = data.items()
        if tag in ("$tensor", "$array"):
            return tensors[content] if tag == "$tensor" else tensors[content].numpy()
        if tag == "$tuple":
            return tuple(unflattened(content, tensors))
        if tag in ("$dict", "$counter"):
            pairs = {unflattened(k, tensors): unflattened(v, tensors) for k, v in content}
            return Counter(pairs) if tag == "$counter" else pairs
    return {key: unflattened(item, tensors) for key, item in data.items()}


def _added(tensor: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    """Add a tensor to the table, once for each place in memory; returns its name there."""
    # tied weights are written once, and read as one tensor
    place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
    if tensor.numel() and place in seen:
        return seen[place]
    name, number = path, 1
    while name in tensors:
        name, number = f"{path}#{number}", number + 1
    # safetensors refuses tensors that share memory
    storage = tensor.untyped_storage().data_ptr()
    own = tensor.is_contiguous() and storage not in seen
    tensors[name] = (tensor if own else tensor.clone(memory_format=torch.contiguous_format)).cpu()
    seen[place] = seen[storage] = name
    return name
