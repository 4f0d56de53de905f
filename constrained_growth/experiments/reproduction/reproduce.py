"""Runs of the source's experiments: all seeds of an arm together, the same start for every arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from constrained_growth.experiments.ensembles.growth import (
    NewLayer,
    frobenius,
    insert_layer,
    multipliers,
)
from constrained_growth.experiments.ensembles.networks import Ensemble, Samples, ensemble, samples
from constrained_growth.experiments.ensembles.training import (
    SGD,
    History,
    Optimizer,
    Shuffle,
    train,
)
from constrained_growth.experiments.growth.counting import MultiplyAdds
from constrained_growth.experiments.jobs import cache_file, cached, digest, in_parallel
from constrained_growth.experiments.reproduction.protocols import FAMILIES, Experiment
from constrained_growth.experiments.reproduction.recommendation import (
    StepsAfter,
    recommended,
    with_ages,
)
from constrained_growth.experiments.reproduction.runs import (
    TRACE,
    Array,
    Integers,
    Reproduction,
    Runs,
    joined,
)

_AT_ONCE = 500
"""λ is measured on this many samples at a time, where training is in batches."""


def reproduce(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    cache: Path | None = None,
    dtype: torch.dtype = torch.float64,
    workers: int = 2,
) -> Reproduction:
    """Run an experiment once for each seed; the other seeds change a run by rounding only.

    Finished chunks of seeds stay in the folder `cache`, so that an interrupted run resumes, until
    `forget` is called. Not in float32 by default, as in the source: the gain of a step is often
    below its precision.
    """
    jobs = [(experiment, part, dtype, cache) for part in _chunks(experiment, seeds)]
    parts = in_parallel(_chunk, jobs, workers, desc=experiment.name, unit="part")
    return joined([Reproduction(experiment, **part) for part in parts])


def _chunk(
    experiment: Experiment, seeds: tuple[int, ...], dtype: torch.dtype, cache: Path | None
) -> dict[str, Any]:
    """A `Reproduction` without its protocol, which may hold a function that cannot be pickled."""

    def compute() -> dict[str, Any]:
        found = vars(_run(experiment, seeds, dtype))
        return {name: value for name, value in found.items() if name != "experiment"}

    return cached(cache, _key(experiment, seeds, dtype), compute)


def _key(experiment: Experiment, seeds: Sequence[int], dtype: torch.dtype) -> str:
    """Of the cache; changes with protocol, seeds and precision."""
    described = repr((experiment, tuple(seeds), dtype)).replace(hex(id(experiment.data)), "")
    return digest(experiment.name, described)


def forget(
    experiment: Experiment, seeds: Sequence[int], cache: Path, dtype: torch.dtype = torch.float64
) -> None:
    """Delete the chunks that `reproduce` with the same arguments has left in a folder."""
    for part in _chunks(experiment, seeds):
        cache_file(cache, _key(experiment, part, dtype)).unlink(missing_ok=True)


def _chunks(experiment: Experiment, seeds: Sequence[int]) -> list[tuple[int, ...]]:
    step = experiment.chunk
    return [tuple(seeds[i : i + step]) for i in range(0, len(seeds), step)]


@dataclass(frozen=True)
class _Setting:
    """Everything that the arms of a chunk share."""

    experiment: Experiment
    seeds: tuple[int, ...]
    data: Samples
    test: Samples
    dtype: torch.dtype

    def models(self, widths: Sequence[int]) -> list[nn.Sequential]:
        """Freshly initialised networks; the random state is left as it was."""
        inputs, outputs = self.data.x.shape[1], self.data.y.shape[1]
        made = list[nn.Sequential]()
        with torch.random.fork_rng(devices=[]):
            for seed in self.seeds:
                torch.manual_seed(seed)
                made.append(FAMILIES[self.experiment.family].build(inputs, widths, outputs))
        return [model.to(self.dtype) for model in made]

    def train(
        self,
        begun: Ensemble,
        epochs: int,
        factor: float = 1.0,
        rows: Sequence[int] | None = None,
        policy: Callable[[Optimizer], Optimizer] = lambda sgd: sgd,
    ) -> tuple[Ensemble, History]:
        """Train some replicas on, by default all, at a multiple of the learning rate."""
        rows = range(len(self.seeds)) if rows is None else rows
        return train(
            begun,
            self.data.take(list(rows)),
            epochs,
            policy(SGD(self.experiment.lr * factor)),
            batch=self.experiment.batch,
            order=Shuffle([self.seeds[r] for r in rows]) if self.experiment.batch else None,
            test=self.test.take(list(rows)),
        )

    def layer(self) -> NewLayer:
        """The layer to insert, at its pins."""
        block = FAMILIES[self.experiment.family].block(self.experiment.widths[-1])
        return NewLayer.of(block.to(self.dtype))

    def sizes(self, trained: Ensemble) -> Array:
        """‖λ_W‖_F of every replica and site; a batch at a time where there are batches."""
        selected = FAMILIES[self.experiment.family].selected
        count = self.data.x.shape[2]
        at_once = _AT_ONCE if self.experiment.batch else count
        layers = [self.layer()] * len(self.experiment.widths)
        parts = list[list[Tensor]]()
        for x, y in zip(self.data.x.split(at_once, 2), self.data.y.split(at_once, 2), strict=True):
            found = multipliers(trained, Samples(x, y), layers)
            parts.append([x.shape[2] / count * at[selected] for at in found])
        return frobenius([torch.stack(each).sum(0) for each in zip(*parts, strict=True)]).numpy()

    def multiply_adds(self, trained: Ensemble) -> int:
        """Of one forward pass of one sample, without biases and activations."""
        with MultiplyAdds() as counter:
            trained.model(self.data.x[:1, :, 0])
        return counter.total


def _run(experiment: Experiment, seeds: tuple[int, ...], dtype: torch.dtype) -> Reproduction:
    splits = [experiment.data(seed) for seed in seeds]
    classes = max(split.num_classes for split in splits)
    setting = _Setting(
        experiment,
        seeds,
        samples([s.x_train.to(dtype) for s in splits], [s.y_train for s in splits], classes),
        samples([s.x_test.to(dtype) for s in splits], [s.y_test for s in splits], classes),
        dtype,
    )
    small = ensemble(setting.models(experiment.widths))
    kept, moments, trace = _keep(setting, small)
    before = moments[experiment.before]
    sizes = setting.sizes(before)
    sites = range(sizes.shape[1])
    each = [_grown(setting, kept, before, np.full(len(seeds), k)) for k in sites]
    draws = [int(np.random.default_rng(seed).integers(sizes.shape[1])) for seed in seeds]
    deep, deep_changed = _deep(setting)
    twice = 2 * experiment.widths
    arms = {
        "N1": kept,
        "LImax": _picked(each, sizes.argmax(1)),
        "LImin": _picked(each, sizes.argmin(1)),
        "random": _picked(each, np.array(draws)),
        "N2": deep if len(twice) == len(experiment.widths) + 1 else _fresh(setting, twice),
        "N2fix": deep,
        "N1lr": _changed(setting, kept, before),
        "N2lr": deep_changed,
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
    """The small network to the end, its states at the insertions, and its λ over time."""
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
    return _runs(setting, histories, small), moments, trace


def _fresh(setting: _Setting, widths: Sequence[int]) -> Runs:
    begun = ensemble(setting.models(widths))
    trained, history = setting.train(begun, setting.experiment.epochs)
    return _runs(setting, [history], trained)


def _deep(setting: _Setting) -> tuple[Runs, Runs]:
    """The network of the grown one's depth from the start, with one learning rate and with two."""
    experiment = setting.experiment
    widths = (*experiment.widths, experiment.widths[-1])
    before, first = setting.train(ensemble(setting.models(widths)), experiment.before)
    trained, second = setting.train(before, experiment.after)
    runs = _runs(setting, [first, second], trained)
    return runs, _changed(setting, runs, before)


