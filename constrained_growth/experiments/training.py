"""Plain training of one network, as several experiments do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth.experiments.data import epochs

Data = tuple[Tensor, Tensor]
"""Inputs and classes, the first dimension of both the samples."""


@dataclass(frozen=True)
class Training:
    """By Adam, on the cross-entropy, with a new order of the samples in every epoch."""

    steps: int
    batch: int
    lr: float


def learn(
    network: nn.Module,
    data: Data,
    training: Training,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Train what requires gradients; `on_step` is called after each step.

    `schedule` maps the number of steps done to a factor of the learning rate.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, training.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    stream = epochs(*data, training.batch, seed)
    for _ in range(training.steps):
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        scheduler.step()
        on_step()


@torch.no_grad()
def mean_loss(network: nn.Module, x: Tensor, y: Tensor, size: int = 256) -> float:
    """Mean cross-entropy, from batches of this size."""
    pieces = zip(x.split(size), y.split(size), strict=True)
    return sum(len(b) * float(F.cross_entropy(network(a), b)) for a, b in pieces) / len(y)


def frozen_part(network: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """The modules before the first that trains, and the rest; what is frozen need run only once."""
    children = list(network)
    trains = [any(p.requires_grad for p in child.parameters()) for child in children]
    first = trains.index(True) if any(trains) else 0
    return nn.Sequential(*children[:first]), nn.Sequential(*children[first:])


@torch.no_grad()
def passed_through(network: nn.Module, data: Data) -> Data:
    """The data after some frozen modules."""
    x, y = data
    return torch.cat([network(piece) for piece in x.split(256)]), y
