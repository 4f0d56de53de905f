"""Tables as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_WIDTH = 98  # of a line of text, where the last column is wrapped


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    A column that is empty in every row is left out. In a text the last column is wrapped where it
    is long, and printed once where it repeats.

    Attributes:
        rows: The rows, all of one length.
        heads: Names of the columns; none for a table without.
        numbers: Which columns hold numbers, to be aligned on the right.
        bold: Which rows are marked in HTML; in a text a column of its own has to do it.
    """

    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ()
    numbers: Collection[int] = ()
    bold: Collection[int] = ()

    def _columns(self) -> list[int]:
        return [i for i, cells in enumerate(zip(*self.rows, strict=True)) if any(cells)]

    def lines(self) -> Iterator[str]:
        """The lines of the text."""
        columns, last = self._columns(), ""
        rows = [
            [row[i] for i in columns] for row in (*([self.heads] * bool(self.heads)), *self.rows)
        ]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        sides = [">" if i in self.numbers else "<" for i in columns]
        for row in rows:
            cells = [f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)]
            start = "".join(f"{cell}  " for cell in cells[:-1])
            parts = [cells[-1]]
            if sides[-1] == "<":
                parts = textwrap.wrap(row[-1], max(40, _WIDTH + 2 - len(start))) or [""]
            if len(parts) > 1 and row[-1] == last:
                parts = ["as above"]
            last = row[-1]
            yield (start + parts[0]).rstrip()
            yield from (" " * len(start) + part for part in parts[1:])

    def html(self) -> str:
        """The table as HTML."""
        rows = [self._row("th", self.heads)] if self.heads else []
        rows += [self._row("td", row, index in self.bold) for index, row in enumerate(self.rows)]
        return f"<table>{''.join(rows)}</table>"

    def _row(self, tag: str, row: Sequence[str], bold: bool = False) -> str:
        cells = []
        for i in self._columns():
            text = f"<b>{html.escape(row[i])}</b>" if bold else html.escape(row[i])
            side = "right" if i in self.numbers else "left"
            cells.append(f'<{tag} style="text-align: {side}">{text}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"


def as_text(parts: Sequence[str | Table]) -> str:
    """Paragraphs and tables below each other."""
    lines = [[part] if isinstance(part, str) else part.lines() for part in parts]
    return "\n".join(line for each in lines for line in each)


def as_html(parts: Sequence[str | Table]) -> str:
    """The same for a notebook."""
    made = [f"<div>{html.escape(p)}</div>" if isinstance(p, str) else p.html() for p in parts]
    return "\n".join(made)
