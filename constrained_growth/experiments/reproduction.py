"""Runs the source's experiments: all seeds of an arm together, the same start for every arm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth.experiments.ensemble_growth import (
    NewLayer,
    frobenius,
    insert_layer,
    multipliers,
    new_layer,
)
from constrained_growth.experiments.ensemble_training import SGD, History, Shuffle, train
from constrained_growth.experiments.ensembles import (
    Ensemble,
    Samples,
    ensemble,
    multiply_adds,
    samples,
)
from constrained_growth.experiments.protocols import FAMILIES, Experiment
from constrained_growth.experiments.recommendation import recommended

Array = NDArray[np.floating]
Integers = NDArray[np.integer]

CHUNK = 50
"""How many seeds train together: what an interruption can cost."""

TRACE = 50
"""Every so many epochs the sensitivities of the small network are recorded."""


@dataclass(frozen=True)
class Runs:
    """One arm of an experiment. Runs that stopped early keep their last values.

    Attributes:
        loss: Training loss, in nats, before the steps of each epoch; shape (epochs, seeds).
        test_error: Share of wrong test samples after each epoch; same shape.
        trained: For how many epochs each run was trained, shape (seeds,).
        site: Where each run gained a layer, 0 for the first hidden layer; −1 for nowhere.
        operations: Multiply-adds of one forward pass of one sample before and after the
            insertion, shape (2,).
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


def reproduce(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    cache: Path | None = None,
    progress: bool | None = None,
    dtype: torch.dtype = torch.float64,
) -> Reproduction:
    """Run an experiment for many seeds.

    Args:
        experiment: One of `protocols.EXPERIMENTS`, or a changed one.
        seeds: One for each run.
        cache: Folder in which finished chunks of seeds wait until all are done, so that an
            interrupted run goes on where it was. None keeps nothing.
        progress: Show a bar; None (default) only on a terminal.
        dtype: Of data and parameters. Not float32, as in the source: what a step gains is often
            less than its last digit.

    Returns:
        All runs. A run is the same whatever other seeds it is run with, but for rounding.
    """
    parts = [tuple(seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)]
    total = len(parts) * _epochs_in_all(experiment)
    hide = None if progress is None else not progress
    found, files = list[Reproduction](), list[Path]()
    with tqdm(total=total, desc=experiment.name, unit=" epochs", disable=hide) as bar:
        for part in parts:
            file = None if cache is None else cache / f"{_key(experiment, part, dtype)}.npz"
            if file is not None and file.exists():
                found.append(_load(file, experiment, part))
                bar.update(_epochs_in_all(experiment))
            else:
                found.append(_run(experiment, part, dtype, bar.update))
                if file is not None:
                    _save(file, found[-1])
            if file is not None:
                files.append(file)
    for file in files:
        file.unlink()
    return _joined(found)


def networks(
    experiment: Experiment, widths: Sequence[int], seeds: Sequence[int], inputs: int, outputs: int
) -> list[nn.Sequential]:
    """Freshly initialised networks, one for each seed; the random state is left as it was."""
    made = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            made.append(FAMILIES[experiment.family].build(inputs, widths, outputs))
    return made


@dataclass(frozen=True)
class _Setting:
    """Everything that the arms of a chunk share."""

    experiment: Experiment
    seeds: tuple[int, ...]
    data: Samples
    test: Samples
    dtype: torch.dtype
    layer: NewLayer
    on_epoch: Callable[[], object]

    def start(self, widths: Sequence[int]) -> Ensemble:
        inputs, outputs = self.data.x.shape[1], self.data.y.shape[1]
        models = networks(self.experiment, widths, self.seeds, inputs, outputs)
        return ensemble([model.to(self.dtype) for model in models])

    def train(
        self, begun: Ensemble, epochs: int, factor: float = 1.0, rows: Sequence[int] | None = None
    ) -> tuple[Ensemble, History]:
        rows = range(len(self.seeds)) if rows is None else rows
        order = Shuffle([self.seeds[r] for r in rows]) if self.experiment.batch else None
        return train(
            begun,
            Samples(self.data.x[list(rows)], self.data.y[list(rows)]),
            epochs,
            SGD(self.experiment.lr * factor),
            batch=self.experiment.batch,
            order=order,
            test=Samples(self.test.x[list(rows)], self.test.y[list(rows)]),
            on_epoch=self.on_epoch,
        )

    def sizes(self, trained: Ensemble) -> Array:
        selected = FAMILIES[self.experiment.family].selected
        return _array(frobenius(multipliers(trained, self.data, self.layer), only=selected))


