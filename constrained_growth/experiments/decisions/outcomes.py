"""What becomes of a network after an insertion: at every site, with several orders of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from constrained_growth.experiments.caching import digest
from constrained_growth.experiments.decisions.tasks import Moment, Task
from constrained_growth.experiments.ensembles.growth import insert_layer, new_layer
from constrained_growth.experiments.ensembles.networks import Samples
from constrained_growth.experiments.ensembles.training import Shuffle, train
from constrained_growth.experiments.statistics import Array

LAST = 10
"""The final loss is the mean over the last tenth of the epochs."""

MORE = 21
"""Further epochs are trained, to know what the passes would buy that a rule spends."""


@dataclass(frozen=True)
class Outcomes:
    """Final training losses of a task's networks. The same run has the same order everywhere.

    `inserted` (sites, networks, runs, 1 + MORE) has a layer at each site, at its pins, the last
    index being the number of further epochs; `nothing` (networks, runs, 1 + MORE) none;
    `rehearsal` (sites, networks) is one more run, for a rule that tries every site to the end.
    """

    inserted: Array
    nothing: Array
    rehearsal: Array


def outcomes(moment: Moment, runs: int, on_epoch: Callable[[], object] = lambda: None) -> Outcomes:
    """Insert at every site of every network, and nowhere; train on in `runs` orders of the data.

    `on_epoch` is called `epochs(moment.task, sites)` times.
    """
    count, sites = len(moment.models), range(len(moment.blocks[0]))
    nothing = continued(moment, [-1] * count, moment.blocks, range(runs), on_epoch)
    losses = np.stack(
        [continued(moment, [k] * count, moment.blocks, range(runs + 1), on_epoch) for k in sites]
    )
    return Outcomes(losses[:, :, :runs], nothing, losses[:, :, runs, 0])


def continued(
    moment: Moment,
    sites: Sequence[int],
    blocks: Sequence[Sequence[nn.Module]],
    runs: Sequence[int],
    on_epoch: Callable[[], object] = lambda: None,
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
            layer = new_layer([blocks[i][site] for i in rows])
            begun = insert_layer(begun, [site] * len(rows), layer)
        _, history = train(
            begun,
            Samples(moment.data.x[rows], moment.data.y[rows]),
            task.after + MORE,
            task.optimizer,
            loss=task.loss,
            batch=task.batch,
            order=Shuffle([_order(moment.seeds[i], run) for i in mine for run in runs]),
            on_epoch=on_epoch,
        )
        loss, last = history.loss.double().numpy(), max(1, task.after // LAST)
        ends = range(task.after, task.after + MORE + 1)
        final = np.stack([loss[end - last : end].mean(0) for end in ends], 1)
        found[mine] = final.reshape(len(mine), len(runs), 1 + MORE)
    return found


def epochs(task: Task, sites: int) -> int:
    """How often `outcomes` calls back."""
    return (1 + sites) * (task.after + MORE)


def _order(seed: int, run: int) -> int:
    """Seed of an order of the data that no other network or run has."""
    return 1_000_000 + 1_000 * seed + run


def key(task: Task, seeds: Sequence[int], runs: int) -> str:
    """Of the cache; changes with networks, data, layers, settings and seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        model, data, _ = task.begin(seeds[0])
        block = task.block(8)
    settings = (task.optimizer, task.batch, task.before, task.after, MORE, task.loss.__name__)
    described = repr((settings, tuple(seeds), runs, str(model), str(block)))
    return digest(f"decisions-{task.name}", described, *model.parameters(), *data)
