"""`bench multipliers --family models`: what decisions cost on models that people have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.experiments.speed.stock import STOCK, Stock, Subject
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import (
    Effort,
    compare,
    described,
    machine,
    one_thread,
    peak_bytes,
)

COLUMNS = {
    "decision": "decision",
    "with_stationarity": "… and ‖∇L‖",
    "frobenius": "Frobenius",
    "frobenius_with_stationarity": "… and ‖∇L‖",
}
"""What is timed: `solve` with the recommended norm and with Frobenius', without and with ∇_θ L."""


@dataclass(frozen=True)
class Plan:
    """Which models, small ones or of real size, how many batches, and how many pairs."""

    tasks: Sequence[Stock]
    small: bool
    batches: int
    effort: Effort


FULL = Plan(STOCK, small=False, batches=4, effort=Effort(fewest=5, most=5, seconds=0.0))
QUICK = Plan(STOCK, small=True, batches=2, effort=Effort(fewest=1, most=1, seconds=0.0))


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Measure every model of a plan, on one thread; the random state of the caller is left alone.

    Returns:
        The numbers that `--json` writes (`cache` is not used: times are measured anew). A row has
        the sizes of the model, the median processor time of an ordinary gradient pass in seconds,
        for each of `COLUMNS` the median time in such passes with its quartiles; "find" and
        "problem": what proposing and making the problem take, in passes over one batch; "memory":
        the peak of a decision over that of an ordinary pass.
    """
    with one_thread():
        rows = []
        for stock in (bar := progress_bar(plan.tasks, desc="models", unit="model")):
            bar.set_description(stock.name)
            rows.append(_measured(stock, plan, seed))
        return {"machine": machine(), "seed": seed, "small": plan.small, "rows": rows}


def _measured(stock: Stock, plan: Plan, seed: int) -> dict[str, Any]:
    subject = stock.make(small=plan.small, batches=plan.batches, seed=seed)
    first = Subject(subject.model, subject.loss_fn, subject.data[:1])
    first.plain_pass()  # to warm up
    made: dict[str, Any] = {}

    def find() -> None:
        made["candidates"] = cg.find_candidates(subject.model, subject.data[0][0])

    def pose() -> None:
        arguments = subject.model, subject.loss_fn, subject.data, made["candidates"]
        made["problem"] = cg.GrowthProblem(*arguments)

    once = compare(
        {"plain": first.plain_pass, "find": find, "problem": pose}, Effort(1, 1, seconds=0.0)
    )
    problem = made["problem"]

    def solving(norm: Any, stationarity: bool) -> Callable[[], object]:
        return lambda: cg.solve(problem, norm=norm, stationarity=stationarity, progress=False)

    frobenius = cg.norms.Frobenius()
    runs: dict[str, Callable[[], object]] = {
        "plain": subject.plain_pass,
        "decision": solving(None, False),
        "with_stationarity": solving(None, True),
        "frobenius": solving(frobenius, False),
        "frobenius_with_stationarity": solving(frobenius, True),
    }
    compared = compare(runs, plan.effort)
    row = {
        "name": stock.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "candidates": len(problem.candidates),
        "block": type(problem.candidates[0].block).__name__,
        "pinned": sum(pin.shape.numel() for pin in _pins(problem)),
        "method": problem.method.name,
        "shape": list(stock.small_shape if plan.small else stock.shape),
        "batches": plan.batches,
        "plain_s": compared.seconds,
        "find": once.ratios["find"].median,
        "problem": once.ratios["problem"].median,
        "memory": peak_bytes(runs["decision"]) / peak_bytes(subject.pass_and_free),
        "pairs": compared.rounds,
    }
    for name, spread in compared.ratios.items():
        row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
    return row


def _pins(problem: cg.GrowthProblem) -> list[Any]:
    sites = {candidate.name: candidate.block for candidate in problem.candidates}
    return [sites[pin.candidate].get_parameter(pin.parameter) for pin in problem.constraints]


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The machine, how to read it, and the table."""
    table = titled(
        "Stock models with random weights" + (", small versions" if found["small"] else ""),
        "model",
        *("size/M", "candidates", "pinned/M", "pass/s", *COLUMNS.values()),
        *("find", "make", "memory"),
    )
    for row in found["rows"]:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['candidates']} {row['block']}",
            f"{row['pinned'] / 1e6:.2f}",
            f"{row['plain_s']:.2f}",
            *(interval(row[c], row[f"{c}_low"], row[f"{c}_high"]) for c in COLUMNS),
            *(f"{row[name]:.1f}" for name in ("find", "problem")),
            f"{row['memory']:.2f}",
        )
    return Group(
        Text(f"{described(found['machine'])}; seed {found['seed']}.\n"),
        Text(
            "Processor time in ordinary gradient passes (zero_grad, forward, loss, backward of the "
            "same model on the same batches): median [quartiles] over the pairs. A decision is "
            "solve(problem), Frobenius solve(problem, norm=Frobenius()), with standard errors. "
            "“find” (find_candidates) and “make” (GrowthProblem) are paid once and counted in "
            "passes over one batch. “memory” is the peak of a decision over that of a pass, the "
            "model itself not counted.\n"
        ),
        table,
    )
