"""Long computations: some at a time, and kept in a folder: an interrupted study resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import joblib
from torch import Tensor

from constrained_growth._progress import progress_bar
from constrained_growth.experiments.timing import one_thread

Result = TypeVar("Result")


def in_parallel(
    function: Callable[..., Result],
    jobs: Iterable[tuple[Any, ...]],
    workers: int,
    *,
    desc: str,
    unit: str,
) -> list[Result]:
    """The function of each job's arguments, in their order; each on one thread, below a bar."""
    calls = [joblib.delayed(_on_one_thread)(function, job) for job in jobs]
    workers = max(1, min(workers, len(calls), joblib.cpu_count()))
    parallel: Any = joblib.Parallel(n_jobs=workers, return_as="generator")(calls)
    return list(progress_bar(parallel, desc=desc, unit=unit, total=len(calls)))


def _on_one_thread(function: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    with one_thread():
        return function(*job)


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
