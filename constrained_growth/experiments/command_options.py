"""Options that several commands have: seeds, files and folders that can be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import typer


def _writable_folder(folder: Path) -> Path:
    """The folder, made if need be; refused before any work is done if nothing can be put there."""
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


def _writable_folder_if_any(folder: Path | None) -> Path | None:
    return None if folder is None else _writable_folder(folder)


Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the picture.", callback=_writable_folder, metavar="DIR")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write all numbers here.", callback=_writable_file, metavar="FILE"),
]
Tables = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder for the tables.", callback=_writable_folder_if_any, metavar="DIR"
    ),
]


class Plan(Protocol):
    """What is run: a data class, its tasks with names."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tasks(self) -> Sequence[Any]:
        """Which tasks."""
        ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)


def only(plan: AnyPlan, names: list[str]) -> AnyPlan:
    """The plan with the tasks of these names, or all of them if none is given."""
    known = [task.name for task in plan.tasks]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--task {name} is none of {', '.join(known)}.")
    tasks = [task for task in plan.tasks if not names or task.name in names]
    return replace(plan, tasks=tasks)
