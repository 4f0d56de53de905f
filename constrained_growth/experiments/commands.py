"""The command line: each command calls one function of `experiments` and shows what it returns."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from constrained_growth.experiments import report
from constrained_growth.experiments.command_options import Json, Out, Seed, Tables
from constrained_growth.experiments.decisions.command import bench_decisions
from constrained_growth.experiments.demo import run_demo
from constrained_growth.experiments.growth.command import bench_growth, bench_steps
from constrained_growth.experiments.reproduction.command import reproduce
from constrained_growth.experiments.speed import benchmarks, monitoring
from constrained_growth.experiments.speed import report as speed_report
from constrained_growth.experiments.speed.sampling import run_sampling, table
from constrained_growth.experiments.timing import one_thread

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
bench = typer.Typer(help="What things cost, measured on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command()(reproduce)
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


@bench.command("multipliers")
def bench_multipliers(
    quick: Annotated[bool, typer.Option("--quick", help="A few small cells, three pairs.")] = False,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Time the multiplier pass against ordinary gradient passes, on one thread."""
    begin = time.perf_counter()
    console = Console(highlight=False, record=True)
    console.width = max(console.width, speed_report.WIDTH)
    result = benchmarks.run_multipliers(benchmarks.QUICK if quick else benchmarks.FULL, seed)
    console.print(speed_report.multipliers(result))
    if out is not None:
        console.save_text(str(out / "constrained-growth-bench-multipliers.txt"), clear=False)
    if json is not None:
        json.write_text(result.to_json() + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")


@bench.command("monitoring")
def bench_monitoring(
    quick: Annotated[bool, typer.Option("--quick", help="Two small cells, three rounds.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time training steps that are watched against steps that are not, on one thread."""
    begin = time.perf_counter()
    console = Console(highlight=False)
    console.width = max(console.width, monitoring.WIDTH)
    plan = monitoring.QUICK if quick else monitoring.FULL
    result = monitoring.run_monitoring(plan, seed)
    console.print(monitoring.report(result))
    if json is not None:
        json.write_text(result.to_json() + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")


@bench.command("sampling")
def bench_sampling(
    seeds: Annotated[int, typer.Option(min=1, help="How many random orders to read in.")] = 100,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """How much of the data adaptive sampling reads, and how often it decides as all of them do."""
    begin = time.perf_counter()
    console = Console(highlight=False)
    console.width = max(console.width, speed_report.WIDTH)
    with one_thread():
        result = run_sampling(seeds, seed=seed)
    console.print(table(result))
    if json is not None:
        json.write_text(result.to_json() + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")
