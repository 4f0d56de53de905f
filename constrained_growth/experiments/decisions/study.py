"""`bench decisions`: decisions of each rule, compared with what really becomes of all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from constrained_growth.errors import DataError
from constrained_growth.experiments.caching import cached
from constrained_growth.experiments.decisions.arms import ARMS, Arm, Choices, choices
from constrained_growth.experiments.decisions.outcomes import (
    MORE,
    Outcomes,
    continued,
    epochs,
    key,
    outcomes,
)
from constrained_growth.experiments.decisions.tasks import SUITE, Moment, Task, at_the_moment
from constrained_growth.experiments.statistics import (
    LEVEL,
    Array,
    Estimate,
    Yardstick,
    estimate,
    mean_difference,
    mean_regret,
    resampled_regret,
)
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import described, machine, one_thread

Content = Mapping[str, Any]

CLEAR = 2.0
"""The place matters where the mean site is this many standard errors above the best."""


@dataclass(frozen=True)
class Plan:
    """How many networks of which tasks, and orders of the data after each insertion, are run."""

    tasks: Sequence[Any]
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
    """What an arm did on a task; all of shape (networks,), losses are means over the runs.

    `sites` and `passes` are as in `Choices`. `loss` is the final training loss, each layer trained
    on from where the decision starts it; `at_pin` with all layers starting at their pins; in
    `trained_on` the rest of `MORE` passes is spent on further epochs (NaN where there is none).
    """

    sites: NDArray[np.integer]
    passes: Array
    loss: Array
    at_pin: Array
    trained_on: Array


@dataclass(frozen=True)
class Judged:
    """A task, for each network the site known to lack a layer, all outcomes, and what arms did."""

    task: Task
    planted: Sequence[int | None]
    outcomes: Outcomes
    against: Yardstick
    arms: Mapping[str, Decided]


def run(
    plan: Plan,
    seed: int = 0,
    *,
    arms: Sequence[Arm] = ARMS,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Insert everywhere, ask every rule, and compare; deterministic in plan, seed and arms.

    Other seeds have other networks, none of them the same. What became of the networks of a task is
    kept in the folder `cache`, so that an interrupted run resumes, and other rules can be asked
    without training again.

    Returns:
        The numbers that `--json` writes: for each task and arm its regret (with interval), cost
        and losses, means over groups of tasks, and under "details" every network's losses.

    Raises:
        DataError: There are fewer than two networks or runs, or two arms with the same name.
    """
    names = check(plan.networks, plan.runs, arms)
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [
        delayed(_judge)(task, seeds, plan.runs, arms, cache, at)
        for at, task in enumerate(plan.tasks)
    ]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        here = machine()
    by_group = _groups(found)
    affordable = [n for n in names if all((t.arms[n].passes <= MORE).all() for t in found)]
    return {
        "tasks": {t.task.name: {name: _row(t, name) for name in names} for t in found},
        "means": {
            group: {name: _mean(tasks, [t.arms[name].loss for t in tasks]) for name in names}
            for group, tasks in by_group.items()
        },
        "groups": {name: [t.task.name for t in tasks] for name, tasks in by_group.items()},
        "equal_cost": {
            "passes": MORE,
            "tasks": {
                t.task.name: {
                    name: _value(_regret_of(t, decided.trained_on))
                    for name, decided in t.arms.items()
                    if (decided.passes <= MORE).all()
                }
                for t in found
            },
            "mean": {n: _mean(found, [t.arms[n].trained_on for t in found]) for n in affordable},
        },
        "details": {t.task.name: _details(t) for t in found},
        "machine": here,
        "seed": seed,
        "networks": plan.networks,
        "runs": plan.runs,
    }


def check(networks: int, runs: int, arms: Sequence[Arm]) -> list[str]:
    """The names of the arms, or a `DataError` where `run` says so."""
    if networks < 2 or runs < 2:
        raise DataError(f"networks={networks}, runs={runs} of plan: give at least two of each.")
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise DataError(f"arms share a name: {names}.")
    return names


