"""The command `reproduce`: the source's experiments, run and held against its figures."""

from __future__ import annotations

import functools
import json as jsons
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, RenderableType

from constrained_growth.errors import DataError
from constrained_growth.experiments.command_options import Json, Seed, Tables
from constrained_growth.experiments.command_output import command_line
from constrained_growth.experiments.data import Split, digits, mnist1d
from constrained_growth.experiments.mnist import mnist
from constrained_growth.experiments.reproduction import figures, report
from constrained_growth.experiments.reproduction.account import account
from constrained_growth.experiments.reproduction.protocols import EXPERIMENTS, Experiment, on_images
from constrained_growth.experiments.reproduction.reproduce import forget
from constrained_growth.experiments.reproduction.reproduce import reproduce as run
from constrained_growth.experiments.reproduction.runs import Reproduction
from constrained_growth.experiments.timing import one_thread


class FamilyName(StrEnum):
    """The names in `protocols.FAMILIES`, as choices that the help lists."""

    RELU = "relu"
    TANHLU = "tanhlu"
    RESIDUAL_ONE = "residual-one"
    RESIDUAL_OUTER = "residual-outer"
    RESIDUAL_INNER = "residual-inner"
    CONVOLUTION = "convolution"


class ImageName(StrEnum):
    """Where `reproduce images` takes its images from."""

    DIGITS = "digits"
    MNIST1D = "mnist1d"
    MNIST = "mnist"


WIDTH = 150


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(EXPERIMENTS)}, all, or images.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Say what there is and how long it takes.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=2, help="How many runs of every arm.")] = 100,
    seed: Seed = 0,
    network: Annotated[
        FamilyName | None, typer.Option(help="Another kind of network of the same widths.")
    ] = None,
    data: Annotated[ImageName, typer.Option(help="What images.")] = ImageName.DIGITS,
    root: Annotated[
        Path, typer.Option(help="Where torchvision keeps MNIST.", metavar="DIR")
    ] = Path("data"),
    float32: Annotated[
        bool, typer.Option("--float32", help="In single precision, as the source's code.")
    ] = False,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Run an experiment of the source, its protocol beside others, and hold it to account.

    With --out DIR an interrupted run goes on where it was; DIR then holds picture, tables, numbers.
    """
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    if show or name is None:
        console.print(report.overview())
        return
    results = dict[str, dict[str, Any]]()
    experiments = _named(name, network, data, root)
    each, dtype = range(seed, seed + seeds), torch.float32 if float32 else torch.float64
    for experiment in experiments:
        begin = time.perf_counter()
        console.print(report.describe(experiment))
        with one_thread():
            found = run(experiment, each, cache=out, dtype=dtype)
        results[experiment.name] = jsons.loads(report.to_json(found, command_line()))
        console.print(report.tables(found))
        if out is not None:
            _write(found, out, results[experiment.name])
        console.print(f"{time.perf_counter() - begin:.0f} s.")
    if name == "all":
        console.print(account(list(results.values())))
        if out is not None:
            _write_tables(out / "all.txt", account(list(results.values())))
    if json is not None:
        content = results if len(results) > 1 else next(iter(results.values()))
        json.write_text(jsons.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    if out is not None:  # only now: an interrupted command goes on where it was
        for experiment in experiments:
            forget(experiment, each, out, dtype)


def _named(name: str, network: FamilyName | None, data: ImageName, root: Path) -> list[Experiment]:
    found = {**EXPERIMENTS}
    if name == "images":
        found = {e.name: e for e in on_images(data.value, _images(data, root))}
    elif name != "all":
        if name not in EXPERIMENTS:
            raise typer.BadParameter(f"{name} is none of {', '.join(EXPERIMENTS)}, all, images.")
        found = {name: EXPERIMENTS[name]}
    return [e if network is None else _as(e, network.value) for e in found.values()]


def _images(data: ImageName, root: Path) -> Callable[[int], Split]:
    if data is ImageName.MNIST:
        try:
            mnist(root)
        except DataError as error:
            raise typer.BadParameter(str(error)) from None
        return functools.partial(mnist, root)
    return digits if data is ImageName.DIGITS else functools.cache(mnist1d)  # a second for each


def _as(experiment: Experiment, family: str) -> Experiment:
    """The same protocol for another kind of network, for which there are no reference figures."""
    if family == experiment.family:
        return experiment
    title = f"{experiment.name}-{family}"
    return replace(experiment, name=title, family=family, reference={}, counts=())


def _write(found: Reproduction, folder: Path, content: object) -> None:
    """Picture, tables and numbers, by the name of the experiment."""
    figures.picture(found).savefig(folder / f"{found.experiment.name}.png")
    text = jsons.dumps(content, ensure_ascii=False) + "\n"
    (folder / f"{found.experiment.name}.json").write_text(text, encoding="utf-8")
    described = report.describe(found.experiment)
    tables = report.tables(found)
    _write_tables(folder / f"{found.experiment.name}.txt", described, tables)


def _write_tables(path: Path, *tables: RenderableType) -> None:
    with path.open("w", encoding="utf-8") as file:
        written = Console(file=file, width=WIDTH, highlight=False)
        written.print(f"{command_line()}\n", soft_wrap=True)
        for table in tables:
            written.print(table)
