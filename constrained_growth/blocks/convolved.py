"""A pinned convolution as an affine map of patches, which are written out where nothing else helps.

Patches are k² times as large as the images that they are of, and writing them takes as long as half
of a product with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from constrained_growth.blocks.protocol import AffineFactors

_PATCHES = 2**22  # about so many bytes of patches are made at a time; more leave the cache
_PRODUCTS = 3 * 2**20  # and of products
_LANES = 8  # PyTorch's convolutions on a CPU take so many channels at a time, or are slow


@dataclass(frozen=True)
class Convolved:
    """What a pinned k × k convolution with zero padding that keeps the size of images brings.

    As an iterable it is `AffineFactors` of patches, of a few samples at a time.

    Attributes:
        weight: Name of the pinned kernel K, of shape (out, in, k, k).
        bias: Name of the pinned bias b, of shape (out,).
        cotangent: ψ = ∂L/∂(K ∗ images + b), shape (samples, out, height, width).
        images: What K is applied to, shape (samples, in, height, width).
        size: k, odd.
        same_units: As in `AffineFactors`.
    """

    weight: str
    bias: str | None
    cotangent: Tensor
    images: Tensor
    size: int
    same_units: bool = False
    elementwise: ClassVar[bool] = False
    transposed: ClassVar[bool] = False

    def __iter__(self) -> Iterator[AffineFactors]:
        # the patches of a whole batch would be k² times the images
        each = _some(1.25 * _PATCHES, self.size**2 * self.images[:1].nbytes)
        kernel, padding = (self.size,) * 2, (self.size // 2,) * 2
        for psi, some in zip(self.cotangent.split(each), self.images.split(each), strict=True):
            phi = patches_of(some, kernel, padding=padding).mT
            rows = psi.flatten(2).mT
            yield AffineFactors(self.weight, self.bias, rows, phi, same_units=self.same_units)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Samples, positions, outputs and features."""
        samples, out, height, width = self.cotangent.shape
        return samples, height * width, out, self.images.shape[1] * self.size**2

    @property
    def is_grouped(self) -> bool:
        """Whether `products` are cheaper than those of patches: measured for CPUs alone."""
        x = self.images
        return (
            self.size > 1
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and x.shape[1] % _LANES == self.cotangent.shape[1] % _LANES == 0
        )

    def products(self) -> Iterator[Tensor]:
        """ψ_nᵀ φ_n of each sample n, of shape (samples, out, features), of a few at a time.

        They are the gradients of the kernels of a convolution with one group for each sample.
        """
        samples, _, out, width = self.shape
        inner, side = self.images.shape[1], self.size
        each = _some(_PRODUCTS, out * width * self.images.itemsize)
        for psi, x in zip(self.cotangent.split(each), self.images.split(each), strict=True):
            samples = len(x)
            kernel = x.new_empty(samples * out, inner, side, side)  # only its shape is read
            _, found, _ = torch.ops.aten.convolution_backward(
                psi.reshape(1, samples * out, *psi.shape[2:]),
                x.reshape(1, samples * inner, *x.shape[2:]),
                kernel,
                None,
                [1, 1],
                [side // 2, side // 2],
                [1, 1],
                False,
                [0, 0],
                samples,
                [False, True, False],
            )
            yield found.view(samples, out, width)

    def rows(self, positions: Tensor, columns: Tensor | None) -> Tensor:
        """Patches φ at some positions of each sample, given as (samples, count).

        The result has the shape (samples, count, features); of `columns`, if given, alone.
        """
        samples, inner, height, width = self.images.shape
        device, pixels, entries = positions.device, height * width, self.size**2
        integer = torch.int32 if self.images.numel() < 2**31 else torch.int64
        if columns is None:
            columns = torch.arange(inner * entries, device=device)
        # of each position the pixels of its patch, or −1 where those are padding
        numbers = torch.arange(1, pixels + 1, dtype=integer, device=device)
        padding = (self.size // 2,) * 2
        table = patches_of(numbers.view(1, 1, height, width), (self.size,) * 2, padding=padding)
        pixel, entry = (table[0] - 1).index_select(1, positions.flatten()), columns % entries
        image = torch.arange(samples, device=device, dtype=integer) * (inner * pixels)
        place = pixel.clamp(min=0) + image.repeat_interleave(positions.shape[1])
        channel = (columns // entries * pixels).to(integer)
        place = place.index_select(0, entry).add_(channel[:, None])
        inside = (pixel >= 0).to(self.images.dtype).index_select(0, entry)
        # three times as fast as an index of two dimensions
        found = self.images.reshape(-1).index_select(0, place.view(-1)).view_as(inside)
        return found.mul_(inside).view(-1, *positions.shape).movedim(0, -1)


def patches_of(
    images: Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    stride: Sequence[int] = (1, 1),
) -> Tensor:
    """As `F.unfold`, (samples, channels · kernel, positions): a view's copy, 4 times as fast."""
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    samples, channels, *size = images.shape
    *outer, down, right = images.stride()
    counts = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(size, kernel, dilation, stride, strict=True)
    ]
    steps = (down * dilation[0], right * dilation[1], down * stride[0], right * stride[1])
    seen = images.as_strided((samples, channels, *kernel, *counts), (*outer, *steps))
    return seen.reshape(samples, -1, math.prod(counts))


def _some(most: float, each: int) -> int:
    """How many samples of so many bytes, a power of 2, as groups of samples mostly are."""
    return 2 ** max(0, int(math.log2(max(1.0, most / max(1, each)))))