def _changed(setting: _Setting, runs: Runs, before: Ensemble) -> Runs:
    """Nothing inserted, but the learning rate changed as with a new layer."""
    if setting.experiment.factor == 1:
        return runs
    return _grown(setting, runs, before, np.full(len(before), -1))


def _recommended(setting: _Setting, kept: Runs, before: Ensemble) -> Runs:
    """Site, insertion and steps after it as the library says; the learning rate is kept."""
    models = setting.models(setting.experiment.widths)
    block = FAMILIES[setting.experiment.family].block
    sites, starts = recommended(before, setting.data, models, block)
    return _grown(setting, kept, with_ages(before), sites, starts, 1.0, StepsAfter)


def _grown(
    setting: _Setting,
    kept: Runs,
    before: Ensemble,
    sites: Integers,
    starts: Sequence[Tensor] | None = None,
    factor: float | None = None,
    policy: Callable[[Optimizer], Optimizer] = lambda sgd: sgd,
) -> Runs:
    """The run up to now, then with a layer at a site of each replica, −1 for none.

    Replicas of one site are trained together, at the learning rate times `factor`, by default the
    experiment's. They start from the parameters `starts`, by default with the layer at its pins.
    """
    experiment, epoch = setting.experiment, before.epochs
    factor = experiment.factor if factor is None else factor
    loss, error = kept.loss.copy(), kept.test_error.copy()
    epochs, operations = np.minimum(kept.trained, epoch), kept.operations
    for site in sorted({*sites.tolist()}):
        rows = np.flatnonzero(sites == site)
        grown = before.take(rows.tolist())
        grown = grown if site < 0 else insert_layer(grown, site, setting.layer())
        if starts is not None:
            grown = replace(grown, parameters=torch.stack([starts[r] for r in rows.tolist()]))
        after = experiment.epochs - epoch
        trained, history = setting.train(grown, after, factor, rows.tolist(), policy)
        runs = _runs(setting, [history], trained, before)
        loss[epoch:, rows], error[epoch:, rows] = runs.loss, runs.test_error
        epochs[rows] += runs.trained
        operations = np.maximum(operations, runs.operations)
    return Runs(loss, error, epochs, sites, operations)


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


def _runs(
    setting: _Setting,
    histories: Sequence[History],
    trained: Ensemble,
    before: Ensemble | None = None,
) -> Runs:
    errors = [h.test_error for h in histories if h.test_error is not None]
    now = setting.multiply_adds(trained)
    then = now if before is None else setting.multiply_adds(before)
    # forward, backward to the inputs, and at every site at most two passes of the new layer
    choosing = 2 * then + 2 * (now - then) * len(setting.experiment.widths) if now > then else 0
    return Runs(
        torch.cat([h.loss for h in histories]).numpy(),
        torch.cat(errors).numpy(),
        np.sum([h.trained.numpy() for h in histories], axis=0),
        np.full(len(trained), -1),
        np.array([then, now, choosing]),
    )
