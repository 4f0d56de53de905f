"""What becomes of a trained network that gets one new layer and learns another task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth.experiments.caching import cached, digest
from constrained_growth.experiments.data import epochs
from constrained_growth.experiments.statistics import Array

Data = tuple[Tensor, Tensor]
"""Inputs and classes, the first dimension of both the samples."""

MEASURES = ("loss", "held out", "old")
"""Losses: on what is learnt, on held-out data of the same task, and of the first task."""


@dataclass(frozen=True)
class Training:
    """By Adam, on the cross-entropy, with a new order of the samples in every epoch."""

    steps: int
    batch: int
    lr: float


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


@dataclass(frozen=True)
class Moment:
    """A network between its two tasks, with the layer that each site could get."""

    model: nn.Sequential
    blocks: Sequence[nn.Module]
    data: Data
    held_out: Data
    old: Data  # held-out data of the first task


def at_the_moment(task: Adaptation, seed: int, cache: Path | None) -> Moment:
    """Train a network on its first task, or read from the folder `cache` what it learnt."""
    trained, old = _trained(task.origin, seed, cache)
    model = copy.deepcopy(trained).requires_grad_(not task.frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [block.requires_grad_() for block in task.origin.blocks(model)]
    return Moment(model, blocks, *task.data(seed), old)


def outcomes(
    task: Adaptation,
    moment: Moment,
    seed: int,
    runs: int,
    on_run: Callable[[], object] = lambda: None,
) -> Array:
    """Insert at every site, and nowhere, and train on in `runs` orders of the data.

    The same run has the same order everywhere. `on_run` is called after each. Returns the losses
    at the end, shape (sites + 1, runs, MEASURES), the last without a new layer; if the network is
    frozen nothing is trained there.
    """
    found = np.empty((len(moment.blocks) + 1, runs, len(MEASURES)))
    for site in range(-1, len(moment.blocks)):
        parts, grown = _inserted(moment, site, task.frozen)
        for run in range(runs):
            network = copy.deepcopy(grown)
            learn(network, parts[0], task.training, 1_000 * (seed + 1) + run)
            found[site, run] = [mean_loss(network, *part) for part in parts]
            on_run()
    return found


def learn(
    network: nn.Module,
    data: Data,
    training: Training,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Train what requires gradients; `on_step` is called after each step."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, training.lr)
    stream = epochs(*data, training.batch, seed)
    for _ in range(training.steps):
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        on_step()


@torch.no_grad()
def mean_loss(network: nn.Module, x: Tensor, y: Tensor, size: int = 256) -> float:
    """Mean cross-entropy, from batches of this size."""
    pieces = zip(x.split(size), y.split(size), strict=True)
    return sum(len(b) * float(F.cross_entropy(network(a), b)) for a, b in pieces) / len(y)


def key(task: Adaptation, moment: Moment, seed: int, runs: int) -> str:
    """Of the cache; changes with network, data, layers and settings."""
    named = [(type(block).__name__, str(block)) for block in moment.blocks]
    settings = repr((task.training, task.frozen, seed, runs, str(moment.model), named))
    tensors = [*moment.model.parameters(), *(p for b in moment.blocks for p in b.parameters())]
    data = (*moment.data, *moment.held_out, *moment.old)
    return digest(f"adaptation-{task.name}", settings, *tensors, *data)


@lru_cache(maxsize=1)  # all tasks of a network run one after the other
def _trained(origin: Origin, seed: int, cache: Path | None) -> tuple[nn.Sequential, Data]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, data, old = origin.begin(seed)
    named = digest(f"origin-{origin.name}", repr(origin.training), *model.parameters(), *data)

    def state() -> dict[str, Tensor]:
        learn(model, data, origin.training, seed)
        return model.state_dict()

    model.load_state_dict(cached(cache, named, state))
    return model, old


def _inserted(moment: Moment, site: int, frozen: bool) -> tuple[list[Data], nn.Sequential]:
    """The three data sets, and the network with the layer at the site.

    What comes before the first trainable layer is applied to the data once, not in every step.
    """
    layers, parts = list(moment.model), [moment.data, moment.held_out, moment.old]
    new = [moment.blocks[site]] if site >= 0 else []
    if not frozen:
        return parts, nn.Sequential(*layers[: site + 1], *new, *layers[site + 1 :])
    before = nn.Sequential(*layers[: site + 1])
    with torch.no_grad():
        seen = [(torch.cat([before(piece) for piece in x.split(256)]), y) for x, y in parts]
    return seen, nn.Sequential(*new, *layers[site + 1 :])
