"""Whether growing pays: multiply-adds and seconds to the loss that the big network comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from constrained_growth.errors import DataError
from constrained_growth.experiments.decisions.statistics import Estimate, mean_difference
from constrained_growth.experiments.growth.runs import ARMS, BIG, Arm, Trace, run
from constrained_growth.experiments.growth.statistics import first_at_most, saving, smoothed
from constrained_growth.experiments.growth.tasks import TASKS, GrowthTask
from constrained_growth.experiments.timing import Machine, one_thread


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        tasks: Which tasks.
        seeds: How many runs of each arm: data, initial values, order of the batches.
        workers: Processes, one thread each.
    """

    tasks: Sequence[GrowthTask]
    seeds: int
    workers: int = 2


FULL = Plan(TASKS, seeds=10)

QUICK = Plan(
    [replace(task, big=task.small + 2, steps=24, row=4, wait=1) for task in TASKS], seeds=2
)


@dataclass(frozen=True)
class Outcome:
    """What an arm came to on a task, one entry for each seed.

    Attributes:
        multiply_adds: Until the target was reached, decisions included; None where it was not.
        seconds: Likewise.
        final_loss: When it had spent the multiply-adds of the whole run of the big network.
        held_out: The loss on data not trained on, then.
        traces: The runs.
    """

    multiply_adds: tuple[int | None, ...]
    seconds: tuple[float | None, ...]
    final_loss: tuple[float, ...]
    held_out: tuple[float, ...]
    traces: tuple[Trace, ...]


@dataclass(frozen=True)
class Verdict:
    """An arm against the big network from the start, and against the first arm, on the same seeds.

    Attributes:
        saved: Share of the multiply-adds to the target, the median over seeds.
        saved_seconds: Share of the time.
        reached: In how many of the seeds the target was reached.
        difference: Of the final losses at equal multiply-adds to the big network's, the mean over
            seeds.
        behind: The same difference to the first arm's.
    """

    saved: Estimate
    saved_seconds: Estimate
    reached: int
    difference: Estimate
    behind: Estimate


@dataclass(frozen=True)
class GrowthBenchmark:
    """All that `bench growth` found.

    Attributes:
        machine: Where.
        seed: The first one.
        plan: How much was run.
        outcomes: Task → arm → what it came to.
        verdicts: Task → arm → how that compares with the big network.
    """

    machine: Machine
    seed: int
    plan: Plan
    outcomes: Mapping[str, Mapping[str, Outcome]]
    verdicts: Mapping[str, Mapping[str, Verdict]]


def run_growth(
    plan: Plan,
    seed: int = 0,
    *,
    arms: Sequence[Arm] = ARMS,
    cache: Path | None = None,
    progress: bool | None = None,
) -> GrowthBenchmark:
    """Train every arm on every task and seed, and compare.

    The target of a seed is the loss that the big network of this seed ends with, the mean over
    the last rows; an arm has reached it at the first row at which its loss, smoothed in the same
    way, is not above it. The big network is asked the same question, and may have been there
    before its end.

    Args:
        plan: How much.
        seed: Seeds `seed`, `seed` + 1, … are run.
        arms: The ways to a big network, the one from the start among them.
        cache: Folder for the runs, so that an interrupted benchmark goes on where it was.
        progress: Show a bar; None (default) only on a terminal.

    Raises:
        DataError: There is no seed, or no arm that begins big.
    """
    if plan.seeds < 1 or BIG not in [arm.name for arm in arms]:
        raise DataError(
            f"seeds={plan.seeds} of plan must be positive, and an arm be named {BIG!r}; the arms "
            f"are {[arm.name for arm in arms]}."
        )
    seeds = range(seed, seed + plan.seeds)
    keys = [(task, one) for task in plan.tasks for one in seeds]
    jobs = [delayed(_traces)(task, arms, one, cache) for task, one in keys]
    quiet = None if progress is None else not progress
    with one_thread():
        parallel: Any = Parallel(n_jobs=plan.workers, return_as="generator")(jobs)
        found = list(tqdm(parallel, total=len(jobs), desc="growth", unit="seed", disable=quiet))
        machine = Machine.here()
    traces = {(t.name, s): each for (t, s), each in zip(keys, found, strict=True)}
    outcomes = {
        task.name: {
            arm.name: _outcome(
                [traces[task.name, one][arm.name] for one in seeds],
                [traces[task.name, one][BIG] for one in seeds],
            )
            for arm in arms
        }
        for task in plan.tasks
    }
    verdicts = {
        task: {name: verdict(each, those[BIG], those[arms[0].name]) for name, each in those.items()}
        for task, those in outcomes.items()
    }
    return GrowthBenchmark(machine, seed, plan, outcomes, verdicts)


def verdict(outcome: Outcome, big: Outcome, first: Outcome) -> Verdict:
    """How an arm compares with the big network from the start, and with the first arm.

    Args:
        outcome: Of the arm.
        big: Of the big network on the same seeds.
        first: Of the first arm on the same seeds.
    """
    return Verdict(
        saved=saving(outcome.multiply_adds, big.multiply_adds),
        saved_seconds=saving(outcome.seconds, big.seconds),
        reached=sum(cost is not None for cost in outcome.multiply_adds),
        difference=_difference(outcome, big),
        behind=_difference(outcome, first),
    )


def _difference(one: Outcome, other: Outcome) -> Estimate:
    """Of the final losses, the mean over the seeds."""
    return mean_difference(np.array(one.final_loss), np.array(other.final_loss), 0)


def _outcome(traces: Sequence[Trace], big: Sequence[Trace]) -> Outcome:
    rows = [
        first_at_most(trace.loss, float(smoothed(other.loss)[-1]))
        for trace, other in zip(traces, big, strict=True)
    ]
    reached = list(zip(traces, rows, strict=True))
    return Outcome(
        multiply_adds=tuple(None if r is None else t.multiply_adds[r] for t, r in reached),
        seconds=tuple(None if r is None else t.seconds[r] for t, r in reached),
        final_loss=tuple(float(smoothed(trace.loss)[-1]) for trace in traces),
        held_out=tuple(trace.held_out for trace in traces),
        traces=tuple(traces),
    )


def _traces(
    task: GrowthTask, arms: Sequence[Arm], seed: int, cache: Path | None
) -> dict[str, Trace]:
    """All arms one after the other in one process, so that their times can be compared."""
    return {arm.name: _run(task, arm, seed, cache) for arm in arms}


def _run(task: GrowthTask, arm: Arm, seed: int, cache: Path | None) -> Trace:
    """From the cache, or made and put there."""
    file = None if cache is None else cache / f"{_key(task)}-{arm.name}-{seed}.json"
    if file is not None and file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name, value in kept.items():
            kept[name] = tuple(value) if isinstance(value, list) else value
        return Trace(**kept)
    with one_thread():
        found = run(task, arm, seed)
    if file is not None:
        file.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _key(task: GrowthTask) -> str:
    """Changes with the settings of a task."""
    settings = {k: v for k, v in vars(task).items() if isinstance(v, int | float | str)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{task.name}-{digest[:12]}"
