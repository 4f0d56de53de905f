"""The commands `bench growth` and `bench steps`: whether growing pays, and how to go on."""

from __future__ import annotations

from typing import Annotated

import typer

from constrained_growth.experiments.command_options import Json, Seed, Tables, only
from constrained_growth.experiments.command_output import carry_out, command_line
from constrained_growth.experiments.growth import figures, report, steps, steps_report
from constrained_growth.experiments.growth.benchmark import FULL, QUICK, run_growth


def bench_growth(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few blocks, few steps, two seeds.")
    ] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)
    ] = None,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Multiply-adds and seconds to the loss of a big network: growing against training it whole.

    With --out, every run stays there: an interrupted benchmark goes on where it was.
    """
    plan = only(QUICK if quick else FULL, task or [])
    found = carry_out(
        "growth",
        lambda: run_growth(plan, seed, cache=out),
        report.tables,
        lambda found: report.to_json(found, command_line()),
        width=report.WIDTH,
        out=out,
        json=json,
    )
    if out is not None:
        figures.picture(found).savefig(out / "constrained-growth-bench-growth.png")


def bench_steps(
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, few epochs.")] = False,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """The same networks with the same new layer, trained on in different ways."""
    carry_out(
        "steps",
        lambda: steps.run_steps(steps.QUICK if quick else steps.FULL, seed),
        steps_report.tables,
        lambda found: steps_report.to_json(found, command_line()),
        width=steps_report.WIDTH,
        out=out,
        json=json,
    )
