"""How the cost of a decision grows: `python theory/results/cost_growth.py`, 20 minutes on one core.

Residual networks x + W₂ tanh(W₁x + b), one more such layer as a candidate after each. Times of
`cg.solve` in ordinary gradient passes of the same model on the same batches, by depth, width,
number of candidates and size of the batches; and what each of a hundred insertions costs, proposing
and posing the problem included. Writes cost_growth.json here and ../figures/cost_growth.png;
with `--figure` the picture alone, from the numbers that are there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import torch

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth._style import figure, legend, tidy
from constrained_growth.experiments.speed.multipliers import Case
from constrained_growth.experiments.speed.networks import residual
from constrained_growth.experiments.speed.subject import Subject, solving
from constrained_growth.experiments.timing import Effort, compare, timer

HERE = Path(__file__).parent
NUMBERS, PICTURE = HERE / "cost_growth.json", HERE.parent / "figures" / "cost_growth.png"

SAMPLES, DEPTH, WIDTH, BATCH = 2048, 8, 256, 256
SWEEPS: dict[str, tuple[int, ...]] = {
    "depth": (4, 8, 16, 32, 64, 96),
    "width": (64, 128, 256, 512, 1024, 2048),
    "candidates": (1, 5, 20, 50, 100, 200),
    "batch": (1, 8, 64, 512, 4096),
}
KINDS = {
    "decision": ("solve(problem)", "o", "-"),
    "sizes": ("solve(problem, multipliers=False)", "s", "--"),
    "frobenius": ("norm=Frobenius()", "^", "-."),
}
INSERTIONS = 100


def subject(sweep: str, value: int) -> Subject:
    """A network of which one thing is as said, and its data."""
    sizes = {"depth": DEPTH, "width": WIDTH, "batch": BATCH, "samples": SAMPLES}
    if sweep == "candidates":
        made = Case(residual, **{**sizes, "depth": 50}).subject(0, torch.float32)
        # several at a site, which differ in nothing but their name
        some = [made.candidates[i % 50] for i in range(value)]
        named = [replace(one, name=f"{one.after} {i}") for i, one in enumerate(some)]
        return replace(made, candidates=named)
    if sweep == "batch":
        sizes["samples"] = max(value, 512 if value == 1 else SAMPLES)
    return Case(residual, **{**sizes, sweep: value}).subject(0, torch.float32)


def ratios(sweep: str, value: int) -> dict[str, float]:
    """Seconds of an ordinary pass, and of `KINDS` in passes: medians of three pairs."""
    measured = subject(sweep, value)
    problem = measured.problem()
    runs: dict[str, Any] = {
        "plain": measured.plain_pass,
        "decision": solving(problem),
        "sizes": solving(problem, multipliers=False),
        "frobenius": solving(problem, cg.norms.Frobenius()),
    }
    for run in runs.values():
        run()
    found = compare(runs, Effort(3, 3, 0.0))
    return {"plain": found.seconds, **{kind: found.ratios[kind].median for kind in KINDS}}


def insertions() -> list[dict[str, float]]:
    """Seconds of each step of growing from 4 blocks to 104, and of an ordinary pass in between."""
    made = Case(residual, 4, 64, BATCH, SAMPLES).subject(0, torch.float32)
    model, data, rows = made.model, made.data, list[dict[str, float]]()
    cg.find_candidates(model, data[0][0])  # whose first call imports more
    for _ in progress_bar(range(INSERTIONS), desc="insertions", unit="layer"):
        begin, times = timer(), list[float]()
        found = cg.find_candidates(model, data[0][0])
        times.append(timer())
        problem = cg.GrowthProblem(model, made.loss_fn, data, found)
        times.append(timer())
        solution = cg.solve(problem, multipliers=False)
        times.append(timer())
        cg.insert(model, solution)
        times.append(timer())
        with torch.no_grad():  # as if it had been trained, or the copy would be the next choice
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        ordinary = timer()
        made.plain_pass()
        steps = zip(("find", "problem", "solve", "insert"), [begin, *times], times, strict=False)
        row = {name: after - before for name, before, after in steps}
        rows.append({**row, "plain": timer() - ordinary, "candidates": len(found)})
    return rows


def draw(numbers: dict[str, Any]) -> None:
    """One figure: four sweeps, and the insertions."""
    matplotlib.style.use(HERE.parent / "style.mplstyle")
    sheet = figure(11, 6.4)
    panels = sheet.subplots(2, 3).flat
    for sweep, values in SWEEPS.items():
        ax = next(panels)
        for kind, (label, marker, line) in KINDS.items():
            rows = [numbers[sweep][str(value)][kind] for value in values]
            ax.plot(values, rows, marker=marker, linestyle=line, label=label)
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set(xscale="log", xlabel=sweep if sweep != "batch" else "batch size", ylim=(0, None))
        ax.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        ax.set_xticks([], minor=True)
    for unit in ("seconds", "ordinary gradient passes"):
        ax, rows = next(panels), numbers["insertions"]
        for step, line in {"solve": "-", "problem": "--", "find": "-.", "insert": ":"}.items():
            per = [1.0 if unit == "seconds" else row["plain"] for row in rows]
            ax.plot([row[step] / one for row, one in zip(rows, per, strict=True)], line, label=step)
        ax.set(xlabel="insertions before", ylabel=unit, ylim=(0, None))
    for ax in sheet.axes:
        tidy(ax, "y")
        legend(ax)
    sheet.axes[0].set_ylabel("ordinary gradient passes")
    sheet.axes[3].set_ylabel("ordinary gradient passes")
    sheet.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--figure" not in sys.argv:
        torch.manual_seed(0)
        cells = [(sweep, value) for sweep, values in SWEEPS.items() for value in values]
        found: dict[str, Any] = {sweep: {} for sweep in SWEEPS}
        for sweep, value in progress_bar(cells, desc="sweeps", unit="cell"):
            found[sweep][str(value)] = ratios(sweep, value)
        found["insertions"] = insertions()
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(NUMBERS.read_text(encoding="utf-8")))
