"""How far each rule can be trusted: its decisions held against what really becomes of all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from tqdm import tqdm

from constrained_growth.errors import DataError
from constrained_growth.experiments.decisions.outcomes import (
    MORE,
    Outcomes,
    continued,
    epochs,
    key,
    load,
    outcomes,
    save,
)
from constrained_growth.experiments.decisions.rules import ARMS, Arm, Choices, choices
from constrained_growth.experiments.decisions.statistics import (
    Estimate,
    Yardstick,
    estimate,
    mean_difference,
    resampled_regret,
    signal,
    yardstick,
)
from constrained_growth.experiments.decisions.tasks import SUITE, Moment, Task, at_the_moment
from constrained_growth.experiments.timing import Machine, one_thread

Array = NDArray[np.float64]


CLEAR = 2.0
"""The place matters where the mean site is this many standard errors above the best."""


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        tasks: Which tasks.
        networks: How many of each.
        runs: How many orders of the data after every insertion, two or more.
        workers: Processes, one thread each.
    """

    tasks: Sequence[Task]
    networks: int
    runs: int
    workers: int = 2


FULL = Plan(SUITE, networks=72, runs=8)

QUICK = Plan(
    [replace(t, before=20, after=20) for t in SUITE if t.name in ("spirals-4x2", "planted")],
    networks=4,
    runs=2,
)


@dataclass(frozen=True)
class Decided:
    """What an arm did on a task.

    Attributes:
        sites: Where each network gained a layer, −1 for nowhere; shape (networks,).
        passes: What the decision cost, in gradient passes, shape (networks,).
        loss: Final training loss, the mean over the runs, shape (networks,). Layers that start
            elsewhere than at their pins are trained on from there.
        at_pin: The same where these start at their pins as all others do.
        trained_on: Final loss where what is left of `MORE` passes is spent on as many epochs more
            of training; NaN for networks where the decision costs more than these.
    """

    sites: NDArray[np.int64]
    passes: Array
    loss: Array
    at_pin: Array
    trained_on: Array


@dataclass(frozen=True)
class Judged:
    """One task.

    Attributes:
        task: Its name.
        about: One line about it.
        half: 0 or 1.
        planted: For each network the site where a layer is known to be missing, or None.
        outcomes: Of all sites.
        against: The best and the mean site.
        arms: Name → what it did.
    """

    task: str
    about: str
    half: int
    planted: tuple[int | None, ...]
    outcomes: Outcomes
    against: Yardstick
    arms: Mapping[str, Decided]


@dataclass(frozen=True)
class Verdict:
    """An arm on a task.

    Attributes:
        regret: Relative to random, with its interval over networks.
        at_pin: The same for the sites alone: all layers start at their pins.
        equal_cost: The same where every arm has `MORE` passes, those that its decision does not
            take being spent on epochs more of training; held against the same best and mean site.
            None where a decision costs more.
        planted_rate: In which share of the networks the planted site was chosen, or None.
        loss: Final training loss, the mean over networks and runs.
        loss_not_inserting: That of inserting nothing.
        against_nothing: The difference of the two, with its interval over networks.
        cost_passes: Mean cost of a decision, in gradient passes over the data.
        inserted: In which share of the networks something was inserted.
    """

    regret: Estimate
    at_pin: Estimate
    equal_cost: Estimate | None
    planted_rate: float | None
    loss: float
    loss_not_inserting: float
    against_nothing: Estimate
    cost_passes: float
    inserted: float


@dataclass(frozen=True)
class DecisionBenchmark:
    """All that `bench decisions` found.

    Attributes:
        machine: Where.
        seed: The networks are numbers seed · networks, … of an endless row.
        plan: How much was run.
        tasks: In the order of the plan.
        verdicts: Task → arm → how it did.
        means: Group of tasks (see `groups`) → arm → mean regret over them.
        equal_cost: Arm → mean over all tasks of the regret at equal cost, for arms that have one.
    """

    machine: Machine
    seed: int
    plan: Plan
    tasks: tuple[Judged, ...]
    verdicts: Mapping[str, Mapping[str, Verdict]]
    means: Mapping[str, Mapping[str, Estimate]]
    equal_cost: Mapping[str, Estimate]


def run_decisions(
    plan: Plan,
    seed: int = 0,
    *,
    arms: Sequence[Arm] = ARMS,
    cache: Path | None = None,
    progress: bool | None = None,
) -> DecisionBenchmark:
    """Insert everywhere, ask every rule, and compare.

    Args:
        plan: How much.
        seed: Other seeds have other networks, none of them the same.
        arms: The rules.
        cache: Folder for what became of the networks of each task, so that an interrupted run
            goes on where it was, and other rules can be asked without training all again. None
            keeps nothing.
        progress: Show bars; None (default) only on a terminal.

    Returns:
        The result, which depends on plan, seed and arms alone.

    Raises:
        DataError: There are fewer than two networks or runs, or arms of one name.
    """
    if plan.networks < 2 or plan.runs < 2:
        raise DataError(
            f"networks={plan.networks}, runs={plan.runs} of plan: at least two of each are needed."
        )
    if len({arm.name for arm in arms}) != len(arms):
        raise DataError(f"arms have one name: {[arm.name for arm in arms]}.")
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [
        delayed(judge)(task, seeds, plan.runs, arms, cache, progress, at)
        for at, task in enumerate(plan.tasks)
    ]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        machine = Machine.here()
    names = [arm.name for arm in arms]
    verdicts = {task.task: {name: verdict(task, name) for name in names} for task in found}
    cheap = [name for name in names if all(arms[name].equal_cost for arms in verdicts.values())]
    return DecisionBenchmark(
        machine,
        seed,
        plan,
        tuple(found),
        verdicts,
        {
            group: {name: mean_regret(tasks, [t.arms[name].loss for t in tasks]) for name in names}
            for group, tasks in groups(found).items()
        },
        {name: mean_regret(found, [t.arms[name].trained_on for t in found]) for name in cheap},
    )


