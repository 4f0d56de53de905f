"""What the commands share: options, and how a study is carried out, shown and written."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from constrained_growth.experiments.tables import WIDTH, described, to_json


def _writable_folder(folder: Path | None) -> Path | None:
    """The folder, made if need be; refused before any work is done if it cannot be written."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise typer.BadParameter(f"cannot write into {folder}: {error.strerror}.") from None


def _writable_file(file: Path | None) -> Path | None:
    if file is not None:
        _writable_folder(file.parent)
        if file.is_dir():
            raise typer.BadParameter(f"{file} is a folder; give the name of a file.")
    return file


Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write all numbers here.", callback=_writable_file, metavar="FILE"),
]
Folder = Annotated[
    Path, typer.Option("--out", help="Folder for the picture.", callback=_writable_folder)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results.", callback=_writable_folder, metavar="DIR"),
]
Quick = Annotated[bool, typer.Option("--quick", help="A small version, to see that it runs.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this one; may be repeated.")]


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["constrained-growth", *sys.argv[1:]])


def terminal(width: int = WIDTH) -> Console:
    """A console of at least this width."""
    console = Console(highlight=False)
    console.width = max(console.width, width)
    return console


def write_tables(file: Path, *tables: RenderableType) -> None:
    """The command, and below it the tables as text."""
    console = Console(file=StringIO(), width=WIDTH, highlight=False, record=True)
    for table in tables:
        console.print(table)
    lines = (line.rstrip() for line in console.export_text().splitlines())
    file.write_text("\n".join([f"$ {typed()}", "", *lines, ""]), encoding="utf-8")


def write_numbers(file: Path, numbers: Any) -> None:
    """Numbers as JSON."""
    file.write_text(to_json(numbers) + "\n", encoding="utf-8")


def carry_out(
    name: str,
    study: Any,
    *,
    quick: bool,
    seed: int,
    out: Path | None,
    json: Path | None,
    tasks: Sequence[str] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run a benchmark, show its tables, and write what was asked for; returns its numbers.

    A study has plans FULL and QUICK, `run(plan, seed, cache=)`, which returns plain numbers, and
    `tables(numbers)`. It runs on one thread. Only the tasks of these names are run, or all. A
    `device` takes the place of that of the plan.
    """
    from constrained_growth.experiments.timing import machine, one_thread

    begin, console = time.perf_counter(), terminal()
    plan = study.QUICK if quick else study.FULL
    plan = plan if device is None else replace(plan, device=device)
    with one_thread():
        found = study.run(_only(plan, tasks) if tasks else plan, seed, cache=out)
        found |= {"machine": machine(), "seed": seed, "command": typed()}
    shown = f"{described(found['machine'])}; seed {seed}.\n", study.tables(found)
    for part in shown:
        console.print(part)
    if out is not None:
        write_tables(out / f"{stem(name, quick, seed, tasks)}.txt", *shown)
    if json is not None:
        write_numbers(json, found)
    console.print(f"{time.perf_counter() - begin:.0f} s.")
    return found


def stem(name: str, quick: bool, seed: int, tasks: Sequence[str] | None = None) -> str:
    """The name of a benchmark's files, which tells one run from another."""
    parts = ("constrained-growth-bench", name, *(tasks or ()), *(["quick"] * quick), str(seed))
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))  # "ViT-B/16" is no folder


def _only(plan: Any, names: Sequence[str]) -> Any:
    """The plan with the tasks of these names, whatever their case."""
    known, wanted = [task.name for task in plan.tasks], {name.lower() for name in names}
    for name in names:
        if name.lower() not in map(str.lower, known):
            raise typer.BadParameter(f"--task {name} is none of {', '.join(known)}.")
    return replace(plan, tasks=[task for task in plan.tasks if task.name.lower() in wanted])
