"""Times that can be compared: paired runs on one thread, medians of ratios, and the machine."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where times were taken.

    Attributes:
        processor: Its name.
        instructions: The vector instructions that PyTorch uses.
        cores: How many this process may use.
        threads: How many PyTorch used.
        system: Operating system.
        python: Version.
        torch: Version.
        allocator: What memory comes from; matters where tensors are made and dropped quickly.
    """

    processor: str
    instructions: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    allocator: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, as it is set now."""
        return cls(
            processor=_processor(),
            instructions=torch.backends.cpu.get_cpu_capability(),
            cores=_cores(),
            threads=torch.get_num_threads(),
            system=platform.system(),
            python=platform.python_version(),
            torch=torch.__version__,
            allocator=_allocator(),
        )

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return (
            f"{self.processor} ({self.instructions}), {self.cores} cores, {threads}; torch "
            f"{self.torch}, Python {self.python}, {self.system}; {self.allocator}"
        )


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From two numbers or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Effort:
    """How long to go on with one cell.

    Attributes:
        fewest: Rounds in any case.
        most: Rounds at most.
        seconds: No further round after so many.
    """

    fewest: int
    most: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Times of some runs against a first one, round by round.

    Attributes:
        seconds: Median time of the first run.
        ratios: Name → time of each other run over that of the first one in the same round.
        rounds: How many rounds there were.
    """

    seconds: float
    ratios: Mapping[str, Spread]
    rounds: int


def compare(runs: Mapping[str, Callable[[], object]], effort: Effort) -> Comparison:
    """Time some runs in turn, forwards and backwards, so that drifts of the machine cancel.

    The garbage collector is left as it is. Nothing is run to warm up.

    Args:
        runs: Name → what to time; the first one is what the others are compared with.
        effort: How many rounds.
    """
    names, rounds = list(runs), list[dict[str, float]]()
    begin = time.perf_counter()
    while len(rounds) < effort.fewest or (
        len(rounds) < effort.most and time.perf_counter() - begin < effort.seconds
    ):
        order = names if len(rounds) % 2 == 0 else names[::-1]
        rounds.append({name: _seconds(runs[name]) for name in order})
    first, *others = names
    return Comparison(
        seconds=statistics.median(times[first] for times in rounds),
        ratios={n: Spread.of([times[n] / times[first] for times in rounds]) for n in others},
        rounds=len(rounds),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _processor() -> str:
    with_names = Path("/proc/cpuinfo")
    lines = with_names.read_text(encoding="utf-8").splitlines() if with_names.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    fallbacks = (platform.processor(), platform.machine())
    return next(name for name in itertools.chain(names, fallbacks, ["unknown"]) if name)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _allocator() -> str:
    """The C library's malloc, unless the environment says otherwise."""
    library = " ".join(platform.libc_ver()).strip() or "the C library"
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")]
    preloaded = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    changes = settings + [f"{name} preloaded" for name in preloaded]
    return f"malloc of {library}" + (f" with {', '.join(changes)}" if changes else "")
