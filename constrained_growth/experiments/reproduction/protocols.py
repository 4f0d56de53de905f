"""The source's experiments as data: what is trained on what, and what its code gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from constrained_growth.blocks import IdentityConv2d, IdentityLinear, ResidualMLP
from constrained_growth.experiments.data import Split, two_spirals
from constrained_growth.experiments.networks import feedforward


@dataclass(frozen=True)
class Family:
    """A kind of network."""

    build: Callable[[int, Sequence[int], int], nn.Sequential]  # inputs, hidden widths, outputs
    block: Callable[[int], nn.Module]  # width (of convolutions: channels) → the layer to insert
    selected: str  # the pinned parameter whose ‖λ‖_F chooses the site in the source


def _relu(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    return feedforward((inputs, *widths, outputs))


def _block(width: int) -> ResidualMLP:
    return ResidualMLP(width, width, torch.tanh, inner_init=0.8)


def _residual(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear and tanh, then blocks, then Linear; its blocks begin as `nn.Linear` does."""
    first, *others = widths
    hidden: list[nn.Module] = [nn.Linear(inputs, first), nn.Tanh()]
    for width in others:
        hidden.append(block := _block(width))
        block.inner.reset_parameters()
        block.outer.reset_parameters()
    return nn.Sequential(*hidden, nn.Linear(first, outputs))


