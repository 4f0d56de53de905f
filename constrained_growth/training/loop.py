"""A complete training loop: train, decide, insert, train on; and resume a stopped run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from constrained_growth import checkpoint as checkpoints
from constrained_growth._arguments import data_again, functions, instance
from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import everywhere, in_step
from constrained_growth._progress import progress_bar
from constrained_growth._random_state import random_state, set_random_state
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import call, device_of
from constrained_growth._sites.untouched import generators_of, untouched
from constrained_growth.checkpoint import Checkpoint
from constrained_growth.errors import CheckpointError, DataError, TrainingError
from constrained_growth.insertion.training_state import Copies
from constrained_growth.norms import MomentNorm
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Plateau, Rule, When
from constrained_growth.solution import Norm, Solution
from constrained_growth.training.arguments import (
    check_growing,
    check_parts,
    check_training,
    stateful,
)
from constrained_growth.training.grower import AfterInsertion, Candidates, Grower
from constrained_growth.training.history import History
from constrained_growth.training.options import OPTIONS

_LOSS = "validation loss"
_PROGRESS = {"epoch": int, "done": int, "stopped": bool, "start": Mapping | None}
"""What a checkpoint holds of a `_Run`, and of which type."""


def grow(
    model: nn.Module,
    optimizer_factory: Callable[[Any], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]],
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    epochs: int,
    rule: Rule | None = None,
    norm: Norm | MomentNorm | None = None,
    when: Plateau | Callable[[Sequence[float]], bool | When] | None = None,
    confirm: Callable[[Solution], When] | None = None,
    candidates: Candidates | None = None,
    data: Iterable[Any] | None = None,
    max_insertions: int | None = None,
    patience: int | None = None,
    target: float | None = None,
    validation: Iterable[Any] | None = None,
    metrics: Mapping[str, Callable[[Any, Any], Tensor | float]] | None = None,
    scheduler_factory: Callable[[Any], Any] | None = None,
    after_insertion: AfterInsertion | None = None,
    solver: Callable[[GrowthProblem, Any], Solution] | None = None,
    callbacks: Iterable[Callable[[Grower], object]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    averaged: Copies = (),
    writer: Any = None,
    progress: bool | None = None,
) -> History:
    """Train a model that gains layers where and when they promise to help.

    At the end of each epoch `when` says whether it is time, then the `rule` what to insert. The
    layers are inserted without changing the function, the optimizer keeps its state, and training
    goes on. It ends after `epochs`, at the `target`, or when the rule has found nothing worth
    inserting `patience` times in a row.

    With `torch.distributed` all processes call this with the model wrapped
    (DistributedDataParallel, `fully_shard`) and a loader of their shard of the data (with a
    `DistributedSampler`, say, whose `set_epoch` is called). Losses and metrics are means over all
    processes, and each decision is the same everywhere.

    Args:
        model: Trained and grown in place, in the mode (train or eval) it is in.
        optimizer_factory: `optimizer_factory(model.parameters()) -> Optimizer`, such as
            `functools.partial(torch.optim.Adam, lr=1e-3)`; or a list of several optimizers.
        loss_fn: `loss_fn(output, target)`, the mean over the samples of a batch.
        loader: The training data: `(input, target)` batches, as for `GrowthProblem`.
        epochs: Largest number of passes over them.
        rule: What to insert, as for `Grower`.
        norm: How large a multiplier is, as for `Grower`.
        when: When to ask, as for `Grower`.
        confirm: Called before something is inserted, as for `Grower`.
        candidates: What could be inserted, as for `Grower`.
        data: The data to decide on; the training data by default.
        max_insertions: As for `Grower`.
        patience: End after this many decisions in a row to insert nothing. None (default) to go on,
            whatever is decided.
        target: End when the loss (on `validation` if that is given, else the mean over the
            training steps of the epoch) is not above this number.
        validation: Batches to measure on after each epoch, in eval mode, without gradients.
        metrics: Name → `metric(output, target)`, a mean over the samples of a batch, measured on
            `validation` (or on `loader` without one) and kept in the history under its name.
        scheduler_factory: `scheduler_factory(optimizer)`, called with what the other factory
            returned; gives one scheduler or a list of them, stepped after each epoch, with the
            loss for a `ReduceLROnPlateau`.
        after_insertion: As for `Grower`.
        solver: As for `Grower`.
        callbacks: Called with the `Grower` after each epoch; training ends when one returns True.
            A run that ended so goes on from its checkpoint if they do not say so again.
        checkpoint: File to write a checkpoint to after each epoch. If it exists at the beginning,
            the run goes on from it, with the numbers of a run that was never stopped, bit for bit
            at one thread on one machine (but for what persistent workers draw). Give
            the model as it was before it grew, and delete the file and the `checkpoint.previous`
            of it to start afresh.
        checkpoint_every: Also write one every k steps.
        blocks: Name of the inserted layer → block, for your own blocks when a run is resumed.
        averaged: As for `Grower`, kept in the checkpoint; update them in `callbacks`, or in a hook
            of the optimizer, `register_step_post_hook`.
        writer: As for `Grower`.
        progress: Progress bar: True, False, or None (default) for one on a terminal.

    Returns:
        Losses, metrics, times, and every decision with its evidence.

    Raises:
        TrainingError: An argument makes no sense.
        DataError: The loader is empty or its batches are not pairs.
        CheckpointError: The checkpoint cannot be used.
        GrowthError: Whatever solving or inserting raises.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(3)]
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
        >>> history = grow(net, sgd, nn.CrossEntropyLoss(), data, epochs=3, max_insertions=1)
        >>> len(history.losses), history.layers
        (3, [2, 3, 3])
    """
    instance("callbacks", callbacks, Iterable, TrainingError, "a list of functions of the grower")
    callbacks = tuple(callbacks)
    given = SimpleNamespace(**{**locals(), "data": loader if data is None else data})
    check_training(given)
    check_growing(given)
    path = None if checkpoint is None else Path(checkpoint)
    saved = None if path is None else _saved(path, loader, stateful(given))
    if saved is not None and scheduler_factory is None and "scheduler" in saved.states:
        raise CheckpointError(
            f'scheduler_factory=None: the run in checkpoint="{path}" has a scheduler; give what '
            "made it, or delete the checkpoint and the one before it to start afresh."
        )
    if saved is None:
        optimizer = optimizer_factory(model.parameters())
        scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)
    else:
        resumed = checkpoints.resume(
            saved,
            model,
            optimizer_factory,
            scheduler_factory=scheduler_factory,
            averaged=averaged,
            blocks=blocks,
            loader=loader,
        )
        optimizer, scheduler = resumed.optimizer, resumed.scheduler
    options = {name: getattr(given, name) for name in OPTIONS if hasattr(given, name)}
    grower = Grower(model, optimizer, loss_fn, given.data, **options)
    run = _Run(grower, loader, scheduler, path)
    if saved is not None:
        grower.load_state_dict(saved.states["grower"])
        vars(run).update({name: saved.extra[name] for name in _PROGRESS})
        # a run that a callback has ended goes on if those given now do not end it
        run.stopped = run.stopped and any(callback(grower) is True for callback in callbacks)
    history = grower.history

    def is_over() -> bool:
        losses = history.losses if validation is None else history.metrics.get(_LOSS, [])
        reached = target is not None and bool(losses) and losses[-1] <= target
        answers = [round.chosen for round in history.rounds if round.when == When.NOW.name]
        empty = patience is not None and len(answers) >= patience and not any(answers[-patience:])
        return run.stopped or run.epoch >= epochs or reached or empty

    measured = {**(metrics or {}), **({} if validation is None else {_LOSS: loss_fn})}
    with progress_bar(
        desc="grow", unit="epoch", total=epochs, initial=run.epoch, progress=progress, leave=True
    ) as bar:
        while not is_over():
            for input, answer in run.batches():
                for one in grower.optimizers:
                    one.zero_grad()
                # `call` would bypass the forward of a DistributedDataParallel, not of a partial
                loss = loss_fn(call(functools.partial(model), input), answer)
                loss.backward()
                for one in grower.optimizers:
                    one.step()
                grower.step(loss)
                run.done += 1
                if checkpoint_every is not None and grower.num_steps % checkpoint_every == 0:
                    run.save()
            measured_on = loader if validation is None else validation
            is_time = grower.observe(evaluate(model, measured, measured_on) if measured else None)
            run.end_epoch()
            if is_time and not is_over():
                grower.ask()
            answers = [callback(grower) is True for callback in callbacks]
            run.stopped = any(everywhere(lambda answers=answers: any(answers), None))
            run.save()
            shown = {"loss": f"{history.losses[-1]:.3g}", "layers": history.layers[-1]}
            if history.rounds:
                shown["last"] = ", ".join(history.rounds[-1].chosen) or "nothing inserted"
            bar.set_postfix(shown, refresh=False)
            bar.update()
    return history


def _saved(path: Path, loader: Iterable[Any], parts: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one that can be; None to start afresh."""
    exists, kept = everywhere(lambda: (path.exists(), checkpoints.previous(path).exists()), None)[0]
    if not exists and kept:
        raise CheckpointError(
            f'checkpoint="{path}" does not exist, but the one before it does: rename '
            f'"{checkpoints.previous(path)}" to go on from that, or delete it to start afresh.'
        )
    found: list[Checkpoint] = []
    everywhere(lambda: found.append(checkpoints.load(path)) if exists else None, None)
    for saved in found:
        run = saved.extra if isinstance(saved.extra, Mapping) else {}
        told = all(isinstance(run.get(name, ""), kind) for name, kind in _PROGRESS.items())
        if not told or "grower" not in saved.states:
            raise CheckpointError(
                f'checkpoint="{path}" holds no run of grow; give the file of one, or a new name.'
            )
        if (number := length_hint(loader, run["done"])) < run["done"]:
            raise _too_short(number, run["done"])
        check_parts(saved.states["grower"], parts)
    return found[0] if found else None


