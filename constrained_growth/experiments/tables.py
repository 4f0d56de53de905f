"""What all reports share: the look of their tables, and JSON without numbers it cannot hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

WIDTH = 176
"""Characters in a line of the widest table."""


def titled(title: str, first: str, *headings: str) -> Table:
    """An empty table: a first column for names, others for numbers, and a title above."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        min_width=min(len(title), WIDTH),
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def number(value: float | None, form: str = ".3g", missing: str = "–") -> str:
    """A number, or a dash where there is none."""
    return missing if value is None or not math.isfinite(value) else f"{value:{form}}"


def interval(value: float, low: float, high: float, form: str = ".2f") -> str:
    """A number with its interval."""
    return f"{value:{form}} [{low:{form}} {high:{form}}]"


def to_json(content: Any) -> str:
    """JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