def _convolutional(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """3 × 3 convolutions with ReLU, the first of stride 2 along sides of more than 10 pixels."""
    side = math.isqrt(inputs)
    size = (side, side) if side * side == inputs else (1, inputs)
    stride = (1 + (size[0] > 10), 1 + (size[1] > 10))
    pixels = math.prod(-(-n // s) for n, s in zip(size, stride, strict=True))
    layers: list[nn.Module] = [nn.Unflatten(1, (1, *size))]
    for before, after in itertools.pairwise((1, *widths)):
        step = stride if len(layers) == 1 else 1
        layers += [nn.Conv2d(before, after, 3, stride=step, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(pixels * widths[-1], outputs))


FAMILIES: Mapping[str, Family] = {
    "relu": Family(_relu, lambda width: IdentityLinear(width, nn.ReLU()), "weight"),
    "residual-outer": Family(_residual, _block, "outer.weight"),
    "convolution": Family(_convolutional, lambda n: IdentityConv2d(n, nn.ReLU()), "weight"),
}
"""Feedforward, residual with two weights in a block (the outer one pinned), and convolutions on
images (the two spirals are images of 1 × 2)."""


@dataclass(frozen=True)
class Reference:
    """Final training losses of the source's code, last values carried forward; None: unknown."""

    runs: int
    mean: float | None = None
    median: float | None = None
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Count:
    """In how many of the reference's runs the first of two arms was better than the second.

    `after` counts steps after the insertion, for the drop of the loss; None is the final loss.
    """

    arms: tuple[str, str]
    after: int | None
    held: int
    runs: int


@dataclass(frozen=True)
class Experiment:
    """A protocol: one insertion into a small network, trained by plain SGD.

    `reference` and `counts` are what the source's code gives, arm by arm, and in comparisons.
    """

    name: str
    shows: str  # the figure or claim of the source that it stands for
    family: str  # key of FAMILIES
    widths: tuple[int, ...]  # of the hidden layers before the insertion
    lr: float
    factor: float  # by which the learning rate is multiplied after the insertion
    before: int = 450  # epochs
    after: int = 1400
    batch: int | None = None  # None: all samples
    times: tuple[int, ...] = ()  # other epochs to insert at, with the same total
    seconds: int = 60  # that 100 seeds take on one core, roughly
    chunk: int = 25  # how many seeds train together: what an interruption can cost
    data: Callable[[int], Split] = two_spirals
    reference: Mapping[str, Reference] = field(default_factory=dict)
    counts: tuple[Count, ...] = ()

    @property
    def epochs(self) -> int:
        """All of them."""
        return self.before + self.after


def on_images(data: str, split: Callable[[int], Split]) -> tuple[Experiment, ...]:
    """The same question on images, given by name: three kinds of networks, batches of 50."""
    kinds = {"relu": ((8, 8), 25), "residual-outer": ((8, 8), 25), "convolution": ((4, 4), 10)}
    return tuple(
        Experiment(
            f"{data}-{family}",
            f"With and without insertion on images ({data}).",
            family,
            widths,
            0.05,
            1.0,
            before=20,
            after=40,
            batch=50,
            chunk=chunk,
            data=split,
        )
        for family, (widths, chunk) in kinds.items()
    )


_WHEN = tuple(range(150, 851, 100))

_LIST = (
    Experiment(
        "Exp6",
        "Training loss with and without insertion, one hidden layer; the effort against the "
        "deeper network from the start.",
        "relu",
        (5,),
        0.2,
        1.0,
        seconds=30,
        reference={
            "LImax": Reference(30, 0.214, 0.211, (0.077, 0.280)),
            "N1": Reference(30, 0.321, 0.299, (0.252, 0.393)),
            "N2": Reference(30, 0.213, 0.124, (0.059, 0.318)),
        },
        counts=(Count(("LImax", "N1"), None, 28, 30),),
    ),
    Experiment(
        "Exp8",
        "When to insert, one hidden layer, shorter steps after the insertion.",
        "relu",
        (5,),
        0.2,
        0.8,
        times=_WHEN,
        seconds=100,
        reference={
            "LImax": Reference(30, 0.220, 0.130, (0.041, 0.379)),
            "N1": Reference(30, 0.356, 0.383, (0.288, 0.457)),
            "N2": Reference(30, 0.175, 0.112, (0.035, 0.288)),
            "N2fix": Reference(30, 0.238),
        },
        counts=(Count(("LImax", "N1"), None, 28, 30),),
    ),
    Experiment(
        "Exp9",
        "Largest against smallest sensitivity, two hidden layers.",
        "relu",
        (4, 4),
        0.2,
        1.0,
        seconds=70,
        reference={
            "LImax": Reference(30, 0.331, 0.359, (0.213, 0.458)),
            "LImin": Reference(30, 0.310, 0.332, (0.112, 0.447)),
            "N1": Reference(30, 0.334, 0.344),
            "N2": Reference(30, 0.449, 0.482),
            "N2fix": Reference(30, 0.351, 0.362),
        },
        counts=(
            Count(("LImax", "N1"), None, 37, 90),
            Count(("LImax", "LImin"), None, 34, 90),
            Count(("LImax", "LImin"), 1, 74, 90),
        ),
    ),
    Experiment(
        "Exp10",
        "When to insert, two hidden layers, 4000 epochs.",
        "relu",
        (4, 4),
        0.2,
        0.8,
        before=150,
        after=3850,
        times=_WHEN,
        seconds=300,
        reference={
            "LImax": Reference(10, 0.285, 0.253),
            "LImin": Reference(10, 0.285, 0.305),
            "N1": Reference(10, 0.300, 0.315),
            "N2": Reference(10, 0.525),
            "N2fix": Reference(10, 0.418),
        },
    ),
    Experiment(
        "Exp11",
        "Largest against smallest sensitivity, residual network with one block.",
        "residual-outer",
        (3, 3),
        0.1,
        1.0,
        seconds=60,
        reference={"LImax": Reference(20, 0.517, 0.482), "LImin": Reference(20, 0.480, 0.478)},
        counts=(Count(("LImax", "LImin"), 1, 17, 20),),
    ),
    Experiment(
        "Exp14",
        "Largest against smallest sensitivity, residual network with two blocks.",
        "residual-outer",
        (3, 3, 3),
        0.1,
        0.7,
        seconds=130,
        reference={
            "LImax": Reference(20, 0.438, 0.487),
            "LImin": Reference(20, 0.509, 0.507),
            "N2fix": Reference(20, 0.398),
        },
        counts=(
            Count(("LImax", "LImin"), 1, 16, 20),
            Count(("LImax", "LImin"), 10, 20, 20),
            Count(("LImax", "LImin"), None, 16, 20),
        ),
    ),
    Experiment(
        "Exp151",
        "Training loss with and without insertion, one hidden layer, batches of 45.",
        "relu",
        (5,),
        0.01,
        1.0,
        batch=45,
        seconds=90,
    ),
    Experiment(
        "Exp25",
        "Training loss with and without insertion, two wider hidden layers, batches of 45.",
        "relu",
        (10, 10),
        0.01,
        2.0,
        before=250,
        after=300,
        batch=45,
        seconds=90,
    ),
)

EXPERIMENTS: Mapping[str, Experiment] = {experiment.name: experiment for experiment in _LIST}
"""The two-spirals experiments of Herberg et al., arXiv 2311.15995, by the source's names.

The figures under `reference` come from its code, rerun with fixed data handling. Arms:

    N1           the small network kept
    LImax, LImin the layer with the largest (smallest) ‖λ_W‖²_F inserted; `random`: a random site
    N2           the deep network of the source's code, from the start: every hidden layer twice
    N2fix        the network of the grown one's depth, from the start
    N1lr, N2lr   N1 and N2fix with the learning rate changed when the others gain a layer
    recommended  the decision of `cg.solve(problem)`, the learning rate kept, new layers warmed up
                 as by `training.NewLayers`
"""
