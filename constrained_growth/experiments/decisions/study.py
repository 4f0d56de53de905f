"""`bench decisions`: decisions of each rule, compared with what really becomes of all sites.

A family of tasks inserts at every site and nowhere, and asks the arms; its `Outcomes` are judged
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.errors import DataError
from constrained_growth.experiments.decisions.arms import Arm
from constrained_growth.experiments.jobs import in_parallel
from constrained_growth.experiments.statistics import (
    LEVEL,
    Array,
    Yardstick,
    estimate,
    mean_difference,
    mean_regret,
    resampled_mean_regret,
)
from constrained_growth.experiments.tables import interval, tabled

Content = Mapping[str, Any]

MORE = 21
"""Further epochs are trained, to know what the gradient passes would buy that a rule spends."""

CLEAR = 2.0
"""The place matters where the mean site is this many standard errors above the best."""


@dataclass(frozen=True)
class Decided:
    """What an arm did with each network: the site, −1 for nothing, and the gradient passes it took.

    `losses` (networks, columns) are means over the runs, each layer trained on from where the
    decision starts it; the columns are those of `Outcomes`.
    """

    sites: NDArray[np.integer]
    passes: Array
    losses: Array


@dataclass(frozen=True)
class Outcomes:
    """What became of the networks of a task, and what the arms decided about them.

    `losses` (sites + 1, networks, runs, columns) has a layer at each site, at its pins, and last
    none at all; the same run has the same order of the data everywhere. Column 0 is the final
    training loss; others are the `Plan.measures`, or the training loss after 1, 2, … `MORE` further
    epochs. `planted` are the sites known to lack a layer.
    """

    losses: Array
    arms: Mapping[str, Decided]
    planted: Sequence[int | None]

    def against(self, column: int = 0) -> Yardstick:
        """Best and mean site."""
        return Yardstick.of(self.losses[:-1, ..., column])

    def at_pins(self, arm: str) -> Array:
        """Final losses (networks,) had every layer started at its pins."""
        sites = self.arms[arm].sites
        return self.losses[sites, np.arange(len(sites))].mean(1)[:, 0]

    def trained_on(self, arm: str) -> Array:
        """Final losses (networks,) if further epochs take the passes that are left; NaN: none."""
        decided = self.arms[arm]
        left = np.floor(MORE - decided.passes + 1e-9)  # passes are sums of thirds
        losses = decided.losses[np.arange(len(left)), np.maximum(left, 0).astype(int)]
        return np.where(left >= 0, losses, np.nan)

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """Some networks after others."""
        fields = ("sites", "passes", "losses")
        return cls(
            np.concatenate([part.losses for part in parts], axis=1),
            {
                arm: Decided(
                    *(
                        np.concatenate([getattr(p.arms[arm], name) for p in parts])
                        for name in fields
                    )
                )
                for arm in parts[0].arms
            },
            [site for part in parts for site in part.planted],
        )


@dataclass(frozen=True)
class Plan:
    """How many networks of which tasks, and orders of the data after each insertion, are run.

    A task has a `name`, says what it is `about`, and belongs to a `group`. `family(tasks, seeds,
    runs, arms, cache)` gives the `Outcomes` of each of some tasks of one `origin`, for `chunk`
    networks at a time. `measures` are names of the columns of losses, () for further epochs.
    """

    tasks: Sequence[Any]
    networks: int
    runs: int
    family: Callable[..., list[Outcomes]]
    arms: Sequence[Arm]
    measures: Sequence[str] = ()
    chunk: int = 1
    workers: int = 2


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Insert everywhere, ask every rule, and compare; deterministic in plan and seed.

    Other seeds have other networks, none of them the same. What became of networks is kept in the
    folder `cache`: an interrupted run resumes, and other rules are asked without training again.

    Returns:
        The numbers that `--json` writes: for each task and arm its regret (with interval), cost
        and losses, means over groups of tasks and their paired differences, and under "details"
        every network's losses.

    Raises:
        DataError: There are fewer than two networks or runs, or two arms with the same name.
    """
    names = [arm.name for arm in plan.arms]
    if plan.networks < 2 or plan.runs < 2:
        raise DataError(
            f"networks={plan.networks}, runs={plan.runs} of plan: give at least two of each."
        )
    if len(set(names)) != len(names):
        raise DataError(f"arms share a name: {names}.")
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [
        (list(tasks), seeds[begin : begin + plan.chunk], plan.runs, plan.arms, cache)
        for begin in range(0, len(seeds), plan.chunk)
        for _, tasks in groupby(plan.tasks, lambda task: task.origin)
    ]
    parts: dict[str, list[Outcomes]] = {task.name: [] for task in plan.tasks}
    results = in_parallel(plan.family, jobs, plan.workers, desc="decisions", unit="part")
    for (tasks, *_), outcomes in zip(jobs, results, strict=True):
        for task, one in zip(tasks, outcomes, strict=True):
            parts[task.name].append(one)
    found = {name: Outcomes.joined(some) for name, some in parts.items()}
    groups = _groups(plan.tasks, found)
    content = {
        "tasks": {
            t: {arm: _row(one, arm, plan.measures) for arm in names} for t, one in found.items()
        },
        "means": {
            group: {arm: _regrets([found[t] for t in some], arm, plan.measures) for arm in names}
            for group, some in groups.items()
        },
        "paired": {
            group: paired_regrets(
                [found[t].against() for t in some],
                {arm: [found[t].arms[arm].losses[:, 0] for t in some] for arm in names},
            )
            for group, some in groups.items()
        },
        "groups": groups,
        "details": {
            task.name: {"about": task.about, "group": task.group}
            | _details(found[task.name], plan.measures)
            for task in plan.tasks
        },
        "networks": plan.networks,
        "runs": plan.runs,
        "measures": list(plan.measures),
    }
    return content if plan.measures else content | {"equal_cost": _equal_cost(found, names)}


