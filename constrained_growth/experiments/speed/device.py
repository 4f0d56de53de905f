"""`bench device`: what holds on a GPU, and what it costs there, in less than six minutes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

import constrained_growth as cg
from constrained_growth.experiments.speed import models
from constrained_growth.experiments.speed.models import Plan
from constrained_growth.experiments.speed.multipliers import disagreement
from constrained_growth.experiments.speed.stock import LLAMA_350M, STOCK, Stock
from constrained_growth.experiments.speed.subject import Subject, solving
from constrained_growth.experiments.timing import Effort

_TESTS = Path(__file__).parents[3] / "tests"


def _larger(stock: Stock) -> Stock:
    """Batches that keep a card busy."""
    samples, size = stock.shape
    return replace(stock, shape=(4 * samples, size))


_BY_NAME = {stock.name: stock for stock in STOCK}

FULL = Plan(
    tuple(map(_larger, (_BY_NAME["GPT-2 124M"], LLAMA_350M, _BY_NAME["ResNet-50"]))),
    small=False,
    batches=4,
    effort=Effort(fewest=5, most=15, seconds=8.0),
    device="cuda",
    dtypes=tuple(models.DTYPES),
)
QUICK = replace(FULL, small=True, batches=2, effort=Effort(fewest=1, most=1, seconds=0.0))


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Measure and check everything on the device of a plan.

    Returns:
        The numbers that `--json` writes: those of `models.run` in each dtype; "device"; and under
        "checks" what was checked, and what was found.
    """
    device = torch.device(plan.device)
    found = models.run(plan, seed)
    first = plan.tasks[0].make(small=plan.small, batches=2, seed=seed)
    first = first.to(device, torch.float32)
    card = device.type == "cuda"
    return found | {
        "device": torch.cuda.get_device_name(device) if card else device.type,
        "checks": {
            "torch.compile": _checked(_compiled, first, 1e-2),
            "AMP with a GradScaler": _checked(_scaled, first, 0.1),
            "tests marked gpu": _tests() if card else "for a card only",
        },
    }


def _checked(check: Callable[[Subject], float], subject: Subject, most: float) -> str:
    """Whether λ differs by at most a share of its size; an error is to be read in the table."""
    try:
        apart = check(subject)
    except Exception as error:  # the others go on
        return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"{'holds' if apart <= most else 'fault'}: λ differs by {apart:.1e} of its size"


def _solved(subject: Subject) -> cg.Solution:
    """Multipliers in the Frobenius norm at the sites that are proposed."""
    candidates = cg.find_candidates(subject.model, subject.data[0][0])
    return solving(replace(subject, candidates=candidates).problem(), cg.norms.Frobenius())()


def _compiled(subject: Subject) -> float:
    """Λ of the compiled model against that of the model."""
    compiled: Any = torch.compile(copy.deepcopy(subject.model))
    found = _solved(replace(subject, model=compiled)).multipliers
    # its names begin with that of the wrapper
    found = {name.removeprefix("_orig_mod."): pins for name, pins in found.items()}
    return disagreement(found, _solved(subject).multipliers)


def _scaled(subject: Subject) -> float:
    """Λ under autocast against that without; and a scaled step of the grown model."""
    device = next(subject.model.parameters()).device.type
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    exact = _solved(subject)
    with torch.autocast(device, dtype=dtype):
        rough = _solved(subject)
    grown = replace(subject, model=copy.deepcopy(subject.model))
    optimizer = torch.optim.SGD(grown.model.parameters(), lr=1e-3)
    cg.insert(grown.model, _solved(grown), optimizer=optimizer)
    scaler = torch.amp.GradScaler(device)
    for batch in subject.data:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = grown.loss(*batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    if not all(bool(p.isfinite().all()) for p in grown.model.parameters()):
        raise ArithmeticError("parameters are not finite after a scaled step")
    return disagreement(rough.multipliers, exact.multipliers)


def _tests() -> str:
    """The last line of pytest on the tests marked gpu, where the tests are at hand."""
    if not _TESTS.is_dir():
        return "not run: the tests are not installed; run this in a clone of the repository"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(_TESTS)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=_TESTS.parent)
    lines = (ran.stdout.strip() or ran.stderr.strip()).splitlines()
    return lines[-1] if lines else f"pytest ended with {ran.returncode}"


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The device, the table of models, and the checks."""
    checks = (Text(f"{name}: {what}") for name, what in found["checks"].items())
    return Group(Text(f"On {found['device']}.\n"), models.tables(found), *checks)
