"""The commands `bench multipliers`, `bench monitoring` and `bench sampling`: time and data."""

from __future__ import annotations

from typing import Annotated

import typer

from constrained_growth.experiments.command_options import Json, Seed, Tables
from constrained_growth.experiments.command_output import carry_out
from constrained_growth.experiments.speed import benchmarks, monitoring, report
from constrained_growth.experiments.speed.sampling import run_sampling, table
from constrained_growth.experiments.timing import one_thread


def bench_multipliers(
    quick: Annotated[bool, typer.Option("--quick", help="A few small cells, three pairs.")] = False,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Time the multiplier pass against ordinary gradient passes, on one thread."""
    carry_out(
        "multipliers",
        lambda: benchmarks.run_multipliers(benchmarks.QUICK if quick else benchmarks.FULL, seed),
        report.multipliers,
        lambda found: found.to_json(),
        width=report.WIDTH,
        out=out,
        json=json,
    )


def bench_monitoring(
    quick: Annotated[bool, typer.Option("--quick", help="Two small cells, three rounds.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time training steps that are watched against steps that are not, on one thread."""
    carry_out(
        "monitoring",
        lambda: monitoring.run_monitoring(monitoring.QUICK if quick else monitoring.FULL, seed),
        monitoring.report,
        lambda found: found.to_json(),
        width=monitoring.WIDTH,
        json=json,
    )


def bench_sampling(
    seeds: Annotated[int, typer.Option(min=1, help="How many random orders to read in.")] = 100,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """How much of the data adaptive sampling reads, and how often it decides as all of them do."""
    with one_thread():
        carry_out(
            "sampling",
            lambda: run_sampling(seeds, seed=seed),
            table,
            lambda found: found.to_json(),
            width=report.WIDTH,
            json=json,
        )
