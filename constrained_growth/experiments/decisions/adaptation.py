"""Families of adaptations: a trained network gets one new layer and learns another task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.experiments.decisions.arms import CONTROLS, SIZES, Arm, Asked, decide
from constrained_growth.experiments.decisions.study import Decided, Outcomes, Plan
from constrained_growth.experiments.jobs import cached, digest
from constrained_growth.experiments.statistics import Array
from constrained_growth.experiments.training import (
    Data,
    Training,
    frozen_part,
    learn,
    mean_loss,
    passed_through,
)

MEASURES = ("loss", "held out", "old")
"""Losses: on what is learnt, on held-out data of the same task, and of the first task."""

MIDDLE = Arm("middle site", lambda asked: cg.Fixed(len(asked.candidates) // 2), passes=0.0)

ARMS: tuple[Arm, ...] = (*SIZES, *CONTROLS, MIDDLE)


@dataclass(frozen=True)
class Origin:
    """A kind of network and its first task.

    `begin` maps a seed to the untrained network, the data that it learns first, and held-out data.
    `blocks` makes, for the trained network, the new layer after each of its modules but the last.
    """

    name: str
    about: str
    begin: Callable[[int], tuple[nn.Sequential, Data, Data]]
    blocks: Callable[[nn.Sequential], list[nn.Module]]
    training: Training


@dataclass(frozen=True)
class Adaptation:
    """The next task; `data` maps a seed to data to learn and held-out data.

    With `frozen` only the new layer learns, otherwise all of the network does.
    """

    name: str
    about: str
    origin: Origin
    data: Callable[[int], tuple[Data, Data]]
    training: Training
    frozen: bool = True
    asked: int = 2_000  # samples about which rules are asked, the first to be learnt

    @property
    def group(self) -> str:
        """What is trained."""
        return "old weights frozen" if self.frozen else "all weights trained"


@dataclass(frozen=True)
class Moment:
    """A network between its two tasks, with the layer that each site could get."""

    model: nn.Sequential
    blocks: Sequence[nn.Module]
    data: Data
    held_out: Data
    old: Data  # held-out data of the first task


def plan(tasks: Sequence[Adaptation], networks: int, runs: int) -> Plan:
    """Of this family."""
    return Plan(tasks, networks, runs, adapted, ARMS, MEASURES)


def quick(tasks: Sequence[Adaptation], *names: str) -> Plan:
    """Two networks of some of the tasks, hardly trained."""
    short = Training(steps=10, batch=16, lr=0.002)
    some = [
        replace(task, origin=replace(task.origin, training=short), training=short, asked=64)
        for task in tasks
        if task.name in names
    ]
    return plan(some, networks=2, runs=2)


def adapted(
    tasks: Sequence[Adaptation],
    seeds: Sequence[int],
    runs: int,
    arms: Sequence[Arm],
    cache: Path | None,
) -> list[Outcomes]:
    """What becomes of one network, of the same origin in all tasks.

    What it learnt and what became of it is kept in the folder `cache`.
    """
    (seed,), found = seeds, []
    trained, old = trained_on_first(tasks[0].origin, seed, cache)
    for task in tasks:
        moment = at_the_moment(task, trained, old, seed)

        def compute(task: Adaptation = task, moment: Moment = moment) -> Array:
            return outcomes(task, moment, seed, runs)

        losses = cached(cache, key(task, moment, seed, runs), compute)
        sites = _chosen(task, moment, seed, arms)
        means = losses.mean(1)
        decided = {
            arm.name: Decided(np.array([site]), np.array([arm.passes]), means[[site]])
            for arm, site in zip(arms, sites, strict=True)
        }
        found.append(Outcomes(losses[:, None], decided, [None]))
    return found


def _chosen(task: Adaptation, moment: Moment, seed: int, arms: Sequence[Arm]) -> list[int]:
    """The site that each arm chooses, −1 for none."""
    x, y = (part[: task.asked].split(256) for part in moment.data)
    candidates = [cg.Candidate(str(k), block) for k, block in enumerate(moment.blocks)]
    data, loss_fn = list(zip(x, y, strict=True)), nn.CrossEntropyLoss()
    problem = cg.GrowthProblem(moment.model, loss_fn, data, candidates)
    optimizer = torch.optim.Adam(moment.model.parameters(), task.training.lr)
    names = tuple(candidate.name for candidate in candidates)
    asked = Asked(seed, names, optimizer, task.training.batch, len(moment.data[1]))
    solved = dict[str, cg.Solution]()
    return [decide(arm, asked, problem, solved)[0] for arm in arms]


def at_the_moment(task: Adaptation, trained: nn.Sequential, old: Data, seed: int) -> Moment:
    """A network that has learnt its first task; `old` are held-out data of that."""
    model = copy.deepcopy(trained).requires_grad_(not task.frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [block.requires_grad_() for block in task.origin.blocks(model)]
    return Moment(model, blocks, *task.data(seed), old)


def outcomes(task: Adaptation, moment: Moment, seed: int, runs: int) -> Array:
    """Insert at every site, and nowhere, and train on in `runs` orders of the data.

    The same run has the same order everywhere. Returns the losses at the end, shape (sites + 1,
    runs, MEASURES), the last without a new layer; if the network is frozen nothing is trained
    there.
    """
    found = np.empty((len(moment.blocks) + 1, runs, len(MEASURES)))
    for site in range(-1, len(moment.blocks)):
        parts, grown = _inserted(moment, site)
        for run in range(runs):
            network = copy.deepcopy(grown)
            learn(network, parts[0], task.training, 1_000 * (seed + 1) + run)
            found[site, run] = [mean_loss(network, *part) for part in parts]
    return found


def key(task: Adaptation, moment: Moment, seed: int, runs: int) -> str:
    """Of the cache; changes with network, data, layers and settings."""
    named = [(type(block).__name__, str(block)) for block in moment.blocks]
    settings = repr((task.training, task.frozen, seed, runs, str(moment.model), named))
    tensors = [*moment.model.parameters(), *(p for b in moment.blocks for p in b.parameters())]
    data = (*moment.data, *moment.held_out, *moment.old)
    return digest(f"adaptation-{task.name}", settings, *tensors, *data)


def trained_on_first(origin: Origin, seed: int, cache: Path | None) -> tuple[nn.Sequential, Data]:
    """A network that has learnt the first task, and held-out data of that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, data, old = origin.begin(seed)
    named = digest(f"origin-{origin.name}", repr(origin.training), *model.parameters(), *data)

    def state() -> dict[str, Tensor]:
        learn(model, data, origin.training, seed)
        return model.state_dict()

    model.load_state_dict(cached(cache, named, state))
    return model, old


def _inserted(moment: Moment, site: int) -> tuple[list[Data], nn.Sequential]:
    """The three data sets, and the network with the layer at the site.

    What comes before the first trainable layer is applied to the data once, not in every step.
    """
    layers, parts = list(moment.model), [moment.data, moment.held_out, moment.old]
    if site >= 0:
        layers.insert(site + 1, moment.blocks[site])
    before, grown = frozen_part(nn.Sequential(*layers))
    return [passed_through(before, part) if len(before) else part for part in parts], grown