def _run(
    experiment: Experiment,
    seeds: tuple[int, ...],
    dtype: torch.dtype,
    on_epoch: Callable[[], object],
) -> Reproduction:
    splits = [experiment.data(seed) for seed in seeds]
    classes = max(split.num_classes for split in splits)
    block = FAMILIES[experiment.family].block(experiment.widths[-1]).to(dtype)
    setting = _Setting(
        experiment,
        seeds,
        samples([s.x_train.to(dtype) for s in splits], [s.y_train for s in splits], classes),
        samples([s.x_test.to(dtype) for s in splits], [s.y_test for s in splits], classes),
        dtype,
        new_layer(block),
        on_epoch,
    )
    small = setting.start(experiment.widths)
    kept, moments, trace = _keep(setting, small)
    before = moments[experiment.before]
    sizes = setting.sizes(before)
    sites = range(sizes.shape[1])
    each = [_grown(setting, kept, before, np.full(len(seeds), k)) for k in sites]
    draws = [int(np.random.default_rng(seed).integers(sizes.shape[1])) for seed in seeds]
    deep = _fresh(setting, (*experiment.widths, experiment.widths[-1]))
    twice = 2 * experiment.widths
    arms = {
        "N1": kept,
        "LImax": _picked(each, sizes.argmax(1)),
        "LImin": _picked(each, sizes.argmin(1)),
        "random": _picked(each, np.array(draws)),
        "N2": deep if len(twice) == len(experiment.widths) + 1 else _fresh(setting, twice),
        "N2fix": deep,
        "recommended": _recommended(setting, kept, before),
    }
    inserted_at = {
        epoch: arms["LImax"]
        if epoch == experiment.before
        else _grown(setting, kept, moments[epoch], setting.sizes(moments[epoch]).argmax(1))
        for epoch in experiment.times
    }
    epochs = sorted(trace)
    return Reproduction(
        experiment,
        seeds,
        setting.data.x.shape[2],
        arms,
        inserted_at,
        sizes,
        np.stack([trace[epoch] for epoch in epochs]),
        np.array(epochs),
    )


def _keep(setting: _Setting, small: Ensemble) -> tuple[Runs, dict[int, Ensemble], dict[int, Array]]:
    """The small network trained to the end, as it was when layers are inserted, and its λ."""
    experiment = setting.experiment
    wanted = {experiment.before, *experiment.times}
    stops = sorted({*wanted, *range(0, experiment.epochs, TRACE), experiment.epochs})
    moments, trace, histories = dict[int, Ensemble](), dict[int, Array](), list[History]()
    for stop in stops:
        if stop > small.epochs:
            small, history = setting.train(small, stop - small.epochs)
            histories.append(history)
        if stop in wanted:
            moments[stop] = small
        if stop % TRACE == 0:
            trace[stop] = setting.sizes(small)
    return _runs(histories, small), moments, trace


def _fresh(setting: _Setting, widths: Sequence[int]) -> Runs:
    trained, history = setting.train(setting.start(widths), setting.experiment.epochs)
    return _runs([history], trained)


def _grown(setting: _Setting, kept: Runs, before: Ensemble, sites: Integers) -> Runs:
    """A layer at a site of each replica, and the rest of the epochs.

    Replicas are trained together only where that gives the same architecture.
    """
    factor, after = setting.experiment.factor, setting.experiment.epochs - before.epochs
    shifted = setting.experiment.family == "tanhlu" and len(set(sites.tolist())) > 1
    groups = [sites == k for k in sorted(set(sites.tolist()))] if shifted else [sites >= 0]
    parts = list[tuple[Integers, Runs]]()
    for group in groups:
        rows = np.flatnonzero(group)
        grown = insert_layer(
            before.take(rows.tolist()), torch.as_tensor(sites[rows]), setting.layer
        )
        trained, history = setting.train(grown, after, factor, rows.tolist())
        parts.append((rows, _runs([history], trained, before)))
    return _continued(kept, before.epochs, parts, sites)


