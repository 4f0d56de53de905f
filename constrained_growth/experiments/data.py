"""The data sets of the experiments: nothing is downloaded, the same seed gives the same data."""

from __future__ import annotations

import gzip
import inspect
import math
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from constrained_growth.errors import DataError

_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """A classification data set, split at random.

    Inputs have shape (samples, features), classes 0, 1, … shape (samples,) and type int64.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def num_features(self) -> int:
        """How many numbers an input has."""
        return self.x_train.shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return 1 + int(max(self.y_train.max(), self.y_test.max()))


def two_spirals(
    seed: int = 0,
    *,
    points_per_class: int = 300,
    r0: float = 0.5,
    circles: float = 1.0,
    train_fraction: float = 0.75,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Two interleaved spirals in the plane, without noise; n points per class, split at random.

        φ_i = 2π·circles·i/n,   r_i = r0 + circles·i/n,   i = 0, …, n − 1

    Class 0 is +r_i (cos φ_i, sin φ_i), class 1 is −r_i (cos φ_i, sin φ_i).

    Source:
        Herberg et al., arXiv 2311.15995, the two-spirals experiments.
    """
    i = torch.arange(points_per_class, dtype=torch.float64) / points_per_class
    angle, radius = 2 * math.pi * circles * i, r0 + circles * i
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    x = torch.cat([arm, -arm]).to(dtype)
    y = torch.arange(2).repeat_interleave(points_per_class)
    return _split(x, y, train_fraction, seed)


def digits(
    seed: int = 0, *, train_fraction: float = 0.75, dtype: torch.dtype = torch.float32
) -> Split:
    """The 1797 handwritten digits of scikit-learn, 8 × 8 pixels, ten classes, split at random.

    Pixels are centred by their means over the training part and divided by the root-mean-square
    of the centred training part, one number for all.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998; the copy that comes with scikit-learn.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels, dtype=torch.float64), torch.as_tensor(labels).long()
    raw = _split(x, y, train_fraction, seed)
    mean = raw.x_train.mean(dim=0)
    scale = (raw.x_train - mean).square().mean().sqrt()
    x_train, x_test = (((x - mean) / scale).to(dtype) for x in (raw.x_train, raw.x_test))
    return Split(x_train, raw.y_train, x_test, raw.y_test)


def images(seed: int = 0) -> Split:
    """Real images, split in halves: 24,000 of Fashion-MNIST, 14 × 14, or else the digits.

    Fashion-MNIST is read where the Debian package `dataset-fashion-mnist` puts it, and its pixels
    are averaged over squares of 2 × 2; inputs have mean 0 and mean square 1.

    Source:
        Xiao, Rasul and Vollgraf, *Fashion-MNIST*, arXiv 1708.07747.
    """
    if not _FASHION.is_dir():
        return digits(seed, train_fraction=0.5)
    x, y = _fashion()
    return _split(x, y, 0.5, seed)


@cache
def _fashion() -> tuple[Tensor, Tensor]:
    def read(name: str, header: int) -> Tensor:
        content = bytearray(gzip.decompress((_FASHION / name).read_bytes())[header:])
        return torch.frombuffer(content, dtype=torch.uint8)

    pixels = read("train-images-idx3-ubyte.gz", 16).view(-1, 28, 28)[:24_000].float()
    x = F.avg_pool2d(pixels, 2).flatten(1)
    return (x - x.mean()) / x.std(), read("train-labels-idx1-ubyte.gz", 8)[:24_000].long()


@lru_cache(maxsize=128)  # it takes a second
def mnist1d(seed: int = 0, *, num_samples: int = 5000, dtype: torch.dtype = torch.float32) -> Split:
    """MNIST-1D: ten templates of digits as curves of 40 numbers, shifted, stretched and noisy.

    The authors' own package generates them; four fifths are to train on. Their own data set has
    5000 samples in all.

    Source:
        Greydanus and Kobak, *Scaling down deep learning with MNIST-1D*, arXiv 2011.14439.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    options: Any = get_dataset_args()
    options.seed, options.num_samples = seed, num_samples
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(options)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    x_train, x_test = (torch.as_tensor(made[key]).to(dtype) for key in ("x", "x_test"))
    y_train, y_test = (torch.as_tensor(made[key]).long() for key in ("y", "y_test"))
    return Split(x_train, y_train, x_test, y_test)


CHARACTERS = 96
"""How many characters texts have: those of ASCII that are printed, and ends of lines."""


@cache
def text(name: str) -> Tensor:
    """A text as numbers of its characters.

    "english" is Python's own help, some 460 kB, which differ a little between its versions;
    "program" are its modules; any other name is PyTorch's documentation.
    """
    if name == "english":
        from pydoc_data.topics import topics

        whole = "\n\n".join(topics[topic] for topic in sorted(topics))
    elif name == "program":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]
        whole = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    else:
        whole = "\n\n".join(inspect.getdoc(getattr(torch, n)) or "" for n in sorted(dir(torch)))
    codes = torch.frombuffer(bytearray(whole.encode("ascii", "replace")), dtype=torch.uint8).long()
    return torch.where(codes == 10, 95, (codes - 32).clamp(0, 94))


def parted(text: Tensor) -> tuple[Tensor, Tensor]:
    """The first nine tenths, to train on, and the rest, held out."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pieces of a text, shape (samples, length), and the same shifted by one character."""
    found = text[starts.unsqueeze(1) + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]


def random_windows(
    text: Tensor, samples: int, length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of batches of pieces from random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (samples,), generator=generator)
        yield windows(text, starts, length)


def epochs(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of batches: one random order of all samples after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // size * size].split(size):
            yield x[rows], y[rows]


def _split(x: Tensor, y: Tensor, train_fraction: float, seed: int) -> Split:
    cut = round(train_fraction * len(x))
    if not 0 < cut < len(x):
        raise DataError(
            f"train_fraction={train_fraction!r} leaves {cut} of {len(x)} samples to train on; "
            "give a number between 0 and 1 that leaves some on both sides."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:cut], order[cut:]
    return Split(x[train], y[train], x[test], y[test])
