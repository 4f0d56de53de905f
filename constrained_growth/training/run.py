"""Where a training run stands: begun, or taken up from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from constrained_growth import checkpoint
from constrained_growth._data import batches
from constrained_growth._distributed import everywhere
from constrained_growth._sites.model import device_of
from constrained_growth._sites.untouched import generators_of
from constrained_growth.errors import DataError
from constrained_growth.training.grower import Grower


class Run:
    """A training run, and how far it has come; taken up from its checkpoint if that is there.

    Args:
        make: `make(optimizer=…)` gives the grower of the model.
        model: As it was before it grew.
        loader: As for `grow`, like all that follow.
        optimizer_factory: Makes the optimizer.
        scheduler_factory: Makes the scheduler, or None.
        path: Of the checkpoint, or None.
        blocks: Of the user's own.

    Attributes:
        model: The one given, grown as far as it had.
        grower: Its grower.
        scheduler: Made by its factory, or None.
        epoch: How many are over.
        done: How many steps of the next one are.
        stopped: Whether a callback ended it.
    """

    def __init__(
        self,
        make: Callable[..., Grower],
        model: nn.Module,
        loader: Iterable[Any],
        optimizer_factory: Callable[[Any], torch.optim.Optimizer],
        scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None,
        path: str | os.PathLike[str] | None,
        blocks: Mapping[str, nn.Module] | None,
    ) -> None:
        self._loader = loader
        self._path = None if path is None else Path(path)
        self._start: Mapping[str, Any] | None = None  # random state at the beginning of the epoch
        self.epoch, self.done, self.stopped = 0, 0, False
        self.model = model
        resumed = None
        path = self._path
        if path is not None and everywhere(path.exists, None)[0]:
            resumed = checkpoint.resume(
                path,
                self.model,
                optimizer_factory,
                scheduler_factory=scheduler_factory,
                blocks=blocks,
                loader=loader,
            )
        optimizer = resumed.optimizer if resumed else optimizer_factory(self.model.parameters())
        self.grower = make(optimizer=optimizer)
        if resumed:
            self.scheduler = resumed.scheduler
            self.grower.load_state_dict(resumed.checkpoint.states["grower"])
            place = resumed.checkpoint.extra
            self.epoch, self.done, self.stopped = place["epoch"], place["done"], place["stopped"]
            self._start = place["start"]
        else:
            self.scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """What is left of the epoch, the very batches that an uninterrupted run would see."""
        device = device_of(self.model)
        sampler = getattr(self._loader, "sampler", None)
        if callable(getattr(sampler, "set_epoch", None)):  # a DistributedSampler
            sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        if self._start is None or not self.done:
            self._start = self._random()
            iterator = batches(self._loader, device)
        else:
            now = self._random()
            self._set_random(self._start)
            iterator = batches(self._loader, device)
            for _ in range(self.done):
                next(iterator)
            self._set_random(now)
        yield from iterator
        if not self.done:
            raise DataError("loader is empty; give at least one (input, target) batch.")

    def end_epoch(self) -> None:
        """Step the scheduler; the next epoch is next."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(self.grower.history.losses[-1])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.epoch, self.done, self._start = self.epoch + 1, 0, None

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self._path is None:
            return
        states = {"grower": self.grower, "loader": self._loader}
        if self.scheduler is not None:
            states["scheduler"] = self.scheduler
        checkpoint.save(
            self._path,
            self.model,
            optimizer=self.grower.optimizer,
            record=self.grower.record,
            step=self.grower.num_steps,
            extra={
                "epoch": self.epoch,
                "done": self.done,
                "stopped": self.stopped,
                "start": self._start,
            },
            **states,
        )

    def _random(self) -> dict[str, Any]:
        generators = [generator.get_state() for generator in generators_of(self._loader)]
        return {"global": checkpoint.random_state(), "loader": generators}

    def _set_random(self, state: Mapping[str, Any]) -> None:
        checkpoint.set_random_state(state["global"])
        for generator, kept in zip(generators_of(self._loader), state["loader"], strict=True):
            generator.set_state(kept)
