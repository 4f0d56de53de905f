"""What becomes of a network after an insertion: at every site, with several orders of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from constrained_growth.experiments.decisions.tasks import Moment, Task
from constrained_growth.experiments.ensembles.growth import insert_layer, new_layer
from constrained_growth.experiments.ensembles.networks import Samples
from constrained_growth.experiments.ensembles.training import Shuffle, train

Array = NDArray[np.float64]

LAST = 10
"""The final loss is the mean over the last tenth of the epochs."""

MORE = 21
"""So many epochs more are trained, so that it is known what passes would buy that a rule spends."""


@dataclass(frozen=True)
class Outcomes:
    """Final training losses of a task's networks. The same run has the same order everywhere.

    Attributes:
        inserted: A layer at each site, at its pins; shape (sites, networks, runs, 1 + MORE), the
            last index for how many epochs more than the task says.
        nothing: Inserting nothing, shape (networks, runs, 1 + MORE).
        rehearsal: One more run with an order of its own, for a rule that tries every site to the
            end; shape (sites, networks).
    """

    inserted: Array
    nothing: Array
    rehearsal: Array


def outcomes(moment: Moment, runs: int, on_epoch: Callable[[], object] = lambda: None) -> Outcomes:
    """Insert at every site of every network, and nowhere, and train on.

    Args:
        moment: The networks.
        runs: How many orders of the data, so that luck is not taken for skill.
        on_epoch: Called after every epoch, `epochs(moment.task, sites)` times in all.
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
    """Insert into each network at a site of its own, and train on.

    Args:
        moment: The networks.
        sites: Of each network the number of the site; −1 inserts nothing.
        blocks: Of each network the layer for every site, with the values it starts at.
        runs: Numbers of the orders of the data.
        on_epoch: Called after every epoch; networks of one site are trained together.

    Returns:
        Final training losses after 0, 1, … MORE epochs more than the task says, shape (networks,
        runs, 1 + MORE).
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
    """A file name that other networks, data, layers, settings or seeds would not have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        model, data, _ = task.begin(seeds[0])
        block = task.block(8)
    settings = (task.optimizer, task.batch, task.before, task.after, MORE, task.loss.__name__)
    described = repr((settings, tuple(seeds), runs, str(model), str(block)))
    digest = hashlib.sha256(described.encode())
    for tensor in (*model.parameters(), *data):
        digest.update(tensor.detach().numpy().tobytes())
    return f"decisions-{task.name}-{digest.hexdigest()[:16]}.npz"


def save(file: Path, found: Outcomes) -> None:
    """Written under another name first: a file that is there is whole."""
    unfinished = file.with_suffix(".part")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **{f.name: getattr(found, f.name) for f in fields(found)})
    unfinished.replace(file)


def load(file: Path) -> Outcomes:
    """What was saved."""
    with np.load(file, allow_pickle=False) as arrays:
        return Outcomes(*(arrays[f.name] for f in fields(Outcomes)))
