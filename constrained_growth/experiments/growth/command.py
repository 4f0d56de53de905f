"""The commands `bench growth` and `bench steps`: whether growing pays, and how to go on."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from constrained_growth.experiments.command_options import Json, Seed, Tables
from constrained_growth.experiments.growth import figures, report, steps, steps_report
from constrained_growth.experiments.growth.benchmark import FULL, QUICK, Plan, run_growth


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
    begin = time.perf_counter()
    plan = _only(QUICK if quick else FULL, task or [])
    console = Console(highlight=False, record=True)
    console.width = max(console.width, report.WIDTH)
    found = run_growth(plan, seed, cache=out)
    console.print(report.tables(found))
    if out is not None:
        console.save_text(str(out / "constrained-growth-bench-growth.txt"), clear=False)
        figures.picture(found).savefig(out / "constrained-growth-bench-growth.png")
    if json is not None:
        command = shlex.join(["constrained-growth", *sys.argv[1:]])
        json.write_text(report.to_json(found, command) + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")


def bench_steps(
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, few epochs.")] = False,
    seed: Seed = 0,
    out: Tables = None,
    json: Json = None,
) -> None:
    """The same networks with the same new layer, trained on in different ways."""
    begin = time.perf_counter()
    console = Console(highlight=False, record=True)
    console.width = max(console.width, steps_report.WIDTH)
    found = steps.run_steps(steps.QUICK if quick else steps.FULL, seed)
    console.print(steps_report.tables(found))
    if out is not None:
        console.save_text(str(out / "constrained-growth-bench-steps.txt"), clear=False)
    if json is not None:
        command = shlex.join(["constrained-growth", *sys.argv[1:]])
        json.write_text(steps_report.to_json(found, command) + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - begin:.0f} s.")


def _only(plan: Plan, names: list[str]) -> Plan:
    known = [task.name for task in plan.tasks]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--task {name} is none of {', '.join(known)}.")
    return replace(plan, tasks=[t for t in plan.tasks if not names or t.name in names])
