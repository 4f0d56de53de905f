"""What the runs of an experiment are, and the files in which finished ones wait."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from constrained_growth.experiments.reproduction.protocols import Experiment

Array = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class Runs:
    """One arm of an experiment. Runs that stopped early keep their last values.

    Attributes:
        loss: Training loss, in nats, before the steps of each epoch; shape (epochs, seeds).
        test_error: Share of wrong test samples after each epoch; same shape.
        trained: For how many epochs each run was trained, shape (seeds,).
        site: Where each run gained a layer, 0 for the first hidden layer; −1 for nowhere.
        operations: Multiply-adds of one forward pass of one sample before and after the
            insertion, and what the choice of the site costs for one sample; shape (3,).
    """

    loss: Array
    test_error: Array
    trained: Integers
    site: Integers
    operations: Integers


@dataclass(frozen=True)
class Reproduction:
    """What an experiment gave.

    Attributes:
        experiment: The protocol.
        seeds: Of the split, the initial parameters and the orders of the samples.
        samples: How many there are to train on.
        arms: Name → its runs, all from the same start for the same seed.
        inserted_at: Epoch → runs that gained the layer of the largest sensitivity then.
        sensitivities: ‖λ_W‖_F when the layers are inserted, shape (seeds, sites).
        trace: The same along the training of the small network, shape (times, seeds, sites).
        trace_epochs: At which epochs, shape (times,).
    """

    experiment: Experiment
    seeds: tuple[int, ...]
    samples: int
    arms: Mapping[str, Runs]
    inserted_at: Mapping[int, Runs]
    sensitivities: Array
    trace: Array
    trace_epochs: Integers


def file_name(experiment: Experiment, seeds: Sequence[int], dtype: torch.dtype) -> str:
    """A file name that no other protocol, seeds or precision has."""
    described = repr((experiment, tuple(seeds), dtype)).replace(hex(id(experiment.data)), "")
    return f"{experiment.name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.npz"


_RUNS = ("loss", "test_error", "trained", "site", "operations")
_ARRAYS = ("sensitivities", "trace", "trace_epochs")


def save(file: Path, part: Reproduction) -> None:
    """Write a chunk. It is written under another name first: a file that is there is whole."""
    named = {f"arms/{name}": runs for name, runs in part.arms.items()}
    named |= {f"inserted_at/{epoch}": runs for epoch, runs in part.inserted_at.items()}
    arrays = {f"{key}/{name}": getattr(runs, name) for key, runs in named.items() for name in _RUNS}
    arrays |= {name: getattr(part, name) for name in _ARRAYS}
    arrays["samples"] = np.array(part.samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    unfinished.replace(file)


def load(file: Path, experiment: Experiment, seeds: tuple[int, ...]) -> Reproduction:
    """What `save` has written."""
    with np.load(file, allow_pickle=False) as arrays:
        keys = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files if "/" in key)
        runs = {key: Runs(*(arrays[f"{key}/{name}"] for name in _RUNS)) for key in keys}
        rest, count = [arrays[name] for name in _ARRAYS], int(arrays["samples"])
    arms = {key.removeprefix("arms/"): r for key, r in runs.items() if key.startswith("arms/")}
    times = {
        int(key.removeprefix("inserted_at/")): r
        for key, r in runs.items()
        if key.startswith("inserted_at/")
    }
    return Reproduction(experiment, seeds, count, arms, times, *rest)


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
    return Runs(
        np.concatenate([r.loss for r in runs], axis=1),
        np.concatenate([r.test_error for r in runs], axis=1),
        np.concatenate([r.trained for r in runs]),
        np.concatenate([r.site for r in runs]),
        runs[0].operations,
    )