def _groups(tasks: Sequence[Any], found: Mapping[str, Outcomes]) -> dict[str, list[str]]:
    """Tasks over which regrets are averaged: all, those of a group, those where places matter."""
    groups = {"all": [task.name for task in tasks]}
    for task in tasks:
        groups.setdefault(task.group, []).append(task.name)
    matters = [name for name, one in found.items() if one.against().signal >= CLEAR]
    return groups | ({"place matters": matters} if matters else {})


def _regret(found: Sequence[Outcomes], losses: Sequence[Array], column: int = 0) -> dict[str, Any]:
    regret = mean_regret(losses, [one.against(column) for one in found])
    return {"regret": regret.value, "interval": [regret.low, regret.high]}


def paired_regrets(
    against: Sequence[Yardstick], losses: Mapping[str, Sequence[Array]]
) -> dict[str, dict[str, list[float]]]:
    """Arm → later arm → regret of the first − that of the second, with its interval.

    The same networks are drawn for both, so that what they share does not count.
    """
    drawn = {arm: resampled_mean_regret(some, against) for arm, some in losses.items()}
    pairs: dict[str, dict[str, list[float]]] = {arm: {} for arm in losses}
    for first, second in combinations(losses, 2):
        with np.errstate(invalid="ignore"):  # infinite where the place makes no difference
            difference = estimate(drawn[first] - drawn[second])
        pairs[first][second] = [difference.value, difference.low, difference.high]
    return pairs


def _regrets(found: Sequence[Outcomes], arm: str, measures: Sequence[str]) -> dict[str, Any]:
    """In the training loss, and in the held-out loss where that is measured."""
    row = _regret(found, [one.arms[arm].losses[:, 0] for one in found])
    if measures:
        held_out = _regret(found, [one.arms[arm].losses[:, 1] for one in found], 1)
        row |= {f"held_out_{key}": value for key, value in held_out.items()}
    return row


def _row(found: Outcomes, arm: str, measures: Sequence[str]) -> dict[str, Any]:
    decided = found.arms[arm]
    pairs = zip(found.planted, decided.sites, strict=True)
    planted = [missing == site for missing, site in pairs if missing is not None]
    return {
        **_regrets([found], arm, measures),
        "planted_rate": float(np.mean(planted)) if planted else None,
        "loss": float(decided.losses[:, 0].mean()),
        "loss_not_inserting": float(found.losses[-1].mean(1)[:, 0].mean()),
        "cost_passes": float(decided.passes.mean()),
        **dict(zip(measures[1:], decided.losses[:, 1:].mean(0).tolist(), strict=False)),
    }


def _equal_cost(found: Mapping[str, Outcomes], names: Sequence[str]) -> dict[str, Any]:
    """Regrets where every arm has `MORE` passes, of those that take no more."""

    def affordable(one: Outcomes, arm: str) -> bool:
        return bool((one.arms[arm].passes <= MORE).all())

    def losses(some: Sequence[Outcomes]) -> dict[str, list[Array]]:
        return {
            arm: [one.trained_on(arm) for one in some]
            for arm in names
            if all(affordable(one, arm) for one in some)
        }

    def regret(some: Sequence[Outcomes]) -> dict[str, Any]:
        return {arm: _regret(some, trained) for arm, trained in losses(some).items()}

    whole = list(found.values())
    return {
        "passes": MORE,
        "tasks": {task: regret([one]) for task, one in found.items()},
        "mean": regret(whole),
        "paired": paired_regrets([one.against() for one in whole], losses(whole)),
    }