def _judge(
    task: Task,
    seeds: Sequence[int],
    runs: int,
    arms: Sequence[Arm],
    cache: Path | None,
    line: int,
) -> Judged:
    """One task: its networks, what becomes of them, and what the arms decide."""
    with one_thread(), tqdm(desc=task.name, unit=" epochs", position=line, disable=None) as bar:
        bar.reset(task.before)
        moment = at_the_moment(task, seeds, bar.update)
        bar.total += epochs(task, len(moment.blocks[0])) + len(seeds)
        found = cached(cache, key(task, seeds, runs), lambda: outcomes(moment, runs, bar.update))
        chosen = choices(moment, arms, found.rehearsal, bar.update)
        decided = {name: _decided(moment, each, found, bar) for name, each in chosen.items()}
    return Judged(task, moment.planted, found, Yardstick.of(found.inserted[..., 0]), decided)


def _decided(moment: Moment, chosen: Choices, found: Outcomes, bar: tqdm) -> Decided:
    """What became of the choices; layers that start off their pins are trained now."""
    sites, passes = np.array(chosen.sites), np.array(chosen.passes)
    rows = np.arange(len(sites))
    known = np.concatenate([found.inserted, found.nothing[None]]).mean(2)
    at_pin = loss = known[sites, rows]
    if any(mine is not pinned for mine, pinned in zip(chosen.blocks, moment.blocks, strict=True)):
        bar.total += epochs(moment.task, len(set(chosen.sites)) - 1)
        runs = range(found.nothing.shape[1])
        loss = continued(moment, chosen.sites, chosen.blocks, runs, bar.update).mean(1)
    left = np.floor(MORE - passes + 1e-9)  # passes are sums of thirds
    trained_on = np.where(left >= 0, loss[rows, np.maximum(left, 0).astype(int)], np.nan)
    return Decided(sites, passes, loss[:, 0], at_pin[:, 0], trained_on)


def _groups(tasks: Sequence[Judged]) -> dict[str, list[Judged]]:
    """The tasks over which regrets are averaged: all, the halves, those where the place matters."""
    found = {
        "all": list(tasks),
        "half 0": [t for t in tasks if t.task.half == 0],
        "half 1": [t for t in tasks if t.task.half == 1],
        "place matters": [t for t in tasks if t.against.signal >= CLEAR],
    }
    return {name: some for name, some in found.items() if some}


def _regret_of(judged: Judged, loss: Array) -> Estimate:
    return estimate(resampled_regret(loss, judged.against, 0))


def _mean(tasks: Sequence[Judged], losses: Sequence[Array]) -> dict[str, Any]:
    return _value(mean_regret(losses, [task.against for task in tasks]))


def _value(regret: Estimate) -> dict[str, Any]:
    return {"regret": regret.value, "interval": [regret.low, regret.high]}


def _row(judged: Judged, arm: str) -> dict[str, Any]:
    decided = judged.arms[arm]
    pairs = zip(judged.planted, decided.sites, strict=True)
    planted = [missing == site for missing, site in pairs if missing is not None]
    return {
        **_value(_regret_of(judged, decided.loss)),
        "planted_rate": float(np.mean(planted)) if planted else None,
        "loss": float(decided.loss.mean()),
        "loss_not_inserting": float(judged.outcomes.nothing[..., 0].mean(1).mean()),
        "cost_passes": float(decided.passes.mean()),
    }


