"""The tables of the benchmarks look alike."""

from __future__ import annotations

from rich import box
from rich.table import Table


def titled(title: str, first: str, *headings: str, width: int) -> Table:
    """An empty table under a title that may be longer than its lines.

    Args:
        title: Of the table.
        first: Heading of the first column, of names.
        *headings: Of the others, of numbers.
        width: Characters that a line has at most.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        min_width=min(len(title), width),
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
