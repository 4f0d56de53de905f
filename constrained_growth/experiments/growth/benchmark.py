"""`bench growth`: multiply-adds and seconds to the held-out loss that the big network ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.errors import DataError
from constrained_growth.experiments.growth.runs import ARMS, BIG, Arm, Trace, train
from constrained_growth.experiments.growth.tasks import TASKS, GrowthTask
from constrained_growth.experiments.jobs import cached, digest, in_parallel
from constrained_growth.experiments.statistics import (
    LEVEL,
    first_at_most,
    mean_difference,
    saving,
    smoothed,
)
from constrained_growth.experiments.tables import interval, number, tabled

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which tasks are run, from how many seeds (data, initial values, order of the batches).

    Every arm gets the one of the learning `rates` with which it ends lowest on `tuned_on` other
    seeds.
    """

    tasks: Sequence[GrowthTask]
    seeds: int
    rates: Sequence[float] = (0.005, 0.01)
    tuned_on: int = 1
    workers: int = 2


FULL = Plan(TASKS, seeds=10)

QUICK = Plan(
    [replace(task, big=task.small + 2, steps=24, row=4, wait=1) for task in TASKS],
    seeds=2,
    rates=(0.003, 0.01),
)

_TUNING = 1000
"""First of the seeds on which learning rates are chosen."""


