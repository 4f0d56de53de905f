"""What all reports share: the look of their tables, and JSON without numbers it cannot hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
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


def tabled(
    title: str, first: str, rows: Iterable[tuple[str, Mapping[str, str]]], *, sections: bool = False
) -> Table:
    """A table of rows (name, heading → cell); headings without any cell are left out.

    With `sections` there is a line between rows of different names.
    """
    rows = list(rows)
    headings = dict.fromkeys(heading for _, row in rows for heading, cell in row.items() if cell)
    table = titled(title, first, *headings)
    for index, (name, row) in enumerate(rows):
        ends = sections and index + 1 < len(rows) and rows[index + 1][0] != name
        table.add_row(name, *(row.get(heading, "") for heading in headings), end_section=ends)
    return table


def described(here: Mapping[str, Any]) -> str:
    """A machine in one line."""
    return (
        f"{here['processor']} ({here['instructions']}), {here['cores']} cores, {here['threads']} "
        f"thread{'s' if here['threads'] > 1 else ''}; torch {here['torch']}, Python "
        f"{here['python']}, {here['system']}"
    )


def spread(row: Mapping[str, float], name: str) -> str:
    """A column of `timing.Comparison.row`."""
    return interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


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