def _recommended(setting: _Setting, kept: Runs, before: Ensemble) -> Runs:
    """Where, and whether, the library's default rule says; the learning rate is kept."""
    models = [
        model.to(setting.dtype)
        for model in networks(
            setting.experiment,
            setting.experiment.widths,
            setting.seeds,
            setting.data.x.shape[1],
            setting.data.y.shape[1],
        )
    ]
    block = FAMILIES[setting.experiment.family].block
    sites, groups = recommended(before, setting.data, models, block, setting.layer)
    after = setting.experiment.epochs - before.epochs
    parts = list[tuple[Integers, Runs]]()
    for rows, grown in groups:
        trained, history = setting.train(grown, after, 1.0, rows.tolist())
        parts.append((rows, _runs([history], trained, before)))
    return _continued(kept, before.epochs, parts, sites)


def _continued(
    kept: Runs, epoch: int, parts: Sequence[tuple[Integers, Runs]], sites: Integers
) -> Runs:
    """The small network up to an epoch, then these runs, each of some of the seeds."""
    loss, error = kept.loss.copy(), kept.test_error.copy()
    trained = np.minimum(kept.trained, epoch)
    for rows, runs in parts:
        loss[epoch:, rows], error[epoch:, rows] = runs.loss, runs.test_error
        trained[rows] += runs.trained
    return Runs(loss, error, trained, sites, parts[0][1].operations)


def _picked(each: Sequence[Runs], sites: Integers) -> Runs:
    """Of every seed the run that gained a layer at this site."""
    seeds = np.arange(len(sites))
    return Runs(
        np.stack([runs.loss for runs in each])[sites, :, seeds].T,
        np.stack([runs.test_error for runs in each])[sites, :, seeds].T,
        np.stack([runs.trained for runs in each])[sites, seeds],
        sites.copy(),
        each[0].operations,
    )


def _runs(histories: Sequence[History], trained: Ensemble, before: Ensemble | None = None) -> Runs:
    errors = [h.test_error for h in histories if h.test_error is not None]
    now = multiply_adds(trained.stack)
    return Runs(
        _array(torch.cat([h.loss for h in histories])),
        _array(torch.cat(errors)),
        np.sum([h.trained.numpy() for h in histories], axis=0),
        np.full(len(trained), -1),
        np.array([now if before is None else multiply_adds(before.stack), now]),
    )


def _array(values: Tensor) -> Array:
    return values.numpy().astype(np.float32 if values.dtype == torch.float32 else np.float64)


def _epochs_in_all(experiment: Experiment) -> int:
    """Epochs of all arms of one chunk, the recommended one counted once."""
    sites, deep = len(experiment.widths), 1 if len(experiment.widths) == 1 else 2
    others = sum(experiment.epochs - t for t in experiment.times if t != experiment.before)
    return (1 + deep) * experiment.epochs + (sites + 1) * experiment.after + others


def _key(experiment: Experiment, seeds: Sequence[int], dtype: torch.dtype) -> str:
    """A file name that no other protocol, seeds or precision has."""
    described = repr((experiment, tuple(seeds), dtype)).replace(hex(id(experiment.data)), "")
    return f"{experiment.name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"


_RUNS = ("loss", "test_error", "trained", "site", "operations")
_ARRAYS = ("sensitivities", "trace", "trace_epochs")


def _save(file: Path, part: Reproduction) -> None:
    """Written under another name first: a file that is there is whole."""
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


def _load(file: Path, experiment: Experiment, seeds: tuple[int, ...]) -> Reproduction:
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


def _joined(parts: Sequence[Reproduction]) -> Reproduction:
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
