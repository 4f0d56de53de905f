"""The command `bench decisions`: how far each rule can be trusted."""

from __future__ import annotations

from typing import Annotated

import typer

from constrained_growth.experiments.command_options import Json, Seed, Tables, only
from constrained_growth.experiments.command_output import carry_out, command_line
from constrained_growth.experiments.decisions import report
from constrained_growth.experiments.decisions.study import FULL, QUICK, run_decisions


def bench_decisions(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two tasks, few networks, few epochs.")
    ] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)
    ] = None,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """Insert a layer everywhere, ask every rule where, and compare: regret relative to random.

    With --out, what became of the networks of a task stays there: an interrupted run goes on
    where it was.
    """
    plan = only(QUICK if quick else FULL, task or [])
    carry_out(
        "decisions",
        lambda: run_decisions(plan, seed, cache=out),
        report.tables,
        lambda found: report.to_json(found, command_line()),
        width=report.WIDTH,
        out=out,
        json=json,
    )
