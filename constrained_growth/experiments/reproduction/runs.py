"""The runs of an experiment, and what they cost and reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constrained_growth.experiments.reproduction.protocols import Experiment
from constrained_growth.experiments.statistics import Array

Integers = NDArray[np.integer]

LAST = 10
"""The final loss is the mean over this many last epochs."""

TRACE = 50
"""The sensitivities of the small network are recorded each time this many epochs have passed."""


@dataclass(frozen=True)
class Runs:
    """One arm of an experiment. Runs that stopped early keep their last values."""

    loss: Array  # (epochs, seeds), training loss in nats before the steps of each epoch
    test_error: Array  # (epochs, seeds), share of misclassified test samples after each epoch
    trained: Integers  # (seeds,), for how many epochs
    site: Integers  # (seeds,), where it gained a layer, 0 after the first hidden one; −1: nowhere
    operations: Integers  # (3,), of a sample: forward before and after, and to choose the site


@dataclass(frozen=True)
class Reproduction:
    """What an experiment gave; runs with the same seed have the same start, split and orders."""

    experiment: Experiment
    seeds: tuple[int, ...]
    samples: int  # to train on
    arms: Mapping[str, Runs]
    inserted_at: Mapping[int, Runs]  # epoch → with the layer of the largest sensitivity then
    sensitivities: Array  # (seeds, sites), ‖λ_W‖_F at the insertion
    trace: Array  # (times, seeds, sites), the same while the small network trains
    trace_epochs: Integers  # (times,)


_RUNS = ("loss", "test_error", "trained", "site")  # in whose shapes seeds come last


def joined(parts: Sequence[Reproduction]) -> Reproduction:
    """Chunks of seeds as one."""
    first = parts[0]
    return Reproduction(
        first.experiment,
        tuple(seed for part in parts for seed in part.seeds),
        first.samples,
        {name: _together([part.arms[name] for part in parts]) for name in first.arms},
        {t: _together([part.inserted_at[t] for part in parts]) for t in first.inserted_at},
        np.concatenate([part.sensitivities for part in parts]),
        np.concatenate([part.trace for part in parts], axis=1),
        first.trace_epochs,
    )


def _together(runs: Sequence[Runs]) -> Runs:
    arrays = [np.concatenate([getattr(r, name) for r in runs], axis=-1) for name in _RUNS]
    return Runs(*arrays, operations=runs[0].operations)


def final_loss(runs: Runs) -> Array:
    """Mean training loss of the last epochs of each run, the last value carried forward."""
    return np.ascontiguousarray(runs.loss[-LAST:], dtype=float).mean(axis=0)


def drop(runs: Runs, epoch: int, after: int) -> Array:
    """By how much the loss of each run fell from this epoch to `after` epochs later."""
    return (runs.loss[epoch] - runs.loss[epoch + after]).astype(float)


def work(runs: Runs, experiment: Experiment, samples: int) -> Array:
    """Multiply-adds that each run has spent after 0, 1, … epochs, shape (epochs + 1, seeds).

    A training step costs a sample three forward passes (forward, and backward a product for the
    gradients of the weights and one for those of the inputs); the choice of a site costs one
    forward pass and one backward to the inputs over all data, and at each site two passes of the
    new layer (one suffices for a layer with one weight). Runs that stopped spend nothing more.
    """
    epoch = experiment.before
    small, grown = (3.0 * samples * float(count) for count in runs.operations[:2])
    choice = samples * float(runs.operations[2])
    chosen = runs.site >= 0
    spent = np.zeros((len(runs.loss) + 1, len(runs.site)))
    for e in range(len(runs.loss)):
        now = np.where(chosen & (e >= epoch), grown, small) if small != grown else small
        spent[e + 1] = spent[e] + now * (e < runs.trained)
        if e == epoch:
            spent[e + 1] += choice * chosen * (epoch < runs.trained)
    return spent


def saved(experiment: Experiment, small: int, grown: int) -> float:
    """Share of the multiply-adds saved against the final network from the start, choice excluded.

    `small` and `grown` are those of a forward pass before and after the insertion.
    """
    return experiment.before * (grown - small) / (experiment.epochs * grown)


def reached(runs: Runs, level: float, spent: Array | None = None) -> Array:
    """After how many epochs, or what work, the loss of each run first is at or below a level.

    Infinity for a run that never gets there; `spent` as from `work`.
    """
    below = runs.loss <= level
    first = below.argmax(axis=0)
    at = first.astype(float) if spent is None else spent[first, np.arange(below.shape[1])]
    return np.where(below.any(axis=0), at, np.inf)
