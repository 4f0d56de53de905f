"""The command `reproduce`: the source's experiments, run and held against its figures."""

from __future__ import annotations

import json as jsons
import shlex
import sys
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from constrained_growth.experiments import reproduction_figures, reproduction_report
from constrained_growth.experiments.command_options import Json, Seed, Tables
from constrained_growth.experiments.protocols import EXPERIMENTS, Experiment
from constrained_growth.experiments.reproduction import Reproduction
from constrained_growth.experiments.reproduction import reproduce as run
from constrained_growth.experiments.timing import one_thread


class FamilyName(StrEnum):
    """The names in `protocols.FAMILIES`, as choices that the help lists."""

    RELU = "relu"
    TANHLU = "tanhlu"
    RESIDUAL_ONE = "residual-one"
    RESIDUAL_OUTER = "residual-outer"
    RESIDUAL_INNER = "residual-inner"


WIDTH = 150


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help=f"{', '.join(EXPERIMENTS)}, or all.", show_default=False)
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Say what there is and how long it takes.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=2, help="How many runs of every arm.")] = 100,
    seed: Seed = 0,
    network: Annotated[
        FamilyName | None, typer.Option(help="Another kind of network of the same widths.")
    ] = None,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Run an experiment of the source, its protocol beside others, and hold it to account."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    if show or name is None:
        console.print(reproduction_report.overview())
        return
    results = dict[str, object]()
    for experiment in _named(name, network):
        begin = time.perf_counter()
        console.print(reproduction_report.describe(experiment))
        with one_thread():
            found = run(experiment, range(seed, seed + seeds), cache=out)
        results[experiment.name] = jsons.loads(reproduction_report.to_json(found, _command()))
        console.print(reproduction_report.tables(found))
        if out is not None:
            _write(found, out, results[experiment.name])
        console.print(f"{time.perf_counter() - begin:.0f} s.")
    if json is not None:
        content = results if name == "all" else next(iter(results.values()))
        json.write_text(jsons.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _named(name: str, network: FamilyName | None) -> list[Experiment]:
    if name != "all" and name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name} is none of {', '.join(EXPERIMENTS)}, all.")
    found = list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]
    return [e if network is None else _as(e, network.value) for e in found]


def _as(experiment: Experiment, family: str) -> Experiment:
    """The same protocol for another kind of network, for which there are no reference figures."""
    if family == experiment.family:
        return experiment
    title = f"{experiment.name}-{family}"
    return replace(experiment, name=title, family=family, reference={}, counts=())


def _write(found: Reproduction, folder: Path, content: object) -> None:
    """Picture, tables and numbers, by the name of the experiment."""
    reproduction_figures.picture(found).savefig(folder / f"{found.experiment.name}.png")
    text = jsons.dumps(content, ensure_ascii=False) + "\n"
    (folder / f"{found.experiment.name}.json").write_text(text, encoding="utf-8")
    with (folder / f"{found.experiment.name}.txt").open("w", encoding="utf-8") as file:
        written = Console(file=file, width=WIDTH, highlight=False)
        written.print(f"{_command()}\n")
        written.print(reproduction_report.describe(found.experiment))
        written.print(reproduction_report.tables(found))


def _command() -> str:
    """What was typed."""
    return shlex.join(["constrained-growth", *sys.argv[1:]])
