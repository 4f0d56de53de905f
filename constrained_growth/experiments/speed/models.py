"""`bench multipliers --family models`: what decisions cost on models that people have."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.experiments.speed.stock import STOCK, Stock
from constrained_growth.experiments.speed.subject import solving
from constrained_growth.experiments.tables import spread, tabled
from constrained_growth.experiments.timing import Comparison, Effort, compare, peak_bytes

COLUMNS = {
    "decision": "decision",
    "with_stationarity": "decision and ‖∇L‖",
    "sizes": "without λ",
    "frobenius": "Frobenius",
}
"""What is timed: `solve` with the recommended norm, with ∇_θ L too, with sensitivities alone, and
with Frobenius' norm."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Which models, small ones or of real size, how many batches, how many pairs, and where."""

    tasks: Sequence[Stock]
    small: bool
    batches: int
    effort: Effort
    device: str = "cpu"
    dtypes: Sequence[str] = ("float32",)


FULL = Plan(STOCK, small=False, batches=2, effort=Effort(fewest=3, most=3, seconds=0.0))
QUICK = Plan(STOCK, small=True, batches=2, effort=Effort(fewest=1, most=1, seconds=0.0))


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Measure every model of a plan; the random state of the caller is left alone.

    Returns:
        The numbers that `--json` writes (`cache` is not used: times are measured anew). A row has
        the sizes of the model, the median time of an ordinary gradient pass in seconds (of the
        processor, or until a card has finished), for each of `COLUMNS` the median time in such
        passes with its quartiles; "find" and "problem": what proposing and making the problem
        take, in passes over one batch; "memory" and "memory_of_sizes": the peak of a decision, and
        of one without λ, over that of an ordinary pass.
    """
    rows = []
    for stock in (bar := progress_bar(plan.tasks, desc="models", unit="model")):
        bar.set_description(stock.name)
        rows += [_measured(stock, plan, dtype, seed) for dtype in plan.dtypes]
    return {"small": plan.small, "rows": rows}


def _measured(stock: Stock, plan: Plan, dtype: str, seed: int) -> dict[str, Any]:
    device = torch.device(plan.device)
    subject = stock.make(small=plan.small, batches=plan.batches, seed=seed)
    subject = subject.to(device, DTYPES[dtype])
    made: dict[str, Any] = {}

    def find() -> None:
        made["candidates"] = cg.find_candidates(subject.model, subject.data[0][0])

    def pose() -> None:
        made["problem"] = replace(subject, candidates=made["candidates"]).problem()

    first = subject.first()
    first.plain_pass()  # to warm up
    once = _compared(
        {"plain": first.plain_pass, "find": find, "problem": pose}, Effort(1, 1, 0.0), device
    )
    problem = made["problem"]
    runs: dict[str, Callable[[], object]] = {
        "plain": subject.plain_pass,
        "decision": solving(problem),
        "with_stationarity": solving(problem, stationarity=True),
        "sizes": solving(problem, multipliers=False),
        "frobenius": solving(problem, cg.norms.Frobenius()),
    }
    for work in runs.values() if device.type == "cuda" else ():
        work()  # a card chooses and compiles its kernels in the first call
    compared, plain = _compared(runs, plan.effort, device), _peak(subject.pass_and_free, device)
    return {
        "name": stock.name,
        "dtype": dtype,
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
        "memory": _peak(runs["decision"], device) / plain,
        "memory_of_sizes": _peak(runs["sizes"], device) / plain,
        "plain_bytes": plain,
    } | compared.row()


def _compared(
    runs: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> Comparison:
    """On a card, time goes on until it has done its work."""
    if device.type != "cuda":
        return compare(runs, effort)

    def finished(work: Callable[[], object]) -> None:
        work()
        torch.cuda.synchronize(device)

    works = {name: partial(finished, work) for name, work in runs.items()}
    return compare(works, effort, time.perf_counter)


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at most, beyond what is there already."""
    if device.type != "cuda":
        return peak_bytes(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _pins(problem: cg.GrowthProblem) -> list[Any]:
    sites = {candidate.name: candidate.block for candidate in problem.candidates}
    return [sites[pin.candidate].get_parameter(pin.parameter) for pin in problem.constraints]


def tables(found: Mapping[str, Any]) -> RenderableType:
    """How to read it, and the table."""
    rows = [
        (
            row["name"],
            {
                "dtype": row["dtype"],
                "size/M": f"{row['parameters'] / 1e6:.1f}",
                "candidates": f"{row['candidates']} {row['block']}",
                "pinned/M": f"{row['pinned'] / 1e6:.2f}",
                "pass/s": f"{row['plain_s']:.3g}",
                **{heading: spread(row, column) for column, heading in COLUMNS.items()},
                "find": f"{row['find']:.1f}",
                "make": f"{row['problem']:.1f}",
                "memory": f"{row['memory']:.2f}, {row['memory_of_sizes']:.2f}",
                "pass/GiB": f"{row['plain_bytes'] / 2**30:.2f}",
                "pairs": str(row["pairs"]),
            },
        )
        for row in found["rows"]
    ]
    small = ", small versions" if found["small"] else ""
    return Group(
        Text(
            "Time in ordinary gradient passes (zero_grad, forward, loss, backward of the same "
            "model on the same batches), of the processor or until a card has done its work: "
            "median [quartiles] over the pairs. A decision is solve(problem), “without λ” "
            "solve(problem, multipliers=False), Frobenius solve(problem, norm=Frobenius()). "
            "“find” (find_candidates) and “make” (GrowthProblem) are paid once and counted in "
            "passes over one batch. “memory” is the peak of a decision, and of one without λ, over "
            "that of a pass, the model itself not counted.\n"
        ),
        tabled(f"Stock models with random weights{small}", "model", rows),
    )
