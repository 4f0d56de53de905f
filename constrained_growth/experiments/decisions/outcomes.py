"""Networks that are trained on after an insertion, many at once: at every site, and as decided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import constrained_growth as cg
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments.decisions.arms import Arm, Asked, decide
from constrained_growth.experiments.decisions.study import MORE, Decided, Outcomes
from constrained_growth.experiments.ensembles.growth import NewLayer, insert_layer
from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Loss,
    Samples,
    cross_entropy,
    ensemble,
    samples,
    sites_of,
    split,
)
from constrained_growth.experiments.ensembles.training import SGD, Adam, Shuffle, train
from constrained_growth.experiments.jobs import cached, digest
from constrained_growth.experiments.statistics import Array
from constrained_growth.experiments.training import Data

LAST = 10
"""The final loss is the mean over the last tenth of the epochs."""


@dataclass(frozen=True)
class Task:
    """Networks of one kind, each on its own data, and how they are trained.

    `begin` maps a seed to network and data before the first step, and the site (number of the
    hidden stage before it) where a layer is known to be missing, or None.
    """

    name: str
    about: str
    begin: Callable[[int], tuple[nn.Sequential, Data, int | None]]
    block: Callable[[int], nn.Module]  # width of a site → the layer that could be inserted
    optimizer: SGD | Adam
    batch: int
    before: int  # epochs before the insertion
    after: int
    group: str  # half 0 or 1: constants chosen on one half of the suite are judged on the other
    loss: Loss = cross_entropy
    loss_fn: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # the same, a plain network's

    @property
    def origin(self) -> str:
        """Nothing is shared with other tasks."""
        return self.name


@dataclass(frozen=True)
class Moment:
    """All networks of a task at the moment of insertion, as an ensemble and as plain modules."""

    task: Task
    trained: Ensemble
    data: Samples
    models: Sequence[nn.Sequential]
    plain: Sequence[Data]
    blocks: Sequence[Sequence[nn.Module]]  # for each network the layer at each of its sites
    planted: Sequence[int | None]  # the site where a layer is missing, if that is known
    seeds: Sequence[int]


def at_the_moment(task: Task, seeds: Sequence[int]) -> Moment:
    """Make the networks of a task, one for each seed, and train them up to the insertion."""
    models, xs, ys, planted, blocks = [], [], [], [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, (x, y), site = task.begin(seed)
            widths = [out for _, out in sites_of(model)]
            blocks.append([task.block(width) for width in widths])
        models.append(model)
        xs.append(x)
        ys.append(y)
        planted.append(site)
    data = samples(xs, ys)
    trained, _ = train(
        ensemble(models),
        data,
        task.before,
        task.optimizer,
        loss=task.loss,
        batch=task.batch,
        order=Shuffle(list(seeds)),
    )
    trained.write_to(models)
    plain = list(zip(xs, ys, strict=True))
    return Moment(task, trained, data, models, plain, blocks, planted, seeds)


def family(
    tasks: Sequence[Task],
    seeds: Sequence[int],
    runs: int,
    arms: Sequence[Arm],
    cache: Path | None,
) -> list[Outcomes]:
    """What becomes of the networks of a task, and what the arms decide about them."""
    (task,) = tasks
    moment = at_the_moment(task, seeds)
    # one run more, for a rule that tries every site to the end
    losses = cached(cache, key(task, seeds, runs), lambda: outcomes(moment, runs + 1))
    losses, rehearsal = losses[:, :, :runs], losses[:-1, :, runs, 0]
    return [Outcomes(losses, decisions(moment, arms, losses, rehearsal), moment.planted)]


def outcomes(moment: Moment, runs: int) -> Array:
    """Insert at every site of every network, and last nowhere; train on in `runs` orders.

    Returns the final training losses, shape (sites + 1, networks, runs, 1 + MORE).
    """
    count, sites = len(moment.models), [*range(len(moment.blocks[0])), -1]
    return np.stack([continued(moment, [k] * count, moment.blocks, range(runs)) for k in sites])


def continued(
    moment: Moment,
    sites: Sequence[int],
    blocks: Sequence[Sequence[nn.Module]],
    runs: Sequence[int],
) -> Array:
    """Insert into each network at its site, and train on; networks with one site train together.

    `sites` holds −1 where nothing is inserted; `blocks` has for each network the layer at every
    site, with the values it starts from; `runs` are numbers of orders of the data. Returns the
    final training losses after 0, 1, … MORE further epochs, shape (networks, runs, 1 + MORE).
    """
    task = moment.task
    found = np.empty((len(sites), len(runs), 1 + MORE))
    for site in sorted(set(sites)):
        mine = [i for i, other in enumerate(sites) if other == site]
        rows = [i for i in mine for _ in runs]
        begun = moment.trained.take(rows)
        if site >= 0:
            begun = insert_layer(begun, site, NewLayer.of(*(blocks[i][site] for i in rows)))
        # orders that no other network or run has
        orders = [1_000_000 + 1_000 * moment.seeds[i] + run for i in mine for run in runs]
        _, history = train(
            begun,
            moment.data.take(rows),
            task.after + MORE,
            task.optimizer,
            loss=task.loss,
            batch=task.batch,
            order=Shuffle(orders),
        )
        loss, last = history.loss.double().numpy(), max(1, task.after // LAST)
        ends = range(task.after, task.after + MORE + 1)
        final = np.stack([loss[end - last : end].mean(0) for end in ends], 1)
        found[mine] = final.reshape(len(mine), len(runs), 1 + MORE)
    return found


def decisions(
    moment: Moment, arms: Sequence[Arm], losses: Array, rehearsal: Array
) -> dict[str, Decided]:
    """Ask the library about every network, once for each arm.

    `losses` are those of `outcomes`. Layers that a decision moves off their pins are trained now.
    """
    sites: dict[str, list[int]] = {arm.name: [] for arm in arms}
    passes: dict[str, list[float]] = {arm.name: [] for arm in arms}
    started: dict[str, list[Sequence[nn.Module]]] = {arm.name: [] for arm in arms}
    for i, blocks in enumerate(moment.blocks):
        model, (x, y) = moment.models[i], moment.plain[i]
        memory = {name: flat[i] for name, flat in moment.trained.memory.items()}
        optimizer = plain_optimizer(moment.task.optimizer, model, memory)
        names = tuple(name for name, _ in sites_of(model))
        full = rehearsal[:, i], float(moment.task.after * len(names))
        asked = Asked(moment.seeds[i], names, optimizer, moment.task.batch, len(x), full)
        candidates = [cg.Candidate(*pair) for pair in zip(names, blocks, strict=True)]
        problems = {
            in_batches: cg.GrowthProblem(model, moment.task.loss_fn, data, candidates)
            for in_batches, data in ((False, [(x, y)]), (True, _loader(x, y, moment.task.batch)))
        }
        solved: dict[bool, dict[str, cg.Solution]] = {False: {}, True: {}}
        for arm in arms:
            site, decision = decide(arm, asked, problems[arm.in_batches], solved[arm.in_batches])
            sites[arm.name].append(site)
            passes[arm.name].append(arm.passes + float(decision.evidence.get("passes", 0.0)))
            started[arm.name].append(_started(decision, names, blocks))
    found, rows = dict[str, Decided](), np.arange(len(moment.models))
    for name, chosen in sites.items():
        blocks = started[name]
        after = losses[chosen, rows]
        if any(mine is not pinned for mine, pinned in zip(blocks, moment.blocks, strict=True)):
            after = continued(moment, chosen, blocks, range(losses.shape[2]))
        found[name] = Decided(np.array(chosen), np.array(passes[name]), after.mean(1))
    return found


def plain_optimizer(
    optimizer: SGD | Adam, model: nn.Module, memory: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """PyTorch's optimizer of a plain network, with its state in an ensemble as (parameters,)."""
    parameters = list(model.parameters())
    made = optimizer.plain(parameters)
    for name, flat in memory.items():
        for parameter, values in zip(parameters, split(model, flat[None]), strict=True):
            # PyTorch counts the steps of a tensor, not of each entry
            part = values.flatten()[0] if name == "step" else values[0]
            made.state[parameter][name] = part.clone()
    return made