def judge(
    task: Task,
    seeds: Sequence[int],
    runs: int,
    arms: Sequence[Arm],
    cache: Path | None = None,
    progress: bool | None = None,
    line: int = 0,
) -> Judged:
    """One task: its networks, what becomes of them, and what the arms decide.

    Args:
        task: The task.
        seeds: Of the networks.
        runs: Orders of the data.
        arms: The rules.
        cache: As for `run_decisions`.
        progress: As there.
        line: Where the bar is on the screen.
    """
    quiet = None if progress is None else not progress
    with one_thread(), tqdm(desc=task.name, unit=" epochs", position=line, disable=quiet) as bar:
        bar.reset(task.before)
        moment = at_the_moment(task, seeds, bar.update)
        found = _outcomes(moment, runs, cache, bar)
        bar.total += len(seeds)
        chosen = choices(moment, arms, found.rehearsal, bar.update)
        decided = {name: _decided(moment, each, found, bar) for name, each in chosen.items()}
    return Judged(
        task.name,
        task.about,
        task.half,
        tuple(moment.planted),
        found,
        yardstick(found.inserted[..., 0]),
        decided,
    )


def verdict(judged: Judged, arm: str, seed: int = 0) -> Verdict:
    """How an arm did on a task.

    Args:
        judged: The task.
        arm: Name of the arm.
        seed: Of the bootstrap.
    """
    decided = judged.arms[arm]
    nothing = judged.outcomes.nothing[..., 0].mean(1)
    known = [(p, site) for p, site in zip(judged.planted, decided.sites, strict=True)]
    planted = [p == site for p, site in known if p is not None]

    def regret(loss: Array) -> Estimate:
        return estimate(resampled_regret(loss, judged.against, seed))

    return Verdict(
        regret=regret(decided.loss),
        at_pin=regret(decided.at_pin),
        equal_cost=None if (decided.passes > MORE).any() else regret(decided.trained_on),
        planted_rate=float(np.mean(planted)) if planted else None,
        loss=float(decided.loss.mean()),
        loss_not_inserting=float(nothing.mean()),
        against_nothing=mean_difference(decided.loss, nothing, seed),
        cost_passes=float(decided.passes.mean()),
        inserted=float((decided.sites >= 0).mean()),
    )


def mean_regret(tasks: Sequence[Judged], losses: Sequence[Array], seed: int = 0) -> Estimate:
    """Mean over tasks of the regret relative to random, the networks of each drawn anew.

    Args:
        tasks: At least one.
        losses: Of an arm on each of them, shape (networks,).
        seed: Of the bootstrap.
    """
    each = [
        resampled_regret(loss, task.against, seed + 1_000 * (1 + index))
        for index, (task, loss) in enumerate(zip(tasks, losses, strict=True))
    ]
    return estimate(np.mean(each, axis=0))


def groups(tasks: Sequence[Judged]) -> dict[str, list[Judged]]:
    """The tasks over which regrets are averaged: all, the halves, those where the place matters."""
    found = {
        "all": list(tasks),
        "half 0": [task for task in tasks if task.half == 0],
        "half 1": [task for task in tasks if task.half == 1],
        "place matters": [task for task in tasks if signal(task.against) >= CLEAR],
    }
    return {name: some for name, some in found.items() if some}


def _outcomes(moment: Moment, runs: int, cache: Path | None, bar: tqdm) -> Outcomes:
    """From the cache, or made and put there."""
    file = None if cache is None else cache / key(moment.task, moment.seeds, runs)
    if file is not None and file.exists():
        return load(file)
    bar.total += epochs(moment.task, len(moment.blocks[0]))
    found = outcomes(moment, runs, bar.update)
    if file is not None:
        save(file, found)
    return found


def _decided(moment: Moment, chosen: Choices, found: Outcomes, bar: tqdm) -> Decided:
    """What became of the choices; of layers that start elsewhere it has to be seen first."""
    known = np.concatenate([found.inserted, found.nothing[None]]).mean(2)
    at_pin = known[chosen.sites, np.arange(len(chosen.sites))]
    loss = at_pin
    if chosen.blocks is not None:
        sites, runs = chosen.sites.tolist(), range(found.nothing.shape[1])
        bar.total += epochs(moment.task, len(set(sites)) - 1)
        loss = continued(moment, sites, chosen.blocks, runs, bar.update).mean(1)
    left = np.floor(MORE - chosen.passes + 1e-9)  # passes are sums of thirds
    rows, more = np.arange(len(left)), np.maximum(left, 0).astype(int)
    trained_on = np.where(left >= 0, loss[rows, more], np.nan)
    return Decided(chosen.sites, chosen.passes, loss[:, 0], at_pin[:, 0], trained_on)
