"""Training of an ensemble: every replica on its own data, in its own order, until it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Loss,
    Samples,
    cross_entropy,
    error_rate,
    gradient,
)


class Optimizer(Protocol):
    """One step of all replicas."""

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """Move the parameters and update the memory, in place, all (replicas, parameters).

        The memory is empty before the first step, and has the names of PyTorch's state; `running`
        (replicas, 1 or parameters) is 0 for what does not move.
        """
        ...


@dataclass(frozen=True)
class SGD:
    """As `torch.optim.SGD`."""

    lr: float
    momentum: float = 0.0

    def plain(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """PyTorch's, of one network."""
        return torch.optim.SGD(parameters, self.lr, self.momentum)

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """One step."""
        if self.momentum:
            velocity = memory.setdefault("momentum_buffer", torch.zeros_like(parameters))
            gradient = velocity.mul_(self.momentum).add_(gradient)
        parameters.sub_(gradient * (self.lr * running))


@dataclass(frozen=True)
class Adam:
    """As `torch.optim.Adam`; new parameters count their own steps."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def plain(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """PyTorch's, of one network."""
        return torch.optim.Adam(parameters, self.lr, self.betas, self.eps)

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """One step."""
        for name in ("step", "exp_avg", "exp_avg_sq"):
            memory.setdefault(name, torch.zeros_like(parameters))
        first, second = self.betas
        steps = memory["step"].add_(1)
        mean = memory["exp_avg"].lerp_(gradient, 1 - first)
        square = memory["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square / (1 - second**steps)).sqrt_().add_(self.eps)
        parameters.sub_(mean / (1 - first**steps) / scale * (self.lr * running))


@dataclass(frozen=True)
class Shuffle:
    """A new order of the samples in every epoch, fixed by seed and epoch; one seed per replica."""

    seeds: Sequence[int]

    def __call__(self, epoch: int, count: int) -> Tensor:
        """Orders of `count` samples, shape (replicas, count)."""
        drawn = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for seed in self.seeds]
        return torch.stack([torch.randperm(count, generator=generator) for generator in drawn])


@dataclass(frozen=True)
class History:
    """What training recorded; replicas that stopped keep their last values."""

    loss: Tensor  # (epochs, replicas), mean over an epoch's batches before each step
    test_error: Tensor | None  # (epochs, replicas), share of misclassified samples after an epoch
    trained: Tensor  # (replicas,), how many epochs


def train(
    begun: Ensemble,
    data: Samples,
    epochs: int,
    optimizer: Optimizer,
    *,
    loss: Loss = cross_entropy,
    batch: int | None = None,
    order: Callable[[int, int], Tensor] | None = None,
    test: Samples | None = None,
    moving: Tensor | None = None,
) -> tuple[Ensemble, History]:
    """Train all replicas together for some more epochs, from `begun`, which is not changed.

    By default a batch has all samples, in the order of the data. `order` maps epoch (counted from
    `begun.epochs`) and number of samples to orders (replicas, samples), such as `Shuffle`. On
    `test` the error rate is measured after every epoch; a replica without errors stops for good.
    `moving` (replicas, parameters) is 0 for the parameters that do not learn, 1 for others.
    """
    parameters, running = begun.parameters.clone(), begun.running.clone()
    memory = {key: value.clone() for key, value in begun.memory.items()}
    losses, errors, trained = list[Tensor](), list[Tensor](), torch.zeros(len(begun)).long()
    last_loss = begun.last_loss
    last_error = None if test is None else error_rate(begun.model, parameters, test)
    for epoch in range(begun.epochs, begun.epochs + epochs):
        if running.any():
            now_moving = running.unsqueeze(1).to(parameters.dtype)
            if moving is not None:
                now_moving = now_moving * moving
            rows = None if order is None else order(epoch, data.x.shape[2])
            now = list[Tensor]()
            for part in _batches(data, batch, rows):
                value, slope = gradient(begun.model, parameters, part, loss)
                optimizer.step(parameters, slope, memory, now_moving)
                now.append(value)
            last_loss = torch.where(running, torch.stack(now).mean(0), last_loss)
            trained += running
            if test is not None:
                last_error = error_rate(begun.model, parameters, test)
                running &= last_error > 0
        losses.append(last_loss)
        if last_error is not None:
            errors.append(last_error)
    after = replace(
        begun,
        parameters=parameters,
        memory=memory,
        running=running,
        last_loss=last_loss,
        epochs=begun.epochs + epochs,
    )
    recorded = torch.stack(losses) if losses else parameters.new_empty(0, len(begun))
    return after, History(recorded, torch.stack(errors) if errors else None, trained)


def _batches(data: Samples, size: int | None, order: Tensor | None) -> Iterator[Samples]:
    """One after the other: only one batch at a time is copied."""
    count = data.x.shape[2]
    size = count if size is None else min(size, count)
    for begin in range(0, count, size):
        if order is None:
            part = slice(begin, begin + size)
            yield Samples(data.x[:, :, part], data.y[:, :, part])
        else:
            rows = order[:, begin : begin + size].unsqueeze(1)
            yield Samples(_gathered(data.x, rows), _gathered(data.y, rows))


def _gathered(values: Tensor, rows: Tensor) -> Tensor:
    index = rows.expand(-1, values.shape[1], -1)
    return values.expand(len(rows), -1, -1).gather(2, index)