def _loader(x: Tensor, y: Tensor, batch: int) -> DataLoader:
    """Batches in a new random order every time, each cut out of the tensors at once."""
    data = TensorDataset(x, y)
    batches = BatchSampler(RandomSampler(data), batch, drop_last=False)
    return DataLoader(data, sampler=batches, batch_size=None)


def _started(
    decision: cg.Decision, candidates: Sequence[str], blocks: Sequence[nn.Module]
) -> Sequence[nn.Module]:
    """The same layers, or with the chosen one moved from its pins as decided."""
    if not any(decision.values.values()):
        return blocks
    moved = list(blocks)
    for name, values in decision.values.items():
        index = candidates.index(name)
        moved[index] = copy.deepcopy(blocks[index])
        pins = pinned_parameters(moved[index])
        with torch.no_grad():
            for parameter, value in values.items():
                pins[parameter].add_(value)
    return moved


def key(task: Task, seeds: Sequence[int], runs: int) -> str:
    """Of the cache; changes with networks, data, layers, settings and seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        model, data, _ = task.begin(seeds[0])
        block = task.block(8)
    settings = (task.optimizer, task.batch, task.before, task.after, MORE, task.loss.__name__)
    described = repr((settings, tuple(seeds), runs, str(model), str(block)))
    return digest(f"decisions-{task.name}", described, *model.parameters(), *data)
