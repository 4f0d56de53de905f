"""The study of `shifts` and `expansions`: decisions against what really becomes of all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    MEASURES,
    Adaptation,
    Training,
    at_the_moment,
    key,
    outcomes,
)
from constrained_growth.experiments.decisions.arms import CONTROLS, SIZES, Arm, Asked, decide
from constrained_growth.experiments.decisions.study import check
from constrained_growth.experiments.statistics import LEVEL, Array, Yardstick, mean_regret
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import described, machine, one_thread

MIDDLE = Arm("middle site", lambda asked: cg.Fixed(len(asked.candidates) // 2), passes=0.0)

ARMS: tuple[Arm, ...] = (*SIZES, *CONTROLS, MIDDLE)


@dataclass(frozen=True)
class Plan:
    """How many networks of each task, and orders of the data after each insertion, are run."""

    tasks: Sequence[Adaptation]
    networks: int
    runs: int
    workers: int = 2


def quick(tasks: Sequence[Adaptation], *names: str) -> Plan:
    """Two networks of some of the tasks, hardly trained."""
    short = Training(steps=10, batch=16, lr=0.002)
    return Plan(
        [
            replace(task, origin=replace(task.origin, training=short), training=short, asked=64)
            for task in tasks
            if task.name in names
        ],
        networks=2,
        runs=2,
    )


def run(
    plan: Plan, seed: int = 0, *, arms: Sequence[Arm] = ARMS, cache: Path | None = None
) -> dict[str, Any]:
    """Insert everywhere, ask every rule, and compare; deterministic in plan, seed and arms.

    What networks learnt and what became of them is kept in the folder `cache`: an interrupted run
    resumes, and other rules are asked without training again.

    Returns:
        The numbers that `--json` writes: for each task and arm the regret in the final training
        loss and in the held-out loss, with intervals over networks, and the mean losses; the means
        over the tasks with old weights frozen and not; under "details" the loss of every network
        at every site, the last of them being no site.

    Raises:
        DataError: There are fewer than two networks or runs, or two arms with the same name.
    """
    names = check(plan.networks, plan.runs, arms)
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [delayed(_of_network)(plan, one, arms, cache, line) for line, one in enumerate(seeds)]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        here = machine()
    judged = [
        _Judged(task, np.stack([losses for losses, _ in networks], 1), [s for _, s in networks])
        for task, networks in zip(plan.tasks, zip(*found, strict=True), strict=True)
    ]
    groups = {
        name: some
        for name, frozen in (("old weights frozen", True), ("all weights trained", False))
        if (some := [one for one in judged if one.task.frozen == frozen])
    }
    return {
        "tasks": {one.task.name: {arm: _row([one], arm) for arm in names} for one in judged},
        "means": {group: {arm: _row(some, arm) for arm in names} for group, some in groups.items()},
        "details": {
            one.task.name: {
                "about": one.task.about,
                "origin": one.task.origin.about,
                "signal": one.against(0).signal,
                "losses": one.losses.tolist(),
                "sites": one.sites,
            }
            for one in judged
        },
        "machine": here,
        "seed": seed,
        "networks": plan.networks,
        "runs": plan.runs,
    }


def _of_network(
    plan: Plan, seed: int, arms: Sequence[Arm], cache: Path | None, line: int
) -> list[tuple[Array, dict[str, int]]]:
    """For each task of one network the losses, and name of an arm → the site it chose, or −1."""
    found = []
    with (
        one_thread(),
        tqdm(desc=f"network {seed}", unit=" runs", position=line, total=0, disable=None) as bar,
    ):
        for task in plan.tasks:
            moment = at_the_moment(task, seed, cache)
            bar.total += (len(moment.blocks) + 1) * plan.runs
            losses = cached(
                cache,
                key(task, moment, seed, plan.runs),
                lambda: outcomes(task, moment, seed, plan.runs, bar.update),  # noqa: B023
            )
            x, y = (part[: task.asked].split(256) for part in moment.data)
            candidates = [cg.Candidate(str(k), block) for k, block in enumerate(moment.blocks)]
            problem = cg.GrowthProblem(
                moment.model, nn.CrossEntropyLoss(), list(zip(x, y, strict=True)), candidates
            )
            optimizer = torch.optim.Adam(moment.model.parameters(), task.training.lr)
            names = tuple(candidate.name for candidate in candidates)
            asked = Asked(seed, names, optimizer, task.training.batch, len(moment.data[1]))
            solved = dict[str, cg.Solution]()
            sites = {arm.name: decide(arm, asked, problem, solved)[0] for arm in arms}
            found.append((losses, sites))
    return found


@dataclass(frozen=True)
class _Judged:
    """A task with all losses (sites + 1, networks, runs, measures), and what the arms chose."""

    task: Adaptation
    losses: Array
    sites: Sequence[Mapping[str, int]]  # for each network

    def against(self, measure: int) -> Yardstick:
        return Yardstick.of(self.losses[:-1, ..., measure])

    def chosen(self, arm: str) -> Array:
        """Means over the runs, shape (networks, measures)."""
        sites = [chosen[arm] for chosen in self.sites]
        return self.losses.mean(2)[sites, np.arange(len(sites))]


def _row(tasks: Sequence[_Judged], arm: str) -> dict[str, Any]:
    chosen, row = [task.chosen(arm) for task in tasks], dict[str, Any]()
    for measure, name in enumerate(("regret", "held_out_regret")):
        found = mean_regret(
            [losses[:, measure] for losses in chosen], [task.against(measure) for task in tasks]
        )
        row |= {name: found.value, f"{name}_interval": [found.low, found.high]}
    return row | dict(zip(MEASURES, np.concatenate(chosen).mean(0).tolist(), strict=True))


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The machine, how to read it, the means over tasks, and the regrets on each task."""
    tasks, details, shown = found["tasks"], found["details"], []
    for group, arms in found["means"].items():
        headings = ("rule", "regret", "held-out regret", *MEASURES)
        shown.append(titled(f"Means over tasks, {group}", *headings))
        for arm, row in arms.items():
            names = ("regret", "held_out_regret")
            regrets = [interval(row[name], *row[f"{name}_interval"]) for name in names]
            shown[-1].add_row(arm, *regrets, *(f"{row[measure]:.4g}" for measure in MEASURES))
    for origin in dict.fromkeys(detail["origin"] for detail in details.values()):
        names = [name for name in tasks if details[name]["origin"] == origin]
        shown.append(titled(f"Regret: {origin}", "rule", *names))
        for arm in tasks[names[0]]:
            shown[-1].add_row(arm, *(f"{tasks[name][arm]['regret']:.2f}" for name in names))
        signals = (f"{details[name]['signal']:.1f}" for name in names)
        shown[-1].add_row("best below mean site, standard errors", *signals)
    return Group(
        Text(
            f"{described(found['machine'])}; seed {found['seed']}. {found['networks']} networks of "
            f"each task, {found['runs']} runs after every insertion.\n"
        ),
        Text(
            "Regret is relative to random: 0 is the best site in expectation, 1 no better than "
            f"chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. Losses are "
            "those at the end of training: on what is learnt, held out, and on the first task.\n"
        ),
        *shown,
        Text("; ".join(f"{name}: {detail['about']}" for name, detail in details.items()) + ".\n"),
    )
