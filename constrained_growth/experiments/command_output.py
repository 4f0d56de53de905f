"""What commands that take long show at their end, and the files that they write."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console, RenderableType

Result = TypeVar("Result")


def command_line() -> str:
    """What was typed."""
    return shlex.join(["constrained-growth", *sys.argv[1:]])


def carry_out(
    name: str,
    run: Callable[[], Result],
    tables: Callable[[Result], RenderableType],
    to_json: Callable[[Result], str],
    *,
    width: int,
    out: Path | None = None,
    json: Path | None = None,
) -> Result:
    """Run a benchmark, show its tables and how long it took, and write what was asked for.

    Args:
        name: Of the benchmark.
        run: What takes long.
        tables: What is shown of the result.
        to_json: Its numbers.
        width: Characters in a line, at least.
        out: Folder for the tables as text, below the command that made them.
        json: File for the numbers.
    """
    begin = time.perf_counter()
    console = Console(highlight=False, record=True)
    console.width = max(console.width, width)
    found = run()
    console.print(tables(found))
    if out is not None:
        lines = (line.rstrip() for line in console.export_text(clear=False).splitlines())
        text = "\n".join([f"$ {command_line()}", "", *lines, ""])
        (out / f"constrained-growth-bench-{name}.txt").write_text(text, encoding="utf-8")
    if json is not None:
        json.write_text(to_json(found) + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")
    return found
