"""The command `bench decisions`: how far each rule can be trusted."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from constrained_growth.experiments.command_options import Json, Seed, Tables
from constrained_growth.experiments.decisions import report
from constrained_growth.experiments.decisions.study import FULL, QUICK, Plan, run_decisions


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
    begin = time.perf_counter()
    plan = _only(QUICK if quick else FULL, task or [])
    console = Console(highlight=False, record=True)
    console.width = max(console.width, report.WIDTH)
    found = run_decisions(plan, seed, cache=out)
    console.print(report.tables(found))
    if out is not None:
        console.save_text(str(out / "constrained-growth-bench-decisions.txt"), clear=False)
    if json is not None:
        command = shlex.join(["constrained-growth", *sys.argv[1:]])
        json.write_text(report.to_json(found, command) + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")


def _only(plan: Plan, names: list[str]) -> Plan:
    known = [task.name for task in plan.tasks]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--task {name} is none of {', '.join(known)}.")
    return replace(plan, tasks=[t for t in plan.tasks if not names or t.name in names])
