"""Three tasks on which growing is compared with training the big network from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors, ResidualConv2d, TransformerBlock
from constrained_growth.experiments.data import (
    CHARACTERS,
    Split,
    epochs,
    images,
    mnist1d,
    parted,
    random_windows,
    text,
    windows,
)
from constrained_growth.experiments.networks import Embed

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Material:
    """What one run learns from; `stream` maps a seed to an endless stream of batches.

    `deciding` are training data that decide where to grow. The loss is measured on `held_out`, and
    at the end also on `training`, a part of the training data.
    """

    stream: Callable[[int], Iterator[Batch]]
    deciding: Sequence[Batch]
    training: Sequence[Batch]
    held_out: Sequence[Batch]


@dataclass(frozen=True)
class GrowthTask:
    """A kind of network, its data, and how it grows."""

    name: str
    about: str
    material: Callable[[int], Material]
    network: Callable[[int], nn.Module]  # number of blocks → network
    block: Callable[[], nn.Module]  # can be inserted after modules of the types `sites`
    sites: tuple[type[nn.Module], ...]
    warmup: int = 50  # steps over which the learning rate rises linearly from 0
    small: int = 1  # blocks at the start of the runs that grow
    big: int = 8  # and at their end
    steps: int = 2000  # of the big network; all arms may spend as many multiply-adds
    row: int = 50  # steps between two measurements of the loss
    wait: int = 5  # rows before each insertion

    @property
    def settings(self) -> dict[str, int | float | str]:
        """All numbers and texts."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}

    def candidates(self, model: nn.Module) -> list[cg.Candidate]:
        """A new block after every site of a network as it is now."""
        return [
            cg.Candidate(name, self.block())
            for name, module in model.named_modules()
            if isinstance(module, self.sites)
        ]


class Stem(nn.Sequential):
    """What comes before the first block."""


class ResidualConv1d(nn.Module):
    """x + K₂ ∗ relu(K₁ ∗ x + b₁) + b₂ on (samples, channels, positions), K₂ = b₂ = 0 pinned."""

    pinned = ("outer.weight", "outer.bias")

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.inner = nn.Conv1d(channels, channels, kernel_size, padding=padding)
        self.outer = nn.Conv1d(channels, channels, kernel_size, padding=padding)
        nn.init.kaiming_normal_(self.inner.weight, nonlinearity="relu")
        for name in self.pinned:
            nn.init.zeros_(self.get_parameter(name))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + self.outer(self.inner(x).relu())

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = δ, φ = the patches that the outer convolution sees."""
        (size,) = self.outer.kernel_size
        features = self.inner(x).relu().unsqueeze(2)
        patches = F.unfold(features, (1, size), padding=(0, size // 2))
        return (AffineFactors(*self.pinned, delta.mT, patches.mT),)

    def config(self) -> dict[str, int]:
        """The arguments that build the same architecture again."""
        return {"channels": self.inner.in_channels, "kernel_size": self.inner.kernel_size[0]}


class GPT(nn.Module):
    """A small GPT on characters: pre-norm, causal, learned positions."""

    def __init__(self, characters: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embed = Embed(characters, length, width)
        self.blocks = nn.Sequential(*(gpt_block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """(samples, positions) to logits (samples, characters, positions)."""
        return self.head(self.norm(self.blocks(self.embed(characters)))).mT


def gpt_block(width: int, heads: int) -> TransformerBlock:
    """GPT-2's initial values, but for the output projections, which are pinned at zero."""
    block = TransformerBlock(width, heads, causal=True)
    for linear in (block.qkv, block.fc1):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return block


def of_split(split: Split, shape: tuple[int, ...], batch: int, measured: int = 1000) -> Material:
    """The material of a classification data set, its inputs in another shape."""
    train = split.x_train.unflatten(1, shape), split.y_train
    deciding = [(train[0][:64], train[1][:64]), (train[0][64:128], train[1][64:128])]
    held_out = split.x_test[:measured].unflatten(1, shape), split.y_test[:measured]
    training = [(train[0][:measured], train[1][:measured])]
    return Material(partial(epochs, *train, batch), deciding, training, [held_out])


