"""The training loop for those who have none: train, decide, insert, train on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth._distributed import everywhere, rank
from constrained_growth._sites.model import call
from constrained_growth.errors import TrainingError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Rule, TopK
from constrained_growth.rules.plateau import When
from constrained_growth.solution import Solution
from constrained_growth.solve import solve
from constrained_growth.training.evaluation import evaluate
from constrained_growth.training.grower import AfterInsertion, Candidates, Grower, Schedule
from constrained_growth.training.history import History, Writer
from constrained_growth.training.run import Run

_TOP_ONE = TopK(1)
_LOSS = "validation loss"


def grow(
    model: nn.Module,
    optimizer_factory: Callable[[Any], torch.optim.Optimizer],
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    epochs: int,
    rule: Rule = _TOP_ONE,
    when: Schedule | None = None,
    confirm: Callable[[Solution], When] | None = None,
    candidates: Candidates | None = None,
    data: Iterable[Any] | None = None,
    max_insertions: int | None = None,
    patience: int | None = 1,
    target: float | None = None,
    validation: Iterable[Any] | None = None,
    metrics: Mapping[str, Callable[[Any, Any], Tensor | float]] | None = None,
    scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None = None,
    after_insertion: AfterInsertion | None = None,
    solver: Callable[[GrowthProblem, Rule], Solution] = solve,
    callbacks: Iterable[Callable[[Grower], object]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    writer: Writer | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model that gains layers where and when they promise something.

    At the end of each epoch `when` is asked whether it is time, then the `rule` what to insert;
    the layers are inserted without moving the function, the optimizer keeps its memory, and
    training goes on. It ends after `epochs`, at the `target`, or when the rule has found nothing
    worth inserting `patience` times in a row.

    With `torch.distributed` all processes call this with the model wrapped
    (DistributedDataParallel, `fully_shard`) and a loader of their shard of the data (with a
    `DistributedSampler`, say, whose `set_epoch` is called); losses and metrics are means over all
    of them, and each decision is the same everywhere.

    Args:
        model: Trained and grown in place, in the mode (train or eval) it is in.
        optimizer_factory: `optimizer_factory(model.parameters()) -> Optimizer`, such as
            `functools.partial(torch.optim.Adam, lr=1e-3)`.
        loss_fn: `loss_fn(output, target)`, the mean over the samples of a batch.
        loader: The training data: `(input, target)` batches, as for `GrowthProblem`.
        epochs: How often to go through them, at most.
        rule: What to insert, as for `Grower`.
        when: When to ask, as for `Grower`.
        confirm: Asked before something is inserted, as for `Grower`.
        candidates: What could be inserted, as for `Grower`.
        data: What decides where to grow; the training data by default.
        max_insertions: As for `Grower`.
        patience: After how many decisions in a row to insert nothing it ends; None to go on.
        target: End when the loss (on `validation` if that is given, else the mean over the
            training steps of the epoch) is not above this number.
        validation: Batches to measure on after each epoch, in eval mode, without gradients.
        metrics: Name → `metric(output, target)`, a mean over the samples of a batch, measured on
            `validation` (or on `loader` without one) and kept in the history under its name.
        scheduler_factory: `scheduler_factory(optimizer)`; stepped after each epoch, with the loss
            for a `ReduceLROnPlateau`.
        after_insertion: As for `Grower`.
        solver: As for `Grower`.
        callbacks: Each is called with the `Grower` after each epoch; it ends when one returns True.
        checkpoint: File to write a checkpoint to after each epoch. If it is there at the beginning,
            the run is taken up from it: the numbers are those of a run that was never stopped, bit
            for bit at one thread on one machine. Give the model as it was before it was grown, and
            delete the file to begin anew.
        checkpoint_every: Also write one after every so many steps.
        blocks: For blocks of your own, by name of the inserted layer, when a run is taken up.
        writer: As for `Grower`.
        progress: Progress bar: True, False, or None (default) for one on a terminal.

    Returns:
        Losses, metrics, times, and every decision with its evidence.

    Raises:
        TrainingError: An argument makes no sense.
        DataError: The loader is empty or its batches are not pairs.
        CheckpointError: The checkpoint cannot be used.
        GrowthError: What solving or inserting raises.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(3)]
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
        >>> history = grow(net, sgd, nn.CrossEntropyLoss(), data, epochs=3, max_insertions=1)
        >>> len(history.losses), history.layers
        (3, [2, 3, 3])
    """
    _check(epochs, patience, checkpoint_every)
    make = functools.partial(
        Grower,
        model,
        loss_fn=loss_fn,
        data=loader if data is None else data,
        rule=rule,
        when=when,
        confirm=confirm,
        candidates=candidates,
        max_insertions=max_insertions,
        after_insertion=after_insertion,
        solver=solver,
        writer=writer,
    )
    run = Run(make, model, loader, optimizer_factory, scheduler_factory, checkpoint, blocks)
    grower, history = run.grower, run.grower.history
    measured = loader if validation is None else validation

    def is_over() -> bool:
        watched = history.losses if validation is None else history.metrics.get(_LOSS, [])
        reached = target is not None and bool(watched) and watched[-1] <= target
        answers = [one.chosen for one in history.rounds if one.when == When.NOW.name]
        empty = patience is not None and len(answers) >= patience and not any(answers[-patience:])
        return run.stopped or run.epoch >= epochs or reached or empty

    disable = None if progress is None else not progress
    disable = True if rank(None) > 0 else disable
    with tqdm(desc="grow", unit="epoch", total=epochs, initial=run.epoch, disable=disable) as bar:
        while not is_over():
            for input, answer in run.batches():
                grower.step(_train_step(model, grower.optimizer, loss_fn, input, answer))
                run.done += 1
                if checkpoint_every is not None and grower.num_steps % checkpoint_every == 0:
                    run.save()
            found = dict(metrics or {})
            if validation is not None:
                found[_LOSS] = loss_fn
            is_time = grower.observe(evaluate(model, found, measured) if found else None)
            run.end_epoch()
            if is_time and not is_over():
                grower.ask()
            answers = [callback(grower) for callback in callbacks]
            stop = any(answer is True for answer in answers)
            run.stopped = any(everywhere(lambda stop=stop: stop, None))
            run.save()
            bar.set_postfix(_news(history), refresh=False)
            bar.update()
    return history


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    input: object,
    target: object,
) -> Tensor:
    optimizer.zero_grad()
    loss = loss_fn(call(functools.partial(model), input), target)  # not past a wrapper's forward
    loss.backward()
    optimizer.step()
    return loss.detach()


def _news(history: History) -> dict[str, object]:
    """What the progress bar says."""
    found: dict[str, object] = {"loss": f"{history.losses[-1]:.3g}", "layers": history.layers[-1]}
    if history.rounds:
        found["last"] = ", ".join(history.rounds[-1].chosen) or "nothing inserted"
    return found


def _check(epochs: int, patience: int | None, checkpoint_every: int | None) -> None:
    if not isinstance(epochs, int) or epochs < 0:
        raise TrainingError(f"epochs={epochs!r} is not a whole number of at least 0.")
    for name, value in (("patience", patience), ("checkpoint_every", checkpoint_every)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise TrainingError(f"{name}={value!r} is neither None nor a positive whole number.")
