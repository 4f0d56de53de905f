"""Results of long computations in a folder, so that an interrupted study resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import joblib
from torch import Tensor

Result = TypeVar("Result")


def cached(folder: Path | None, key: str, compute: Callable[[], Result]) -> Result:
    """What was computed before under this key, or else computed and stored; None stores nothing.

    The key has to change with everything that the result depends on.
    """
    if folder is None:
        return compute()
    file = cache_file(folder, key)
    if not file.exists():
        unfinished = file.with_suffix(".part")  # so that a file that exists is complete
        joblib.dump(compute(), unfinished, compress=1)
        unfinished.replace(file)
    return joblib.load(file)


def cache_file(folder: Path, key: str) -> Path:
    """Where the result of a key is stored."""
    return folder / f"{key}.joblib"


def digest(name: str, settings: str, *tensors: Tensor) -> str:
    """A key that changes with the settings and with the tensors, and starts with the name."""
    found = hashlib.sha256(settings.encode())
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return f"{name}-{found.hexdigest()[:16]}"
