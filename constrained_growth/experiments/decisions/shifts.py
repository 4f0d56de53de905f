"""`bench decisions --family shifts`: image classifiers, frozen, whose images or labels change."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from constrained_growth.blocks import ResidualConv2d, ResidualMLP
from constrained_growth.experiments.data import images
from constrained_growth.experiments.decisions.adaptation import (
    Adaptation,
    Origin,
    plan,
    quick,
)
from constrained_growth.experiments.decisions.study import run, tables
from constrained_growth.experiments.training import Data, Training

__all__ = ["FULL", "QUICK", "run", "tables"]

_WIDTH, _CHANNELS, _LEARNT = 24, 8, 2_000
"""Of the networks; images of the shifted task, as many held out."""

Shift = Callable[[Tensor, Tensor, Generator], Data]
"""Images (samples, 1, height, width) and labels to others; one generator state, one shift."""


def _occluded(x: Tensor, y: Tensor, generator: Generator) -> Data:
    half = x.shape[2] // 2
    return F.pad(x[:, :, half:], (0, 0, half, 0), value=float(x.min())), y


def _relabelled(classes: int, x: Tensor, y: Tensor, generator: Generator) -> Data:
    return x, torch.randperm(10, generator=generator)[y] % classes


SHIFTS: dict[str, tuple[str, Shift]] = {
    "rotated": ("images rotated by 90 degrees", lambda x, y, _: (torch.rot90(x, 1, (2, 3)), y)),
    "inverted": ("black for white", lambda x, y, _: (-x, y)),
    "faded": ("a quarter of the contrast", lambda x, y, _: (x / 4, y)),
    "noisy": ("noise of the size of the image", lambda x, y, g: (x + _noise(x, g), y)),
    "occluded": ("the upper half black", _occluded),
    "permuted": ("labels in another order", partial(_relabelled, 10)),
    "merged": ("labels merged in pairs", partial(_relabelled, 5)),
}
"""What changes."""


def _noise(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator)


@lru_cache(maxsize=1)  # all tasks of a seed run one after the other
def _parts(seed: int) -> list[Data]:
    """Images of the first task, of the next one, and held-out ones; none is in two of them."""
    split = images(seed)
    rest = min(_LEARNT, len(split.y_test) // 2)
    x, y = torch.cat([split.x_train, split.x_test]), torch.cat([split.y_train, split.y_test])
    sizes = [len(split.y_train), rest, rest, len(y) - len(split.y_train) - 2 * rest]
    squares = x.unflatten(1, (1, round(x.shape[1] ** 0.5), -1)).to(torch.get_default_dtype())
    return list(zip(squares.split(sizes), y.split(sizes), strict=True))[:3]


def _begin(network: Callable[[int], nn.Sequential], seed: int) -> tuple[nn.Sequential, Data, Data]:
    first, _, held_out = _parts(seed)
    return network(first[0][0].numel()), first, held_out


def _shifted(shift: Shift, seed: int) -> tuple[Data, Data]:
    learnt, held_out = (shift(*part, Generator().manual_seed(seed)) for part in _parts(seed)[1:])
    return learnt, held_out


def _mlp_block() -> nn.Module:
    return ResidualMLP(_WIDTH, _WIDTH, nn.ReLU())


def _conv_block(channels: int) -> nn.Module:
    return ResidualConv2d(channels, nn.ReLU, norm_layer=None)


def _off_pins(block: nn.Module, weight: str) -> nn.Module:
    """As PyTorch would start it."""
    nn.init.kaiming_uniform_(block.get_parameter(weight), a=5**0.5)
    return block


def _mlp(pixels: int) -> nn.Sequential:
    stem = nn.Sequential(nn.Flatten(), nn.Linear(pixels, _WIDTH), nn.ReLU())
    body = [_off_pins(_mlp_block(), "outer.weight") for _ in range(4)]
    return nn.Sequential(stem, *body, nn.Linear(_WIDTH, 10))


def _conv(_: int) -> nn.Sequential:
    def stage(before: int, channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        body = [_off_pins(_conv_block(channels), "convs.1.weight") for _ in range(2)]
        return [nn.Sequential(conv, nn.ReLU()), *body]

    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * _CHANNELS, 10)
    body = *stage(1, _CHANNELS), *stage(_CHANNELS, 2 * _CHANNELS)
    return nn.Sequential(*body, nn.Sequential(*ends))


def _conv_blocks(model: nn.Sequential) -> list[nn.Module]:
    return [_conv_block(channels) for channels in (_CHANNELS,) * 3 + (2 * _CHANNELS,) * 3]


ORIGINS = (
    Origin(
        "mlp",
        f"residual ReLU networks of width {_WIDTH}, 4 blocks",
        partial(_begin, _mlp),
        lambda model: [_mlp_block() for _ in range(5)],
        Training(steps=1_500, batch=64, lr=0.003),
    ),
    Origin(
        "conv",
        f"residual convolutions, 2 blocks of {_CHANNELS} channels, 2 of {2 * _CHANNELS}",
        partial(_begin, _conv),
        _conv_blocks,
        Training(steps=1_500, batch=64, lr=0.003),
    ),
)

_NEXT = {"mlp": Training(300, batch=64, lr=0.003), "conv": Training(150, batch=32, lr=0.003)}

TASKS = [
    Adaptation(f"{origin.name}-{name}", about, origin, partial(_shifted, shift), _NEXT[origin.name])
    for origin in ORIGINS
    for name, (about, shift) in SHIFTS.items()
]

FULL = plan(TASKS, networks=10, runs=4)

QUICK = quick(TASKS, "mlp-rotated", "conv-permuted")
