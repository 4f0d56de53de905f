"""`bench decisions`: the suite on which rules are judged, networks all of which trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from constrained_growth.blocks import IdentityLinear, ResidualMLP
from constrained_growth.experiments.data import Split, digits, mnist1d, two_spirals
from constrained_growth.experiments.decisions.arms import ARMS
from constrained_growth.experiments.decisions.outcomes import Task, family
from constrained_growth.experiments.decisions.study import Plan, run, tables
from constrained_growth.experiments.ensembles.networks import squared_error
from constrained_growth.experiments.ensembles.training import SGD, Adam
from constrained_growth.experiments.networks import feedforward
from constrained_growth.experiments.training import Data

__all__ = ["FULL", "QUICK", "run", "tables"]


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
    name: str,
    about: str,
    hidden: Sequence[int],
    optimizer: SGD | Adam,
    half: int,
    before: int = 400,
) -> Task:
    begin = _classifier(two_spirals, *hidden)
    about = f"two spirals, ReLU {about}"
    return Task(name, about, begin, _relu_layer, optimizer, 225, before, 800, f"half {half}")


def _digits(name: str, about: str, optimizer: SGD | Adam, half: int, before: int) -> Task:
    begin = _classifier(digits, 8, 8, 8, 8, 8)
    about = f"digits, ReLU [8] × 5, {about}"
    return Task(name, about, begin, _relu_layer, optimizer, 128, before, 60, f"half {half}")


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
        group="half 1",
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
        group="half 0",
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
        group="half 1",
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
        group="half 1",
        loss=squared_error,
        loss_fn=nn.MSELoss(),
    ),
)

FULL = Plan(SUITE, networks=72, runs=8, family=family, arms=ARMS, chunk=24)

QUICK = replace(
    FULL,
    tasks=[replace(t, before=20, after=20) for t in SUITE if t.name in ("spirals-4x2", "planted")],
    networks=4,
    runs=2,
)