def _too_short(number: int, done: int) -> CheckpointError:
    return CheckpointError(
        f"loader has {number} batches, and the run was stopped after {done} steps of an epoch; "
        "give the loader it had, or delete the checkpoint and the one before it to start afresh."
    )


@dataclass
class _Run:
    """A training run and how far it has come; a checkpoint holds the last four in its `extra`."""

    grower: Grower
    loader: Iterable[Any]
    scheduler: Any
    path: Path | None
    epoch: int = 0  # epochs completed
    done: int = 0  # steps completed in the next one
    stopped: bool = False  # by a callback
    start: Mapping[str, Any] | None = None  # random state at the beginning of the epoch

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The rest of the epoch, the same batches that an uninterrupted run would see."""
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if callable(set_epoch):  # of a DistributedSampler
            set_epoch(self.epoch)
        now = self._random_state()
        if self.start is None or not self.done:
            self.start = now
        # an iterator of the loader itself, whose workers may persist: starting them draws a number
        persistent = getattr(self.loader, "persistent_workers", False)
        if self.epoch and persistent and getattr(self.loader, "_iterator", None) is None:
            iter(self.loader)
        self._set_random_state(self.start)
        iterator = batches(iter(self.loader), device_of(self.grower.model))
        if self.done:  # draw again what was drawn before the run was stopped
            for number in range(self.done):
                if next(iterator, None) is None:
                    raise _too_short(number, self.done)
            self._set_random_state(now)  # training has drawn numbers too since the epoch began
        yield from iterator
        if not self.done:
            raise DataError("loader is empty; give at least one (input, target) batch.")

    def end_epoch(self) -> None:
        """Step the scheduler, and go to the next epoch."""
        several = isinstance(self.scheduler, list | tuple)
        for one in self.scheduler if several else (self.scheduler,):
            if isinstance(one, ReduceLROnPlateau):
                one.step(self.grower.history.losses[-1])
            elif one is not None:
                one.step()
        self.epoch, self.done, self.start = self.epoch + 1, 0, None

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self.path is None:
            return
        scheduler = {} if self.scheduler is None else {"scheduler": self.scheduler}
        checkpoints.save(
            self.path,
            self.grower.model,
            optimizer=self.grower.optimizer,
            averaged=self.grower.averaged,
            record=self.grower.record,
            step=self.grower.num_steps,
            extra={name: getattr(self, name) for name in _PROGRESS},
            grower=self.grower,
            loader=self.loader,
            **scheduler,
        )

    def _random_state(self) -> dict[str, Any]:
        generators = [generator.get_state() for generator in generators_of(self.loader)]
        return {"global": random_state(), "loader": generators}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        set_random_state(state["global"])
        for generator, kept in zip(generators_of(self.loader), state["loader"], strict=True):
            generator.set_state(kept)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    metrics: Mapping[str, Callable[[Any, Any], Tensor | float]],
    data: Iterable[Any],
) -> dict[str, float]:
    """Means over all samples of all processes, in eval mode.

    Modes and random state are restored.

    Args:
        model: The model to measure.
        metrics: Name → `metric(output, target)`, a mean over the samples of a batch.
        data: `(input, target)` batches.

    Returns:
        Name → mean.

    Raises:
        DataError: There is no batch.
    """
    instance("model", model, nn.Module, TrainingError, "the network")
    functions("metrics", metrics, TrainingError, '{"mae": nn.L1Loss()}')
    data_again("data", data)

    def read() -> tuple[dict[str, float], int]:
        sums, samples = dict.fromkeys(metrics, 0.0), 0
        pairs = batches(data, device_of(model))
        # a sharded model has to run equally often on all processes
        counted = in_step(pairs, None) if sharded else ((pair, True) for pair in pairs)
        for (input, target), counts in counted:
            output = call(model, input)
            if counts:
                size = batch_size(input, target)
                samples += size
                for name, metric in metrics.items():
                    sums[name] += size * _number(name, metric(output, target))
        return sums, samples

    sharded = is_sharded(model)
    with untouched(model, data):
        model.eval()
        found = everywhere(read, None, collective=sharded)
    samples = sum(number for _, number in found)
    if not samples:
        raise DataError("validation is empty; give at least one (input, target) batch.")
    return {name: sum(sums[name] for sums, _ in found) / samples for name in metrics}


def _number(name: str, value: Tensor | float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TrainingError(
            f"metrics: {name!r} returned a {type(value).__name__}{shape}, not a number; let it "
            "return the mean over the samples of the batch."
        ) from None