def run(
    plan: Plan,
    seed: int = 0,
    *,
    arms: Sequence[Arm] = ARMS,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Train every arm on every task and seed, and compare their losses on held-out data.

    The target of a seed is the loss that its big network ends with, the mean over the last rows;
    an arm has reached it at the first row at which its loss, smoothed alike, is not above it.

    Seeds `seed`, `seed` + 1, … are run. Runs are kept in the folder `cache`, so that an interrupted
    benchmark resumes.

    Returns:
        The numbers that `--json` writes: seed by seed, multiply-adds and seconds to the target
        (None if not reached) and final losses; comparisons of the arms; learning rates; and the
        curves.

    Raises:
        DataError: There is no seed, or no arm that begins big.
    """
    names = [arm.name for arm in arms]
    if plan.seeds < 1 or BIG not in names:
        raise DataError(
            f"seeds={plan.seeds} of plan must be positive, and one arm must be named {BIG!r}; the "
            f"arms are {names}."
        )
    pairs = [(task, arm) for task in plan.tasks for arm in arms]
    rates = _tuned(plan, pairs, cache) if len(plan.rates) > 1 else [plan.rates[0]] * len(pairs)
    seeds = range(seed, seed + plan.seeds)
    found = _trained(
        plan,
        [(*pair, one, rate) for pair, rate in zip(pairs, rates, strict=True) for one in seeds],
        cache,
    )
    by_pair = iter(found[i : i + plan.seeds] for i in range(0, len(found), plan.seeds))
    traces = {task.name: {name: next(by_pair) for name in names} for task in plan.tasks}
    chosen = iter(rates)
    outcomes = {
        task: {name: _outcome(mine, of[BIG]) for name, mine in of.items()}
        for task, of in traces.items()
    }
    return {
        "tasks": outcomes,
        "against_big": {
            task: {name: _verdict(arm, of[BIG], of[names[0]]) for name, arm in of.items()}
            for task, of in outcomes.items()
        },
        "curves": {
            task: {
                name: [{"multiply_adds": t.multiply_adds, "loss": t.loss} for t in mine]
                for name, mine in of.items()
            }
            for task, of in traces.items()
        },
        "learning_rates": {t.name: {name: next(chosen) for name in names} for t in plan.tasks},
        "settings": {task.name: task.settings for task in plan.tasks},
        "seeds": plan.seeds,
    }


Run = tuple[GrowthTask, Arm, int, float]
"""Task, arm, seed and learning rate."""


def _trained(plan: Plan, runs: Sequence[Run], cache: Path | None) -> list[Trace]:
    jobs = [(*run, cache) for run in runs]
    return in_parallel(_trace, jobs, plan.workers, desc="growth", unit="run")


def _tuned(plan: Plan, pairs: Sequence[tuple[GrowthTask, Arm]], cache: Path | None) -> list[float]:
    """The learning rate of each arm on each task."""
    seeds = range(_TUNING, _TUNING + plan.tuned_on)
    runs = [(*pair, one, rate) for pair in pairs for rate in plan.rates for one in seeds]
    ends = [float(smoothed(trace.loss)[-1]) for trace in _trained(plan, runs, cache)]
    means = np.reshape(ends, (len(pairs), len(plan.rates), plan.tuned_on)).mean(2)
    means = np.where(np.isfinite(means), means, np.inf)  # a run may have diverged
    return [plan.rates[best] for best in means.argmin(1)]


def _trace(task: GrowthTask, arm: Arm, seed: int, rate: float, cache: Path | None) -> Trace:
    key = digest(task.name, json.dumps(task.settings | {"rate": rate}, sort_keys=True))
    return cached(cache, f"{key}-{arm.name}-{seed}", lambda: train(task, arm, seed, rate))


def _outcome(traces: Sequence[Trace], big: Sequence[Trace]) -> dict[str, Any]:
    """How an arm ended on a task, one entry for each seed."""
    rows = [
        first_at_most(trace.loss, float(smoothed(other.loss)[-1]))
        for trace, other in zip(traces, big, strict=True)
    ]
    reached = list(zip(traces, rows, strict=True))
    return {
        "multiply_adds": [None if r is None else t.multiply_adds[r] for t, r in reached],
        "seconds": [None if r is None else t.seconds[r] for t, r in reached],
        "final_loss": [float(smoothed(trace.loss)[-1]) for trace in traces],
        "training_loss": [trace.training_loss for trace in traces],
        "accuracy": [trace.accuracy for trace in traces],
    }


def _verdict(outcome: Content, big: Content, first: Content) -> dict[str, Any]:
    """How an arm compares with the big network and with the first arm on the same seeds."""
    final, of_big, of_first = (np.array(one["final_loss"]) for one in (outcome, big, first))
    return {
        "saved": asdict(saving(outcome["multiply_adds"], big["multiply_adds"])),
        "saved_seconds": asdict(saving(outcome["seconds"], big["seconds"])),
        "reached": sum(cost is not None for cost in outcome["multiply_adds"]),
        "difference": asdict(mean_difference(final, of_big)),
        "behind": asdict(mean_difference(final, of_first)),
    }


def tables(found: Content) -> RenderableType:
    """How to read it, and a table for each task."""
    return Group(
        Text(
            "Multiply-adds (in units of 10⁹, counted, decisions included) and seconds until the "
            "loss on held-out data is the one that the big network trained from the start ends "
            "with: medians over seeds, and how much less than the big network needs, with the "
            f"{LEVEL:.0%} bootstrap interval. Final loss: after as many multiply-adds as in the "
            "whole run of the big network; the mean over seeds, and that minus the big network's "
            "and minus the first arm's, with intervals. The cost is infinite where the target is "
            "not reached. The learning rate of each arm was chosen on other seeds.\n"
        ),
        *(_table(task, found) for task in found["tasks"]),
    )


def _table(task: str, found: Content) -> Table:
    arms, about, seeds = found["tasks"][task], found["settings"][task], found["seeds"]
    rows = []
    for arm, outcome in arms.items():
        verdict = found["against_big"][task][arm]
        cells = {
            "multiply-adds": number(_median(outcome["multiply_adds"]) / 1e9),
            "saved": _percent(**verdict["saved"]),
            "seconds": number(_median(outcome["seconds"])),
            "seconds saved": _percent(**verdict["saved_seconds"]),
            "reached": f"{verdict['reached']}/{seeds}",
            "final loss": f"{mean(outcome['final_loss']):.3g}",
            f"− {BIG}": interval(**verdict["difference"], form=".2g"),
            f"− {next(iter(arms))}": interval(**verdict["behind"], form=".2g"),
            "accuracy": f"{mean(outcome['accuracy']):.1%}",
            "training loss": f"{mean(outcome['training_loss']):.3g}",
            "rate": f"{found['learning_rates'][task][arm]:g}",
        }
        rows.append((arm, cells))
    title = (
        f"{task}: {about['about']}. {about['small']} → {about['big']} blocks, "
        f"{about['steps']} steps, {seeds} seeds"
    )
    return tabled(title, "arm", rows)


def _median(values: Sequence[float | None]) -> float:
    return median(math.inf if value is None else value for value in values)


def _percent(value: float, low: float, high: float) -> str:
    value, low, high = (100 * v for v in (value, low, high))
    return f"{number(value, '.0f')} % [{number(low, '.0f')} {number(high, '.0f')}]"
