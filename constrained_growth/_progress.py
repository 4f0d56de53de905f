"""Progress bars that are quiet unless someone watches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from constrained_growth._distributed import rank


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    progress: bool | None = None,
    initial: int = 0,
    leave: bool = False,
) -> tqdm:
    """A tqdm bar over an iterable, or without one a bar to `update` by hand.

    `progress` is True, False, or None (default) for a bar on a terminal, after one second. With
    `torch.distributed` only the first process shows it.
    """
    return tqdm(
        iterable,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        leave=leave,
        delay=0 if progress else 1,
        disable=True if rank(None) > 0 else None if progress is None else not progress,
    )
