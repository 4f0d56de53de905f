"""The command line: each command calls one function of `experiments` and shows what it returns."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from constrained_growth.experiments import report
from constrained_growth.experiments.command_options import Json, Out, Seed
from constrained_growth.experiments.decisions.command import bench_decisions
from constrained_growth.experiments.demo import run_demo
from constrained_growth.experiments.growth.command import bench_growth, bench_steps
from constrained_growth.experiments.reproduction.command import reproduce
from constrained_growth.experiments.speed.command import (
    bench_monitoring,
    bench_multipliers,
    bench_sampling,
)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
bench = typer.Typer(help="What things cost, measured on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command()(reproduce)
bench.command("multipliers")(bench_multipliers)
bench.command("monitoring")(bench_monitoring)
bench.command("sampling")(bench_sampling)
bench.command("decisions")(bench_decisions)
bench.command("growth")(bench_growth)
bench.command("steps")(bench_steps)


class DataName(StrEnum):
    """The names in `demo.DATA`, as choices that the help lists."""

    DIGITS = "digits"
    SPIRALS = "spirals"


@app.callback()
def main() -> None:
    """Would another layer help this network, where, and what would it buy?"""


@app.command()
def demo(
    data: Annotated[DataName, typer.Option(help="What to learn.")] = DataName.DIGITS,
    seed: Seed = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="At most so many before and after the insertion.")
    ] = None,
    out: Out = Path(),
    json: Json = None,
) -> None:
    """Train to a plateau, ask where a layer would help, insert it, train on beside the old one."""
    begin = time.perf_counter()
    console = Console(highlight=False)
    result = run_demo(
        data.value,
        seed,
        max_epochs=epochs,
        epochs_after=epochs,
        on_solved=lambda asked: console.print(report.question(asked)),
    )
    console.print(report.ending(result))
    picture = out / "constrained-growth-demo.png"
    report.picture(result).savefig(picture)
    if json is not None:
        json.write_text(result.to_json() + "\n", encoding="utf-8")
    took = time.perf_counter() - begin
    console.print(f"{took:.0f} s. The picture is {picture}", soft_wrap=True)
