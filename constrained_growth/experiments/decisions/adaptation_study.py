"""The study of `shifts` and `expansions`: decisions against what really becomes of all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn
from tqdm import tqdm

import constrained_growth as cg
from constrained_growth.experiments.caching import cached
from constrained_growth.experiments.decisions.adaptation import (
    Adaptation,
    Outcomes,
    at_the_moment,
    key,
    outcomes,
)
from constrained_growth.experiments.decisions.arms import CONTROLS, SIZES, Arm, Asked, decide
from constrained_growth.experiments.statistics import (
    LEVEL,
    Array,
    Estimate,
    Yardstick,
    estimate,
    mean_regret,
    resampled_regret,
)
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import described, machine, one_thread

MIDDLE = Arm("middle site", lambda asked: cg.Fixed(len(asked.candidates) // 2), passes=0.0)

ARMS: tuple[Arm, ...] = (*SIZES, *CONTROLS, MIDDLE)

MEASURES = ("loss", "held_out", "old")
"""Losses on what is learnt, on held-out data of the same task, and on the first task."""


@dataclass(frozen=True)
class Plan:
    """How many networks of each task, and orders of the data after each insertion, are run."""

    tasks: Sequence[Adaptation]
    networks: int
    runs: int
    workers: int = 2


def run(
    plan: Plan, seed: int = 0, *, arms: Sequence[Arm] = ARMS, cache: Path | None = None
) -> dict[str, Any]:
    """Insert everywhere, ask every rule, and compare; deterministic in plan, seed and arms.

    What networks learnt and what became of them is kept in the folder `cache`: an interrupted run
    resumes, and other rules are asked without training again.

    Returns:
        The numbers that `--json` writes: for each task and arm the regret in the final training
        loss and in the held-out loss, with intervals over networks, and mean losses; their means
        over tasks; and under "details" the losses of every network at every site.

    Raises:
        DataError: There are fewer than two networks or runs, or two arms with the same name.
    """
    if plan.networks < 2 or plan.runs < 2:
        raise cg.DataError(
            f"networks={plan.networks}, runs={plan.runs} of plan: at least two of each are needed."
        )
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise cg.DataError(f"arms share a name: {names}.")
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [
        delayed(_of_network)(plan, one, arms, cache, position) for position, one in enumerate(seeds)
    ]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        here = machine()
    tasks = {
        task.name: _Judged([network[index] for network in found])
        for index, task in enumerate(plan.tasks)
    }
    return {
        "tasks": {name: {arm: judged.row(arm) for arm in names} for name, judged in tasks.items()},
        "means": {arm: _means(list(tasks.values()), arm) for arm in names},
        "details": {
            task.name: {"about": task.about, "origin": task.origin.about}
            | tasks[task.name].details()
            for task in plan.tasks
        },
        "machine": here,
        "seed": seed,
        "networks": plan.networks,
        "runs": plan.runs,
    }


def _of_network(
    plan: Plan, seed: int, arms: Sequence[Arm], cache: Path | None, line: int
) -> list[tuple[Outcomes, dict[str, int]]]:
    """For each task of one network its outcomes, and name of an arm → the site it chose or −1."""
    found = []
    with one_thread(), tqdm(desc=f"network {seed}", unit=" runs", position=line, total=0) as bar:
        for task in plan.tasks:
            moment = at_the_moment(task, seed, cache)
            bar.total += (len(moment.blocks) + 1) * plan.runs
            became = cached(
                cache,
                key(task, moment, seed, plan.runs),
                lambda: outcomes(task, moment, seed, plan.runs, bar.update),  # noqa: B023
            )
            candidates = [cg.Candidate(str(k), block) for k, block in enumerate(moment.blocks)]
            x, y = (part[: task.asked].split(256) for part in moment.data)
            data = list(zip(x, y, strict=True))
            problem = cg.GrowthProblem(moment.model, nn.CrossEntropyLoss(), data, candidates)
            optimizer = torch.optim.Adam(moment.model.parameters(), task.training.lr)
            names = tuple(candidate.name for candidate in candidates)
            asked = Asked(seed, names, optimizer, task.training.batch, len(moment.data[1]))
            solved = dict[str, cg.Solution]()
            chosen = {arm.name: decide(arm, asked, problem, solved)[0] for arm in arms}
            found.append((became, chosen))
    return found


class _Judged:
    """A task: losses of shape (networks, …), and the site that each arm chose for each network."""

    def __init__(self, networks: Sequence[tuple[Outcomes, Mapping[str, int]]]) -> None:
        self.inserted = np.stack([became.inserted for became, _ in networks], 1)
        self.nothing = np.stack([became.nothing for became, _ in networks])
        self.sites = {arm: [sites[arm] for _, sites in networks] for arm in networks[0][1]}
        self.against = [Yardstick.of(self.inserted[..., k]) for k in range(2)]

    def losses(self, arm: str) -> Array:
        """Of the choices of an arm, means over the runs, shape (networks, measures)."""
        known = np.concatenate([self.inserted, self.nothing[None]]).mean(2)
        return known[self.sites[arm], np.arange(known.shape[1])]

    def row(self, arm: str) -> dict[str, Any]:
        losses = self.losses(arm)
        regrets = [
            estimate(resampled_regret(losses[:, k], of, 0)) for k, of in enumerate(self.against)
        ]
        return _row(regrets, losses)

    def details(self) -> dict[str, Any]:
        return {
            "signal": self.against[0].signal,
            "measures": MEASURES,
            "inserted": self.inserted.tolist(),
            "nothing": self.nothing.tolist(),
            "sites": self.sites,
        }


def _row(regrets: Sequence[Estimate], losses: Array) -> dict[str, Any]:
    regret, held_out = regrets
    return {
        "regret": regret.value,
        "interval": [regret.low, regret.high],
        "held_out_regret": held_out.value,
        "held_out_interval": [held_out.low, held_out.high],
        **dict(zip(MEASURES, losses.mean(0).tolist(), strict=True)),
    }


def _means(tasks: Sequence[_Judged], arm: str) -> dict[str, Any]:
    losses = [task.losses(arm) for task in tasks]
    regrets = [
        mean_regret([loss[:, k] for loss in losses], [task.against[k] for task in tasks])
        for k in range(2)
    ]
    return _row(regrets, np.concatenate(losses))


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The machine, how to read it, the means over tasks, and the regrets on each task."""
    tasks, details = found["tasks"], found["details"]
    means = titled(
        f"Means over {len(tasks)} tasks",
        "rule",
        "regret",
        "held-out regret",
        "loss",
        "held-out",
        "old",
    )
    for arm, row in found["means"].items():
        losses = [f"{row[measure]:.4g}" for measure in MEASURES]
        held_out = interval(row["held_out_regret"], *row["held_out_interval"])
        means.add_row(arm, interval(row["regret"], *row["interval"]), held_out, *losses)
    shown = [means]
    for origin in dict.fromkeys(detail["origin"] for detail in details.values()):
        names = [name for name in tasks if details[name]["origin"] == origin]
        each = titled(f"Regret: {origin}", "rule", *names)
        for arm in found["means"]:
            each.add_row(arm, *(f"{tasks[name][arm]['regret']:.2f}" for name in names))
        each.add_section()
        signals = (f"{details[name]['signal']:.1f}" for name in names)
        each.add_row("best below mean site, standard errors", *signals)
        shown.append(each)
    about = "; ".join(f"{name}: {detail['about']}" for name, detail in details.items())
    return Group(
        Text(
            f"{described(found['machine'])}; seed {found['seed']}. {found['networks']} networks of "
            f"each task, {found['runs']} runs after every insertion.\n"
        ),
        Text(
            "Regret is relative to random: 0 is the best site in expectation, 1 no better than "
            f"chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. Losses are "
            "those at the end of training: on what was learnt, held out, and on the first task.\n"
        ),
        *shown,
        Text(f"{about}.\n"),
    )
