"""Progress bars that are quiet unless someone watches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from constrained_growth._distributed import rank


def progress_bar(
    iterable: Iterable[Any] | None = None, *, progress: bool | None = None, **options: Any
) -> tqdm:
    """A tqdm bar over an iterable, or without one a bar to `update` by hand, with tqdm's options.

    `progress` is True, False, or None (default) for a bar on a terminal, after one second. With
    `torch.distributed` only the first process shows it.
    """
    disable = True if rank(None) > 0 else None if progress is None else not progress
    options = {"leave": False, "delay": 0 if progress else 1, "disable": disable, **options}
    return tqdm(iterable, **options)