_PIXEL_CHANNELS, _CURVE_CHANNELS = 8, 4
_LENGTH, _PIECES, _WIDTH, _HEADS = 64, 4, 32, 2


@lru_cache(maxsize=2)  # the arms of a seed run one after the other
def _images_material(seed: int) -> Material:
    split = images(seed)
    side = math.isqrt(split.num_features)
    return of_split(split, (1, side, side), 64)


@lru_cache(maxsize=2)
def _curves_material(seed: int) -> Material:
    return of_split(mnist1d(seed, num_samples=20_000), (1, 40), 100)


def _images_block() -> ResidualConv2d:
    block = ResidualConv2d(_PIXEL_CHANNELS, nn.ReLU, norm_layer=None)
    nn.init.kaiming_normal_(block.get_parameter("convs.0.weight"), nonlinearity="relu")
    return block


def _images_network(blocks: int) -> nn.Module:
    stem = Stem(nn.Conv2d(1, _PIXEL_CHANNELS, 3, stride=2, padding=1))
    body = [_images_block() for _ in range(blocks)]
    return _convolutional(stem, body, nn.AdaptiveAvgPool2d(1), _PIXEL_CHANNELS)


def _curves_network(blocks: int) -> nn.Module:
    stem = Stem(nn.Conv1d(1, _CURVE_CHANNELS, 3, padding=1))
    body = [ResidualConv1d(_CURVE_CHANNELS, 3) for _ in range(blocks)]
    return _convolutional(stem, body, nn.AdaptiveAvgPool1d(1), _CURVE_CHANNELS)


def _convolutional(
    stem: nn.Module, body: Sequence[nn.Module], pool: nn.Module, channels: int
) -> nn.Module:
    return nn.Sequential(stem, *body, nn.ReLU(), pool, nn.Flatten(), nn.Linear(channels, 10))


def _text_material(seed: int) -> Material:
    train, held_out = parted(text("english"))
    stream = partial(random_windows, train, _PIECES, _LENGTH)
    deciding = stream(1_000_003 + seed)
    training, held_out = (
        windows(part, torch.arange(64) * ((len(part) - _LENGTH - 1) // 64), _LENGTH)
        for part in (train, held_out)
    )
    return Material(stream, [next(deciding) for _ in range(4)], [training], [held_out])


def _text_network(blocks: int) -> nn.Module:
    return GPT(CHARACTERS, _LENGTH, _WIDTH, _HEADS, blocks)


# Widths and steps were chosen on seeds from 1000 on, which the benchmark does not compare, from
# small and big networks alone: such that the big one ends lower after as many steps. Insertions are
# spread evenly over as many steps as the big network trains for in all.
IMAGES = GrowthTask(
    "images",
    "Fashion-MNIST as 14 × 14 images (or the digits), residual 3 × 3 convolutions of 8 channels",
    _images_material,
    _images_network,
    _images_block,
    (Stem, ResidualConv2d),
)

MNIST1D = GrowthTask(
    "mnist1d",
    "MNIST-1D of 20,000 samples, residual convolutions of 4 channels, 3 positions wide",
    _curves_material,
    _curves_network,
    partial(ResidualConv1d, _CURVE_CHANNELS, 3),
    (Stem, ResidualConv1d),
    steps=1500,
    wait=4,
)

GPT_TEXT = GrowthTask(
    "gpt",
    "characters of Python's help texts, a GPT of width 32",
    _text_material,
    _text_network,
    partial(gpt_block, _WIDTH, _HEADS),
    (Embed, TransformerBlock),
    warmup=100,
    big=4,
    row=40,
    wait=17,
)

TASKS = (IMAGES, MNIST1D, GPT_TEXT)
