"""Runs of the source's experiments: all seeds of an arm together, the same start for every arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from constrained_growth._progress import progress_bar
from constrained_growth.experiments.caching import cache_file, cached, digest
from constrained_growth.experiments.ensembles.growth import (
    NewLayer,
    frobenius,
    insert_layer,
    multipliers,
    new_layer,
)
from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Samples,
    Stack,
    ensemble,
    multiply_adds,
    operations,
    samples,
)
from constrained_growth.experiments.ensembles.training import (
    SGD,
    History,
    Optimizer,
    Shuffle,
    train,
)
from constrained_growth.experiments.reproduction.protocols import FAMILIES, Experiment
from constrained_growth.experiments.reproduction.recommendation import StepsAfter, recommended
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
    progress: bool | None = None,
    dtype: torch.dtype = torch.float64,
) -> Reproduction:
    """Run an experiment once for each seed; the other seeds change a run by rounding only.

    Finished chunks of seeds stay in the folder `cache`, so that an interrupted run resumes, until
    `forget` is called. Not in float32 by default, as in the source: the gain of a step is often
    below its precision.
    """
    parts = _chunks(experiment, seeds)
    each = _epochs_in_all(experiment)
    found = list[Reproduction]()
    options = {"total": len(parts) * each, "desc": experiment.name, "progress": progress}
    with progress_bar(unit=" epochs", **options) as bar:
        for done, part in enumerate(parts, start=1):
            make = partial(_run, experiment, part, dtype, bar.update)
            # without the protocol: its data may be a function that cannot be pickled
            stored = cached(
                cache,
                _key(experiment, part, dtype),
                lambda make=make: {k: v for k, v in vars(make()).items() if k != "experiment"},
            )
            found.append(Reproduction(experiment, **stored))
            bar.update(done * each - bar.n)
    return joined(found)


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
    on_epoch: Callable[[], object]

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
        rows = range(len(self.seeds)) if rows is None else rows
        order = Shuffle([self.seeds[r] for r in rows]) if self.experiment.batch else None
        return train(
            begun,
            Samples(self.data.x[list(rows)], self.data.y[list(rows)]),
            epochs,
            policy(SGD(self.experiment.lr * factor)),
            batch=self.experiment.batch,
            order=order,
            test=Samples(self.test.x[list(rows)], self.test.y[list(rows)]),
            # an arm that is trained in groups counts once
            on_epoch=self.on_epoch if 0 in rows else lambda: None,
        )

    def layer(self, before: Ensemble) -> NewLayer:
        block = FAMILIES[self.experiment.family].block(self.experiment.widths[-1])
        return new_layer(block.to(self.dtype), before.stack.stages[-1])

    def sizes(self, trained: Ensemble) -> Array:
        """‖λ_W‖_F of every replica and site; a batch at a time where there are batches."""
        selected = FAMILIES[self.experiment.family].selected
        layer, count = self.layer(trained), self.data.x.shape[2]
        at_once = _AT_ONCE if self.experiment.batch else count
        total = list[Tensor]()
        for x, y in zip(self.data.x.split(at_once, 2), self.data.y.split(at_once, 2), strict=True):
            found = multipliers(trained, Samples(x, y), layer)
            part = [x.shape[2] / count * at[selected] for at in found]
            total = [a + b for a, b in zip(total, part, strict=True)] if total else part
        return _array(frobenius(total))


def _run(
    experiment: Experiment,
    seeds: tuple[int, ...],
    dtype: torch.dtype,
    on_epoch: Callable[[], object],
) -> Reproduction:
    splits = [experiment.data(seed) for seed in seeds]
    classes = max(split.num_classes for split in splits)
    setting = _Setting(
        experiment,
        seeds,
        samples([s.x_train.to(dtype) for s in splits], [s.y_train for s in splits], classes),
        samples([s.x_test.to(dtype) for s in splits], [s.y_test for s in splits], classes),
        dtype,
        on_epoch,
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
    return _runs(histories, small), moments, trace


def _fresh(setting: _Setting, widths: Sequence[int]) -> Runs:
    begun = ensemble(setting.models(widths))
    trained, history = setting.train(begun, setting.experiment.epochs)
    return _runs([history], trained)


def _deep(setting: _Setting) -> tuple[Runs, Runs]:
    """The network of the grown one's depth from the start, with one learning rate and with two."""
    experiment = setting.experiment
    widths = (*experiment.widths, experiment.widths[-1])
    before, first = setting.train(ensemble(setting.models(widths)), experiment.before)
    trained, second = setting.train(before, experiment.after)
    runs = _runs([first, second], trained)
    return runs, _changed(setting, runs, before)


def _changed(setting: _Setting, runs: Runs, before: Ensemble) -> Runs:
    """Nothing inserted, but the learning rate changed as with a new layer."""
    if setting.experiment.factor == 1:
        return runs
    trained, history = setting.train(before, setting.experiment.after, setting.experiment.factor)
    part = np.arange(len(before)), _runs([history], trained)
    return _continued(runs, before.epochs, [part], np.full(len(before), -1))


def _grown(setting: _Setting, kept: Runs, before: Ensemble, sites: Integers) -> Runs:
    """A layer at a site of each replica, then the rest of the epochs."""
    grown = insert_layer(before, torch.as_tensor(sites), setting.layer(before))
    after = setting.experiment.epochs - before.epochs
    trained, history = setting.train(grown, after, setting.experiment.factor)
    part = np.arange(len(sites)), _runs([history], trained, before)
    return _continued(kept, before.epochs, [part], sites)


def _recommended(setting: _Setting, kept: Runs, before: Ensemble) -> Runs:
    """Site, insertion and steps after it as the library says; the learning rate is kept."""
    models = setting.models(setting.experiment.widths)
    block = FAMILIES[setting.experiment.family].block
    sites, groups = recommended(before, setting.data, models, block, setting.layer(before))
    after = setting.experiment.epochs - before.epochs
    parts = list[tuple[Integers, Runs]]()
    for rows, grown in groups:
        trained, history = setting.train(grown, after, 1.0, rows.tolist(), StepsAfter)
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
    then, now = (trained if before is None else before).stack, multiply_adds(trained.stack)
    return Runs(
        _array(torch.cat([h.loss for h in histories])),
        _array(torch.cat(errors)),
        np.sum([h.trained.numpy() for h in histories], axis=0),
        np.full(len(trained), -1),
        np.array([multiply_adds(then), now, _choosing(then, trained.stack)]),
    )


def _choosing(before: Stack, after: Stack) -> int:
    """Forward, backward to the inputs, and at every site at most two passes of the new layer."""
    if len(after.stages) == len(before.stages):
        return 0
    new = operations(after.stages[-1], after.shapes[-2])
    return 2 * multiply_adds(before) + len(before.stages) * 2 * new


def _array(values: Tensor) -> Array:
    return values.numpy().astype(np.float32 if values.dtype == torch.float32 else np.float64)


def _epochs_in_all(experiment: Experiment) -> int:
    """Epochs of all arms of one chunk, the recommended one counted once."""
    sites, deep = len(experiment.widths), 1 if len(experiment.widths) == 1 else 2
    others = sum(experiment.epochs - t for t in experiment.times if t != experiment.before)
    changed = 0 if experiment.factor == 1 else 2 * experiment.after
    return (1 + deep) * experiment.epochs + (sites + 1) * experiment.after + others + changed