def _details(found: Outcomes, measures: Sequence[str]) -> dict[str, Any]:
    against, nothing = found.against(), found.losses[-1, ..., 0].mean(1)
    shown = max(1, len(measures))
    return {
        "signal": against.signal,
        "planted": found.planted,
        "best": against.best.tolist(),
        "mean": against.mean.tolist(),
        "nothing": float(nothing.mean()),
        "losses": found.losses[..., :shown].tolist(),
        "rules": {
            arm: {
                "regret_at_pins": _regret([found], [found.at_pins(arm)]),
                "against_nothing": asdict(mean_difference(decided.losses[:, 0], nothing)),
                "inserted": float((decided.sites >= 0).mean()),
                "sites": decided.sites.tolist(),
                "losses": decided.losses[:, :shown].tolist(),
                "passes": decided.passes.tolist(),
            }
            for arm, decided in found.arms.items()
        },
    }


def tables(found: Content) -> RenderableType:
    """How to read it, a table for each task, and the means over the tasks."""
    return Group(
        Text(
            f"{found['networks']} networks of each task, {found['runs']} runs after every "
            "insertion.\n"
        ),
        Text(" ".join(_how_to_read(found)) + "\n"),
        *(_task(task, found) for task in found["tasks"]),
        tabled("Mean regret over tasks", "rule", _means(found)),
    )


def _how_to_read(found: Content) -> Iterator[str]:
    yield (
        "Regret is relative to random: 0 is the best site in expectation, 1 no better than "
        f"chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. “At the pins” is "
        "the regret of the site alone, where a rule starts its layer off its pins. Loss is the "
        "final training loss. “− nothing” is that minus the loss of inserting nothing. Cost is in "
        "gradient passes over the data, for one decision."
    )
    if found["measures"]:
        yield "“Held out” is on other data of the same task, “old” on the task learnt first."
    else:
        yield (
            f"Regret “at equal cost”: every rule has {MORE} passes, and spends those that its "
            "decision does not take on further epochs; it is compared with the same best and mean "
            "site, so that it is below 0 where these epochs buy more than the best site, and blank "
            "where a decision takes more passes."
        )


def _task(task: str, found: Content) -> Table:
    about, measures = found["details"][task], found["measures"]
    equal = {} if measures else found["equal_cost"]["tasks"][task]
    matters = "" if about["signal"] >= CLEAR else "; the place hardly matters"
    rows = []
    for arm, row in found["tasks"][task].items():
        more = about["rules"][arm]
        at_pins, nothing = more["regret_at_pins"]["regret"], more["against_nothing"]
        planted = row["planted_rate"]
        cells = {
            "regret": _shown(row),
            "held-out regret": _shown(row, "held_out_"),
            "at the pins": "" if at_pins == row["regret"] else f"{at_pins:.2f}",
            "equal cost": f"{equal[arm]['regret']:.2f}" if arm in equal else "",
            "planted": "" if planted is None else f"{planted:.0%}",
            "loss": f"{row['loss']:.4g}",
            "− nothing": interval(**nothing, form=".2g"),
            **{measure: f"{row[measure]:.4g}" for measure in measures[1:]},
            "inserted": f"{more['inserted']:.0%}",
            "cost": f"{row['cost_passes']:.3g}",
        }
        rows.append((arm, cells))
    title = (
        f"{task}: {about['about']}. Best site {np.mean(about['best']):.4g}, mean site "
        f"{np.mean(about['mean']):.4g} ({about['signal']:.1f} standard errors apart{matters}), "
        f"not inserting {about['nothing']:.4g}. {about['group']}."
    )
    return tabled(title, "rule", rows)


def _means(found: Content) -> Iterator[tuple[str, dict[str, str]]]:
    equal = {} if found["measures"] else found["equal_cost"]["mean"]
    for arm in found["means"]["all"]:
        cells = dict[str, str]()
        for group, arms in found["means"].items():
            named = f"{group} ({len(found['groups'][group])})"
            cells |= {
                named: _shown(arms[arm]),
                f"{named}, held out": _shown(arms[arm], "held_out_"),
            }
        cells["equal cost (all)"] = _shown(equal[arm]) if arm in equal else ""
        cost = np.mean([arms[arm]["cost_passes"] for arms in found["tasks"].values()])
        yield arm, cells | {"cost": f"{cost:.3g}"}


def _shown(row: Content, of: str = "") -> str:
    """A regret with its interval, or nothing where it is not measured."""
    regret = row.get(f"{of}regret")
    return "" if regret is None else interval(regret, *row[f"{of}interval"])