def _details(judged: Judged) -> dict[str, Any]:
    found = judged.outcomes
    nothing = found.nothing[..., 0].mean(1)
    return {
        "about": judged.task.about,
        "half": judged.task.half,
        "signal": judged.against.signal,
        "planted": judged.planted,
        "best": judged.against.best.tolist(),
        "inserted": found.inserted[..., 0].tolist(),
        "nothing": found.nothing[..., 0].tolist(),
        "rehearsal": found.rehearsal.tolist(),
        "rules": {
            arm: {
                "regret_at_pins": _value(_regret_of(judged, decided.at_pin)),
                "against_nothing": asdict(mean_difference(decided.loss, nothing)),
                "inserted": float((decided.sites >= 0).mean()),
                "sites": decided.sites.tolist(),
                "losses": decided.loss.tolist(),
                "losses_at_equal_cost": decided.trained_on.tolist(),
                "passes": decided.passes.tolist(),
            }
            for arm, decided in judged.arms.items()
        },
    }


def tables(found: Content) -> RenderableType:
    """The machine, how to read it, a table for each task, and the means over the suite."""
    passes = found["equal_cost"]["passes"]
    return Group(
        Text(
            f"{described(found['machine'])}; seed {found['seed']}. {found['networks']} networks of "
            f"each task, {found['runs']} runs after every insertion.\n"
        ),
        Text(
            "Regret is relative to random: 0 is the best site in expectation, 1 no better "
            f"than chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. “At the "
            "pins” is the regret of the site alone, where a rule starts its layer off its pins. "
            "Loss is the final training loss. “− nothing” is that minus the loss of inserting "
            "nothing. Cost is in gradient passes over the data, for one decision. Regret “at equal "
            f"cost”: every rule has {passes} passes, and spends those that its decision does not "
            "take on further epochs; it is compared with the same best and mean site, so that it "
            "is below 0 where these epochs buy more than the best site, and blank where a decision "
            "takes more passes.\n"
        ),
        *(_task(task, found) for task in found["tasks"]),
        _means(found),
    )


def _task(task: str, found: Content) -> Table:
    about, equal = found["details"][task], found["equal_cost"]["tasks"][task]
    clear, planted = about["signal"], any(site is not None for site in about["planted"])
    matters = "" if clear >= CLEAR else "; the place hardly matters"
    headings = ["regret", "at the pins", "equal cost", "planted", "loss", "− nothing"]
    headings += ["inserted", "cost"]
    columns = [heading for heading in headings if planted or heading != "planted"]
    table = titled(
        f"{task}: {about['about']}. Best site {np.mean(about['best']):.4g}, mean site "
        f"{np.mean(about['inserted']):.4g} ({clear:.1f} standard errors apart{matters}), "
        f"not inserting {np.mean(about['nothing']):.4g}. Half {about['half']}.",
        "rule",
        *columns,
    )
    for arm, row in found["tasks"][task].items():
        more = about["rules"][arm]
        at_pins, nothing = more["regret_at_pins"]["regret"], more["against_nothing"]
        cells = {
            "regret": _regret(row),
            "at the pins": "" if at_pins == row["regret"] else f"{at_pins:.2f}",
            "equal cost": f"{equal[arm]['regret']:.2f}" if arm in equal else "",
            "planted": "" if row["planted_rate"] is None else f"{row['planted_rate']:.0%}",
            "loss": f"{row['loss']:.4g}",
            "− nothing": interval(nothing["value"], nothing["low"], nothing["high"], ".2g"),
            "inserted": f"{more['inserted']:.0%}",
            "cost": f"{row['cost_passes']:.3g}",
        }
        table.add_row(arm, *(cells[heading] for heading in columns))
    return table


def _means(found: Content) -> Table:
    equal = found["equal_cost"]["mean"]
    columns = [f"{group} ({len(found['groups'][group])})" for group in found["means"]]
    table = titled("Mean regret over tasks", "rule", *columns, "equal cost (all)", "cost")
    for arm in found["means"]["all"]:
        cost = np.mean([arms[arm]["cost_passes"] for arms in found["tasks"].values()])
        shown = [_regret(arms[arm]) for arms in found["means"].values()]
        shown.append(_regret(equal[arm]) if arm in equal else "")
        table.add_row(arm, *shown, f"{cost:.3g}")
    return table


def _regret(row: Content) -> str:
    return interval(row["regret"], *row["interval"])
