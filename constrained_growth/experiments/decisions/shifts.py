"""`bench decisions --family shifts`: image classifiers, frozen, whose input or labels change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from constrained_growth.blocks import ResidualConv2d, ResidualMLP
from constrained_growth.experiments.data import Split, images
from constrained_growth.experiments.decisions.adaptation import Adaptation, Data, Origin, Training
from constrained_growth.experiments.decisions.adaptation_study import Plan, run, tables

__all__ = ["FULL", "QUICK", "run", "tables"]

Shift = Callable[[Data, torch.Generator], Data]
"""Images (samples, 1, height, width) and labels to other images or labels; the same generator
state twice gives the same shift."""

_WIDTH, _CHANNELS, _LEARNT = 24, 8, 2_000
"""Of the residual networks; and samples of the shifted task, as many held out."""


def _images(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    return change(data[0]), data[1]


def _labels(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    return data[0], change(data[1])


def _noisy(data: Data, generator: torch.Generator) -> Data:
    return _images(data, lambda x: x + torch.randn(x.shape, generator=generator))


def _occluded(data: Data, generator: torch.Generator) -> Data:
    half = torch.arange(data[0].shape[2]).unsqueeze(1) < data[0].shape[2] // 2
    return _images(data, lambda x: x.masked_fill(half, float(x.min())))


def _permuted(data: Data, generator: torch.Generator) -> Data:
    order = torch.randperm(10, generator=generator)
    return _labels(data, lambda y: order[y])


def _merged(data: Data, generator: torch.Generator) -> Data:
    order = torch.randperm(10, generator=generator)
    return _labels(data, lambda y: order[y] // 2)


SHIFTS: dict[str, tuple[str, Shift]] = {
    "rotated": ("by 90 degrees", lambda d, g: _images(d, lambda x: torch.rot90(x, 1, (2, 3)))),
    "inverted": ("black for white", lambda d, g: _images(d, torch.neg)),
    "faded": ("a quarter of the contrast", lambda d, g: _images(d, lambda x: x / 4)),
    "noisy": ("noise as large as the image", _noisy),
    "occluded": ("the upper half black", _occluded),
    "permuted": ("labels in another order", _permuted),
    "merged": ("labels merged in pairs", _merged),
}
"""What they are, and the shifts."""


@lru_cache(maxsize=1)  # all tasks of a seed run one after the other
def _split(seed: int) -> Split:
    return images(seed)


def _shaped(x: Tensor, y: Tensor) -> Data:
    side = round(x.shape[1] ** 0.5)
    return x.unflatten(1, (1, side, side)), y


def _learnt(split: Split) -> tuple[Data, Data]:
    """What is learnt after the shift, and as much that is held out; none of it was seen before."""
    cut = min(_LEARNT, len(split.y_test) // 2)
    parts = (slice(cut), slice(cut, 2 * cut))
    learnt, held_out = (_shaped(split.x_test[part], split.y_test[part]) for part in parts)
    return learnt, held_out


def _begin(
    network: Callable[[Tensor], nn.Sequential], seed: int
) -> tuple[nn.Sequential, Data, Data]:
    split = _split(seed)
    x, y = _shaped(split.x_train, split.y_train)
    return network(x), (x, y), _learnt(split)[1]


def _shifted(shift: Shift, seed: int) -> tuple[Data, Data]:
    learnt, held_out = (
        shift(data, torch.Generator().manual_seed(seed)) for data in _learnt(_split(seed))
    )
    return learnt, held_out


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _trained_block(block: nn.Module, weight: str) -> nn.Module:
    """Off its pins, so that a network of such blocks learns as usual."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(block.get_parameter(weight), a=5**0.5)
    return block


def _mlp_block() -> nn.Module:
    return ResidualMLP(_WIDTH, _WIDTH, nn.ReLU())


def _conv_block(channels: int) -> nn.Module:
    return ResidualConv2d(channels, nn.ReLU, norm_layer=None)


def _mlp(x: Tensor) -> nn.Sequential:
    stem = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), _WIDTH), nn.ReLU())
    body = [_trained_block(_mlp_block(), "outer.weight") for _ in range(4)]
    return nn.Sequential(stem, *body, nn.Linear(_WIDTH, 10))


def _conv(x: Tensor) -> nn.Sequential:
    def down(before: int, channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        body = [_trained_block(_conv_block(channels), "convs.1.weight") for _ in range(2)]
        return [nn.Sequential(conv, nn.ReLU()), *body]

    head = nn.Sequential(_Pool(), nn.Linear(2 * _CHANNELS, 10))
    return nn.Sequential(*down(1, _CHANNELS), *down(_CHANNELS, 2 * _CHANNELS), head)


def _conv_blocks(model: nn.Sequential) -> list[nn.Module]:
    return [_conv_block(channels) for channels in (_CHANNELS,) * 3 + (2 * _CHANNELS,) * 3]


ORIGINS = {
    "mlp": (
        Origin(
            "mlp",
            f"residual ReLU network, width {_WIDTH}, 4 blocks",
            partial(_begin, _mlp),
            lambda model: [_mlp_block() for _ in range(5)],
            Training(steps=1_500, batch=64, lr=0.003),
        ),
        Training(steps=300, batch=64, lr=0.003),
    ),
    "conv": (
        Origin(
            "conv",
            f"residual convolutions, {_CHANNELS} and {2 * _CHANNELS} channels, 2 blocks each",
            partial(_begin, _conv),
            _conv_blocks,
            Training(steps=1_500, batch=64, lr=0.003),
        ),
        Training(steps=150, batch=32, lr=0.003),
    ),
}
"""Networks, and how their new layers are trained."""

TASKS = [
    Adaptation(f"{kind}-{name}", about, origin, partial(_shifted, shift), training)
    for kind, (origin, training) in ORIGINS.items()
    for name, (about, shift) in SHIFTS.items()
]

FULL = Plan(TASKS, networks=10, runs=4)

_SHORT = Training(steps=20, batch=32, lr=0.003)

QUICK = Plan(
    [
        replace(task, origin=replace(task.origin, training=_SHORT), training=_SHORT)
        for task in TASKS
        if task.name in ("mlp-rotated", "mlp-permuted")
    ],
    networks=2,
    runs=2,
)
