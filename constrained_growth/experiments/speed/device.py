"""`bench device`: what holds on a GPU, and what it costs there, in less than six minutes."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

import constrained_growth as cg
from constrained_growth.experiments.speed.multipliers import disagreement
from constrained_growth.experiments.speed.stock import LLAMA_350M, STOCK, Stock, Subject
from constrained_growth.experiments.tables import interval, number, titled
from constrained_growth.experiments.timing import Effort, compare, described, machine, peak_bytes

COLUMNS = {"decision": "decision", "with_stationarity": "… and ‖∇L‖", "frobenius": "Frobenius"}
"""What is timed: `solve`, with ∇_θ L, and in Frobenius' norm."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_BY_NAME = {stock.name: stock for stock in STOCK}
_TESTS = Path(__file__).parents[3] / "tests"


@dataclass(frozen=True)
class Plan:
    """Which models, small ones or of real size, how many batches, how many pairs, and where."""

    tasks: Sequence[Stock]
    small: bool
    batches: int
    effort: Effort
    device: str = "cuda"


def _larger(stock: Stock) -> Stock:
    """Batches that keep a card busy."""
    samples, size = stock.shape
    return replace(stock, shape=(4 * samples, size))


FULL = Plan(
    tuple(map(_larger, (_BY_NAME["GPT-2 124M"], LLAMA_350M, _BY_NAME["ResNet-50"]))),
    small=False,
    batches=4,
    effort=Effort(fewest=5, most=15, seconds=8.0),
)
QUICK = replace(FULL, small=True, batches=2, effort=Effort(fewest=1, most=1, seconds=0.0))


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Measure and check everything on the device of a plan.

    Returns:
        The numbers that `--json` writes (`cache` is not used). "rows": of each model in each
        dtype the median time of an ordinary pass in seconds, for each of `COLUMNS` the median
        time in such passes with its quartiles, "make" (GrowthProblem, in passes over one batch)
        and the peak "memory" of a decision over that of a pass. "checks": what was checked, and
        what was found.
    """
    begin, device = time.perf_counter(), torch.device(plan.device)
    rows = [_measured(stock, plan, device, name, seed) for stock in plan.tasks for name in DTYPES]
    first = plan.tasks[0].make(small=plan.small, batches=2, seed=seed).to(device)
    checks = {
        "torch.compile": _compiled(first),
        "AMP with a GradScaler": _scaled(first, device),
        "tests marked gpu": _tests() if device.type == "cuda" else "for a card only",
    }
    return {
        "machine": machine() | {"device": _described(device)},
        "seed": seed,
        "small": plan.small,
        "rows": rows,
        "checks": checks,
        "seconds": time.perf_counter() - begin,
    }


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _measured(
    stock: Stock, plan: Plan, device: torch.device, dtype: str, seed: int
) -> dict[str, Any]:
    subject = stock.make(small=plan.small, batches=plan.batches, seed=seed)
    subject = subject.to(device, DTYPES[dtype])
    first = Subject(subject.model, subject.loss_fn, subject.data[:1])
    subject.plain_pass()  # to warm up
    candidates = cg.find_candidates(subject.model, subject.data[0][0])
    made: dict[str, cg.GrowthProblem] = {}

    def pose() -> None:
        made["problem"] = cg.GrowthProblem(subject.model, subject.loss_fn, subject.data, candidates)

    pose()
    once = {"plain": first.plain_pass, "make": pose}
    making = compare(_finished(once, device), Effort(1, 1, 0.0), time.perf_counter)

    def solving(norm: Any, stationarity: bool) -> Callable[[], object]:
        return lambda: cg.solve(
            made["problem"], norm=norm, stationarity=stationarity, progress=False
        )

    runs: dict[str, Callable[[], object]] = {
        "plain": subject.plain_pass,
        "decision": solving(None, False),
        "with_stationarity": solving(None, True),
        "frobenius": solving(cg.norms.Frobenius(), False),
    }
    for work in runs.values():
        work()
    compared = compare(_finished(runs, device), plan.effort, time.perf_counter)
    plain = _peak(subject.pass_and_free, device)
    row = {
        "name": stock.name,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "candidates": len(candidates),
        "plain_s": compared.seconds,
        "make": making.ratios["make"].median,
        "memory": _peak(runs["decision"], device) / plain,
        "plain_bytes": plain,
        "pairs": compared.rounds,
    }
    for name, spread in compared.ratios.items():
        row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
    return row


def _finished(
    runs: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, Callable[[], object]]:
    """The same, until the device has done its work."""

    def finished(work: Callable[[], object]) -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return {name: lambda work=work: finished(work) for name, work in runs.items()}


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at most, beyond what is there already."""
    if device.type != "cuda":
        return peak_bytes(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _solved(subject: Subject) -> cg.Solution:
    """Multipliers in the Frobenius norm at the sites that are proposed."""
    candidates = cg.find_candidates(subject.model, subject.data[0][0])
    problem = cg.GrowthProblem(subject.model, subject.loss_fn, subject.data, candidates)
    return cg.solve(problem, norm=cg.norms.Frobenius(), progress=False)


def _compiled(subject: Subject) -> str:
    """Λ of the compiled model against that of the model."""
    try:
        compiled: Any = torch.compile(copy.deepcopy(subject.model))
        found = _solved(replace(subject, model=compiled)).multipliers
        # its names begin with that of the wrapper
        found = {name.removeprefix("_orig_mod."): pins for name, pins in found.items()}
        apart = disagreement(found, _solved(subject).multipliers)
    except Exception as error:  # to be read in the table: the others go on
        return _fault(error)
    return _verdict(apart, 1e-2)


def _scaled(subject: Subject, device: torch.device) -> str:
    """Λ under autocast against that without, and a scaled step of the grown model."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    try:
        exact = _solved(subject)
        with torch.autocast(device.type, dtype=dtype):
            rough = _solved(subject)
        apart = disagreement(rough.multipliers, exact.multipliers)
        model = copy.deepcopy(subject.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        grown = Subject(model, subject.loss_fn, subject.data)
        cg.insert(model, _solved(grown), optimizer=optimizer)
        scaler = torch.amp.GradScaler(device.type)
        for input, target in subject.data:
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                loss = subject.loss_fn(model(**input), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return "fault: parameters are not finite after a scaled step"
    except Exception as error:  # to be read in the table: the others go on
        return _fault(error)
    return _verdict(apart, 0.1)


def _verdict(apart: float, most: float) -> str:
    return f"{'holds' if apart <= most else 'fault'}: λ differs by {apart:.1e} of its size"


def _fault(error: Exception) -> str:
    return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _tests() -> str:
    """The last line of pytest on the tests marked gpu, where the tests are at hand."""
    if not _TESTS.is_dir():
        return "not run: the tests are not installed; run this in a clone of the repository"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(_TESTS)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=_TESTS.parent)
    lines = (ran.stdout.strip() or ran.stderr.strip()).splitlines()
    return lines[-1] if lines else f"pytest ended with {ran.returncode}"


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The device, how to read it, the table and the checks."""
    table = titled(
        "Stock models with random weights" + (", small versions" if found["small"] else ""),
        "model",
        *("dtype", "size/M", "candidates", "pass/ms", *COLUMNS.values()),
        *("make", "memory", "pass/GiB", "pairs"),
    )
    for row in found["rows"]:
        table.add_row(
            row["name"],
            row["dtype"],
            f"{row['parameters'] / 1e6:.1f}",
            str(row["candidates"]),
            f"{1e3 * row['plain_s']:.1f}",
            *(interval(row[c], row[f"{c}_low"], row[f"{c}_high"]) for c in COLUMNS),
            *(number(row["make"], ".1f"), number(row["memory"], ".2f")),
            *(number(row["plain_bytes"] / 2**30, ".2f"), str(row["pairs"])),
        )
    here = found["machine"]
    return Group(
        Text(f"{here['device']}; {described(here)}; seed {found['seed']}.\n"),
        Text(
            "Times in ordinary gradient passes, median [quartiles] over the pairs, until the "
            "device is done. “make” is GrowthProblem in passes over one batch, “memory” the peak "
            "of a decision over that of a pass, both without the model.\n"
        ),
        table,
        *(Text(f"{name}: {what}") for name, what in found["checks"].items()),
    )
