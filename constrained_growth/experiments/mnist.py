"""MNIST where the user has it: the files that torchvision keeps."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from constrained_growth.errors import DataError
from constrained_growth.experiments.data import Split


def mnist(
    root: Path,
    seed: int = 0,
    *,
    train: int = 5000,
    test: int = 2000,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Some of the 70000 handwritten digits, 28 × 28 pixels, ten classes.

    Pixels are centred by the mean over the training part, and divided by their root-mean-square.
    Nothing is downloaded.

    Args:
        root: The folder given to `torchvision.datasets.MNIST`; the files are in MNIST/raw below it.
        seed: Of what is drawn from the 60000 and the 10000 images.
        train: How many to train on.
        test: How many to test on.
        dtype: Of the inputs.

    Raises:
        DataError: The files are not there, or are no MNIST.

    Source:
        LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86 (1998), 2278–2324.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = list[Tensor]()
    for name, count in (("train", train), ("t10k", test)):
        pixels = _read(root, f"{name}-images-idx3-ubyte", (28, 28)).flatten(1)
        labels = _read(root, f"{name}-labels-idx1-ubyte", ())
        drawn = torch.randperm(len(labels), generator=generator)[:count]
        parts += [pixels[drawn].double(), labels[drawn].long()]
    x_train, y_train, x_test, y_test = parts
    mean = x_train.mean(dim=0)
    scale = (x_train - mean).square().mean().sqrt()
    return Split(
        ((x_train - mean) / scale).to(dtype), y_train, ((x_test - mean) / scale).to(dtype), y_test
    )


def _read(root: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes: magic number, sizes as big-endian integers, bytes."""
    plain = root / "MNIST" / "raw" / name
    packed = plain.with_name(f"{name}.gz")
    if plain.exists():
        content = plain.read_bytes()
    elif packed.exists():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise DataError(
            f"root={str(root)!r} has no {plain.relative_to(root)}; give the folder in which "
            "torchvision.datasets.MNIST(root, download=True) has put it."
        )
    begin = 8 + 4 * len(shape)
    sizes = np.frombuffer(content[4:begin], dtype=">i4")
    values = np.frombuffer(content[begin:], dtype=np.uint8)
    if tuple(sizes[1:]) != shape or len(values) != sizes.prod():
        raise DataError(f"{name} in root={str(root)!r} is no file of MNIST.")
    return torch.from_numpy(values.reshape(sizes).copy())
