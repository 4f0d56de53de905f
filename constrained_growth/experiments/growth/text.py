"""English text that comes with Python, as characters for a language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A text as numbers of its characters.

    Attributes:
        train: The first nine tenths, shape (characters,), int64.
        held_out: The last tenth.
        alphabet: The characters, in the order of their numbers.
    """

    train: Tensor
    held_out: Tensor
    alphabet: str


def python_help() -> Text:
    """The topics of Python's own help, some 460 kB; they differ a little between its versions.

    Example:
        >>> text = python_help()
        >>> len(text.train) > 300_000, "e" in text.alphabet
        (True, True)
    """
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(whole)))
    number = {character: index for index, character in enumerate(alphabet)}
    values = torch.tensor([number[character] for character in whole])
    cut = len(values) * 9 // 10
    return Text(values[:cut], values[cut:], alphabet)


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pieces of a text, and the character after each of theirs.

    Args:
        text: Shape (characters,).
        starts: Where each begins, shape (samples,), at most characters − length − 1.
        length: Of each.

    Returns:
        Both of shape (samples, length).
    """
    rows = starts.unsqueeze(1) + torch.arange(length + 1)
    found = text[rows]
    return found[:, :-1], found[:, 1:]


def random_windows(
    text: Tensor, samples: int, length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pieces from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (samples,), generator=generator)
        yield windows(text, starts, length)
