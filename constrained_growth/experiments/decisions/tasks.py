"""The suite on which decisions are judged: networks trained up to the moment of insertion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from constrained_growth.blocks import IdentityLinear, ResidualMLP
from constrained_growth.experiments.data import Split, digits, mnist1d, two_spirals
from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Loss,
    Samples,
    cross_entropy,
    ensemble,
    samples,
    sites_of,
    squared_error,
)
from constrained_growth.experiments.ensembles.training import SGD, Adam, Optimizer, Shuffle, train
from constrained_growth.experiments.networks import feedforward

Data = tuple[Tensor, Tensor]
"""Inputs (samples, features); labels (samples,) or targets (samples, outputs)."""


@dataclass(frozen=True)
class Task:
    """Networks of one kind, each on its own data, and how they are trained.

    `begin` maps a seed to network and data before the first step, and the site (number of the
    hidden stage before it) where a layer is known to be missing, or None.
    """

    name: str
    about: str
    begin: Callable[[int], tuple[nn.Sequential, Data, int | None]]
    block: Callable[[int], nn.Module]  # width of a site → the layer that could be inserted
    optimizer: Optimizer
    batch: int
    before: int  # epochs before the insertion
    after: int
    half: int  # 0 or 1: constants chosen on one half of the suite are judged on the other
    loss: Loss = cross_entropy
    loss_fn: nn.Module = field(default_factory=nn.CrossEntropyLoss)  # the same, a plain network's


@dataclass(frozen=True)
class Moment:
    """All networks of a task at the moment of insertion, as an ensemble and as plain modules."""

    task: Task
    trained: Ensemble
    data: Samples
    models: Sequence[nn.Sequential]
    plain: Sequence[Data]
    blocks: Sequence[Sequence[nn.Module]]  # for each network the layer at each of its sites
    planted: Sequence[int | None]  # the site where a layer is missing, if that is known
    seeds: Sequence[int]


def at_the_moment(
    task: Task, seeds: Sequence[int], on_epoch: Callable[[], object] = lambda: None
) -> Moment:
    """Make the networks of a task, one for each seed, and train them up to the insertion."""
    models, xs, ys, planted, blocks = [], [], [], [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, (x, y), site = task.begin(seed)
            widths = [out for _, out in sites_of(model)]
            blocks.append([task.block(width) for width in widths])
        models.append(model)
        xs.append(x)
        ys.append(y)
        planted.append(site)
    data = samples(xs, ys)
    trained, _ = train(
        ensemble(models),
        data,
        task.before,
        task.optimizer,
        loss=task.loss,
        batch=task.batch,
        order=Shuffle(list(seeds)),
        on_epoch=on_epoch,
    )
    for model, values in zip(models, trained.parameters, strict=True):
        nn.utils.vector_to_parameters(values.clone(), model.parameters())
    return Moment(
        task, trained, data, models, list(zip(xs, ys, strict=True)), blocks, planted, seeds
    )


def residual(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    """A tanh layer and residual tanh blocks with two weights, the outer one random too."""
    made = [trained_block(width, scale=1.0) for _ in range(blocks)]
    first, last = nn.Linear(inputs, width), nn.Linear(width, outputs)
    return nn.Sequential(first, nn.Tanh(), *made, last)


def trained_block(width: int, scale: float) -> ResidualMLP:
    """A residual block away from its pins: outer weights as `nn.Linear` draws them, times scale."""
    block = _tanh_block(width)
    with torch.no_grad():
        block.outer.weight.copy_(scale * nn.Linear(width, width).weight)
    return block


def deep_teacher(width: int, depth: int) -> nn.Sequential:
    """From 6 inputs to 3 outputs, each of its residual blocks far from the identity."""
    blocks = [trained_block(width, scale=3.0) for _ in range(depth)]
    first, last = nn.Linear(6, width), nn.Linear(width, 3)
    with torch.no_grad():
        first.weight.mul_(3)
    return nn.Sequential(first, nn.Tanh(), *blocks, last)


def _relu_layer(width: int) -> nn.Module:
    return IdentityLinear(width, nn.ReLU())


def _tanh_block(width: int) -> ResidualMLP:
    return ResidualMLP(width, width, nn.Tanh())


def _classifier(
    make: Callable[[int], Split], *hidden: int
) -> Callable[[int], tuple[nn.Sequential, Data, None]]:
    """A ReLU network with these hidden widths on a data set."""

    def begin(seed: int) -> tuple[nn.Sequential, Data, None]:
        split = make(seed)
        model = feedforward((split.num_features, *hidden, split.num_classes))
        return model, (split.x_train, split.y_train), None

    return begin


_mnist1d = partial(mnist1d, num_samples=2000)


def _mnist1d_residual(seed: int) -> tuple[nn.Sequential, Data, None]:
    split = _mnist1d(seed)
    return residual(40, 8, 3, 10), (split.x_train, split.y_train), None


def _friedman(seed: int) -> tuple[nn.Sequential, Data, None]:
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(500, n_features=6, noise=0.1, random_state=seed)
    target = torch.as_tensor((y - y.mean()) / y.std()).float().unsqueeze(1)
    inputs = torch.as_tensor(2 * x - 1).float()
    return feedforward((6, 8, 8, 8, 8, 1)), (inputs, target), None


def _planted(seed: int) -> tuple[nn.Sequential, Data, int]:
    """A teacher with four residual blocks; the student is the teacher without one of them.

    The missing block comes after site k, the output of the tanh layer (0) or of a block.
    """
    teacher = deep_teacher(width=6, depth=4)
    first, tanh, *blocks, last = teacher
    missing = seed % len(blocks)
    x = torch.randn(500, 6)
    with torch.no_grad():
        y = teacher(x)
        y = (y - y.mean(0)) / y.std(0)
    kept = [block for index, block in enumerate(blocks) if index != missing]
    return nn.Sequential(first, tanh, *kept, last), (x, y), missing


def _spirals(
    name: str, about: str, hidden: Sequence[int], optimizer: Optimizer, half: int, before: int = 400
) -> Task:
    begin = _classifier(two_spirals, *hidden)
    about = f"two spirals, ReLU {about}"
    return Task(name, about, begin, _relu_layer, optimizer, 225, before, after=800, half=half)


def _digits(name: str, about: str, optimizer: Optimizer, half: int, before: int) -> Task:
    begin = _classifier(digits, 8, 8, 8, 8, 8)
    about = f"digits, ReLU [8] × 5, {about}"
    return Task(name, about, begin, _relu_layer, optimizer, 128, before, after=60, half=half)


SUITE: tuple[Task, ...] = (
    _spirals("spirals-4x2", "[4, 4], SGD, far from stationary", [4, 4], SGD(0.2), 0),
    _spirals("spirals-6x4", "[6] × 4, SGD, far from stationary", [6] * 4, SGD(0.1), 1),
    _spirals(
        "spirals-4x4-adam", "[4] × 4, Adam, nearly stationary", [4] * 4, Adam(0.005), 0, before=800
    ),
    _digits("digits-8x5", "SGD with momentum", SGD(0.02, 0.9), 1, before=40),
    _digits("digits-8x5-adam", "Adam", Adam(0.002), 0, before=60),
    Task(
        "mnist1d-residual",
        "MNIST-1D, residual tanh blocks of width 8, Adam",
        _mnist1d_residual,
        _tanh_block,
        Adam(0.005),
        batch=200,
        before=60,
        after=60,
        half=1,
    ),
    Task(
        "mnist1d-bottleneck",
        "MNIST-1D, ReLU [16, 4, 16, 4], Adam",
        _classifier(_mnist1d, 16, 4, 16, 4),
        _relu_layer,
        Adam(0.005),
        batch=200,
        before=60,
        after=60,
        half=0,
    ),
    Task(
        "friedman",
        "Friedman's first function, ReLU [8] × 4, SGD with momentum",
        _friedman,
        _relu_layer,
        SGD(0.02, 0.9),
        batch=100,
        before=100,
        after=150,
        half=1,
        loss=squared_error,
        loss_fn=nn.MSELoss(),
    ),
    Task(
        "planted",
        "a student that lacks one residual block of its teacher, Adam, nearly stationary",
        _planted,
        _tanh_block,
        Adam(0.003),
        batch=250,
        before=300,
        after=300,
        half=1,
        loss=squared_error,
        loss_fn=nn.MSELoss(),
    ),
)
