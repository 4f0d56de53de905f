"""Hidden layers of many replicas at once, and the plain modules that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from constrained_growth.blocks import IdentityConv2d, IdentityLinear, ResidualMLP
from constrained_growth.errors import BlockError, CandidateError

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """σ(Wx + b); parameters W, b."""

    width: int
    activation: Activation

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        """W, b."""
        return (self.width, inputs), (self.width,)

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer."""
        weight, bias = parameters
        return self.activation(affine(weight, bias, x))


@dataclass(frozen=True)
class Residual:
    """x + W₂σ(W₁x + b); parameters W₁, b, W₂."""

    width: int
    hidden: int
    activation: Activation

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        """W₁, b, W₂."""
        return (self.hidden, inputs), (self.hidden,), (self.width, self.hidden)

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer."""
        inner, bias, outer = parameters
        return torch.baddbmm(x, outer, self.activation(affine(inner, bias, x)))


@dataclass(frozen=True)
class Convolution:
    """σ(K ∗ x + b) on images of this (height, width), flattened as (channels, height, width).

    The kernel K has an odd size k; the image is padded with zeros by half of it.
    """

    channels: int
    size: tuple[int, int]
    kernel: int
    stride: tuple[int, int]
    activation: Activation

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        (height, width), (down, right) = self.size, self.stride
        return -(-height // down), -(-width // right)

    @property
    def width(self) -> int:
        """All entries of the output."""
        return self.channels * math.prod(self.out_size)

    def shapes(self, inputs: int) -> tuple[tuple[int, ...], ...]:
        """K, b."""
        before = inputs // math.prod(self.size)
        return (self.channels, before, self.kernel, self.kernel), (self.channels,)

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """One product per replica, since a grouped convolution is slow on CPUs.

        A column of the output comes from k columns of the input, by a matrix banded in height.
        """
        kernel, bias = parameters
        replicas, _, samples = x.shape
        half, across = self.kernel // 2, self.stride[1]
        (height, width), (down, right) = self.size, self.out_size
        bands = _bands(height, self.kernel, self.stride[0], x.dtype).flatten(1)
        rows = (kernel.mT @ bands).unflatten(-1, (down, height))
        matrix = rows.permute(0, 1, 4, 3, 2, 5).reshape(replicas, self.channels * down, -1)
        columns = pad(x.reshape(replicas, -1, width, samples), (0, 0, half, half))
        seen = [columns[:, :, j : j + width : across] for j in range(self.kernel)]
        y = torch.baddbmm(
            bias.repeat_interleave(down, 1).unsqueeze(2),
            matrix,
            torch.cat(seen, 1).reshape(replicas, -1, right * samples),
        )
        return self.activation(y.reshape(replicas, self.width, samples))


Stage: TypeAlias = Dense | Residual | Convolution
"""A hidden layer of all replicas at once. It has a `width`, the size of its output; `shapes` of its
parameters in one replica, in the order of the plain module; and maps parameters (replicas, …) and
x (replicas, inputs, samples) to (replicas, width, samples)."""


@cache
def _bands(height: int, kernel: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Which input row each kernel row meets, shape (k, output rows, input rows)."""
    out = stride * torch.arange(-(-height // stride)).view(1, -1, 1)
    met = out + torch.arange(kernel).view(-1, 1, 1) - kernel // 2
    return (met == torch.arange(height)).to(dtype)


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Wx + b of every replica."""
    return torch.baddbmm(bias.unsqueeze(2), weight, x)


def activated(module: nn.Conv2d | nn.Linear, activation: nn.Module, size: tuple[int, int]) -> Stage:
    """The stage of a plain layer and its activation; a convolution is on images of this size."""
    if module.bias is None:
        raise CandidateError(f"{module} of model has no bias.")
    if isinstance(module, nn.Linear):
        return Dense(module.out_features, activation)
    kernel, (down, right) = module.kernel_size[0], module.stride
    half = (kernel // 2, kernel // 2)
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    if module.kernel_size != (kernel, kernel) or module.padding != half or not plain:
        raise CandidateError(f"{module} of model has no stacked form: pad by half of its kernel.")
    return Convolution(module.out_channels, size, kernel, (down, right), activation)


def stage_of(block: nn.Module, after: Stage | None = None) -> Stage:
    """The stage of a block of the library; for a convolution `after` gives the size of images."""
    if isinstance(block, ResidualMLP):
        return Residual(block.outer.out_features, block.inner.out_features, block.activation)
    if isinstance(block, IdentityLinear) and not block.shift:
        return Dense(block.weight.shape[0], block.activation)
    if isinstance(block, IdentityConv2d) and not block.shift and isinstance(after, Convolution):
        channels, _, kernel, _ = block.weight.shape
        return Convolution(channels, after.out_size, kernel, (1, 1), block.activation)
    raise BlockError(
        f"block={type(block).__name__} has no stacked form; use ResidualMLP, or IdentityLinear or "
        "(after a convolution) IdentityConv2d with ReLU."
    )
