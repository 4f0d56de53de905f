"""Times that can be compared: paired runs on one thread, and the machine they were taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from constrained_growth.experiments.statistics import Spread


def machine() -> dict[str, Any]:
    """This machine as it is set now: processor, cores, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": next(filter(None, names), platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Effort:
    """How many rounds: at least `fewest`, then until `seconds` have passed or there are `most`."""

    fewest: int
    most: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Median time of the first run; name → time of another run over the first's in its round."""

    seconds: float
    ratios: Mapping[str, Spread]
    rounds: int

    def row(self) -> dict[str, float]:
        """Ratios and number of rounds ("pairs"), flat as a row of a table."""
        row: dict[str, float] = {"pairs": self.rounds}
        for name, ratio in self.ratios.items():
            row |= {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
        return row


timer = process_time
"""On one thread, processor time is what a run takes on a machine that has nothing else to do."""


def compare(
    runs: Mapping[str, Callable[[], object]],
    effort: Effort,
    clock: Callable[[], float] | None = None,
) -> Comparison:
    """Time some runs in turn, forwards and backwards, so that drifts of the machine cancel.

    The `clock` is `timer` by default, which does not run while a GPU does.

    `torch.utils.benchmark.Timer` times one statement after the other; on a machine whose speed
    drifts, only ratios within a round can be compared. Nothing is run to warm up.
    """
    clock = timer if clock is None else clock
    names, rounds, begin = list(runs), list[dict[str, float]](), clock()
    while len(rounds) < effort.fewest or (
        len(rounds) < effort.most and clock() - begin < effort.seconds
    ):
        order = names if len(rounds) % 2 == 0 else names[::-1]
        rounds.append({name: _seconds(runs[name], clock) for name in order})
    first, *others = names
    return Comparison(
        seconds=float(np.median([times[first] for times in rounds])),
        ratios={n: Spread.of([times[n] / times[first] for times in rounds]) for n in others},
        rounds=len(rounds),
    )


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    return clock() - begin


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that is allocated at a time on the CPU, counted at PyTorch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    profiler: Any = profiled.profiler
    changes = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
