"""What an experiment gave, as tables for a terminal and as numbers for a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.reproduction.protocols import EXPERIMENTS, Count, Experiment
from constrained_growth.experiments.reproduction.referee import (
    STEPS,
    Paired,
    agreement,
    drop,
    final_loss,
    paired,
    reached,
    same_share,
    saving,
    summary,
    work,
)
from constrained_growth.experiments.reproduction.runs import Array, Reproduction, Runs

ARMS = {
    "N1": "small network kept",
    "LImax": "largest sensitivity",
    "LImin": "smallest sensitivity",
    "random": "random site",
    "N2": "deep one, as coded",
    "N2fix": "deep one, right depth",
    "N1lr": "small network, learning rate as grown",
    "N2lr": "deep one, learning rate as grown",
    "recommended": "Fisher norm, warm-up",
}

PAIRS = (
    ("LImax", "N1"),
    ("LImax", "LImin"),
    ("LImax", "random"),
    ("LImax", "N2"),
    ("LImax", "N2fix"),
    ("LImax", "N1lr"),
    ("LImax", "N2lr"),
    ("recommended", "N1"),
    ("recommended", "LImax"),
    ("recommended", "N2fix"),
)

LEVELS = (0.5, 0.4, 0.3, 0.2, 0.1)
"""Training losses, in nats, to reach."""

EVERY = 25
"""Of the median curves every so many epochs are written."""


def overview() -> RenderableType:
    """What there is to reproduce."""
    table = Table("name", "what it stands for", "network", "epochs", "100 seeds on one core")
    for name, experiment in EXPERIMENTS.items():
        table.add_row(
            name,
            experiment.shows,
            f"{experiment.family} {list(experiment.widths)}",
            f"{experiment.before} + {experiment.after}",
            f"about {experiment.seconds} s",
        )
    kinds = "relu [8, 8], residual-outer [8, 8], convolution [4, 4]"
    images = "With and without insertion on images: --data digits, mnist1d or mnist."
    table.add_row("images", images, kinds, "20 + 40", "about 25 min")
    return table


def tables(found: Reproduction) -> RenderableType:
    """The final losses beside the reference's, the arms in pairs, and the effort."""
    parts: list[RenderableType] = [_finals(found)]
    parts += [_counts(found)] if found.experiment.counts else []
    parts += [_pairs(found), _effort(found)]
    if found.inserted_at:
        parts.append(_times(found))
    return Group(*parts)


def to_json(found: Reproduction, command: str) -> str:
    """Everything that the tables and pictures are made from, per seed where it is small."""
    experiment, arms = found.experiment, found.arms
    described = {
        key: value
        for key, value in asdict(experiment).items()
        if key not in ("data", "reference", "counts", "seconds", "chunk")
    }
    content: dict[str, Any] = {
        "experiment": experiment.name,
        "seeds": len(found.seeds),
        "first_seed": found.seeds[0],
        "command": command,
        "protocol": described,
        "arms": {name: _arm(runs) for name, runs in arms.items()},
        "reference": {name: asdict(r) for name, r in experiment.reference.items()},
        "agreement": {
            name: asdict(agreement(final_loss(arms[name]), reference))
            for name, reference in experiment.reference.items()
        },
        "counts": [asdict(c) | _counted(found, c) for c in experiment.counts],
        "pairs": [
            {"arms": pair, "after": after, **asdict(_compare(found, pair, after))}
            for pair in PAIRS
            for after in _moments(found, pair)
        ],
        "effort": _levels(found),
        "inserted_at": {
            str(epoch): {"final_loss": _list(final_loss(runs))}
            for epoch, runs in found.inserted_at.items()
        },
        "sensitivities": np.round(found.sensitivities, 8).tolist(),
        "trace": {
            "epochs": found.trace_epochs.tolist(),
            "median": np.round(np.median(found.trace, axis=1), 8).tolist(),
        },
    }
    return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False)


def _arm(runs: Runs) -> dict[str, Any]:
    low, median, high = np.quantile(runs.loss[::EVERY], [0.25, 0.5, 0.75], axis=1)
    curve = {"every": EVERY, "median": _list(median), "low": _list(low), "high": _list(high)}
    return {
        "final_loss": _list(final_loss(runs)),
        "test_error": _list(runs.test_error[-1]),
        "trained": runs.trained.tolist(),
        "site": runs.site.tolist(),
        "curve": curve,
    }


def _shown(found: Reproduction) -> dict[str, Runs]:
    """The arms without those that are others by another name."""
    twice = ("N1lr", "N2lr") if found.experiment.factor == 1 else ()
    return {name: runs for name, runs in found.arms.items() if name not in twice}


def _finals(found: Reproduction) -> Table:
    table = Table(
        "",
        "mean",
        "median (quartiles)",
        "reference: mean",
        "median (quartiles)",
        "p mean",
        "p median",
        "no test error",
        title=f"{found.experiment.name}, {len(found.seeds)} seeds: final training loss in nats",
    )
    for name, runs in _shown(found).items():
        ours, values = summary(final_loss(runs)), final_loss(runs)
        theirs = found.experiment.reference.get(name)
        cells = ["", "", "", ""]
        if theirs is not None:
            p = agreement(values, theirs)
            limits = theirs.quartiles
            spread = "" if limits is None else f" [{limits[0]:.3f}, {limits[1]:.3f}]"
            median = "" if theirs.median is None else f"{theirs.median:.3f}{spread}"
            cells = [f"{theirs.mean:.3f} (n = {theirs.runs})", median, _p(p.mean), _p(p.median)]
        done = (runs.test_error[-1] == 0).mean()
        table.add_row(
            f"{name}, {ARMS[name]}",
            f"{ours.mean:.3f}",
            f"{ours.median:.3f} [{ours.low:.3f}, {ours.high:.3f}]",
            *cells,
            f"{done:.0%}",
        )
    table.caption = "p: that both are draws from one population, by resampling ours."
    return table


def _counts(found: Reproduction) -> Table:
    table = Table("better", "than", "after", "ours", "reference", "p", title="How often")
    for count in found.experiment.counts:
        ours = _counted(found, count)
        table.add_row(
            *count.arms,
            _after(count.after),
            f"{ours['ours']}/{len(found.seeds)}",
            f"{count.held}/{count.runs}",
            _p(ours["p"]),
        )
    return table


def _counted(found: Reproduction, count: Count) -> dict[str, Any]:
    held, runs = _compare(found, count.arms, count.after).smaller, len(found.seeds)
    return {"ours": held, "p": same_share(held, runs, count.held, count.runs)}


def _pairs(found: Reproduction) -> Table:
    table = Table(
        "",
        "after",
        "mean difference (95 %)",
        "median (95 %)",
        "lower in",
        "equal",
        "p",
        title="Loss of the first arm − that of the second, seed by seed, in nats",
    )
    same = list[str]()
    for pair in PAIRS:
        if pair[1] not in _shown(found):
            continue
        compared = {after: _compare(found, pair, after) for after in _moments(found, pair)}
        if compared[None].equal == compared[None].runs:
            same.append(f"{pair[0]} and {pair[1]} are the same.")
            continue
        for after, p in compared.items():
            table.add_row(
                " − ".join(pair),
                _after(after),
                f"{p.mean:+.2g} {_between(p.interval)}",
                f"{p.median:+.2g} {_between(p.median_interval)}",
                f"{p.smaller}/{p.runs}",
                str(p.equal),
                _p(p.p),
            )
        table.add_section()
    test = "95 % bootstrap intervals; p of Wilcoxon's signed-rank test."
    table.caption = " ".join([test, *same])
    return table


def _moments(found: Reproduction, pair: tuple[str, str]) -> tuple[int | None, ...]:
    """After how many epochs to compare; networks that never were the same only at the end."""
    steps = () if pair[1].startswith("N2") else STEPS
    return (*(step for step in steps if step < found.experiment.after), None)


def _compare(found: Reproduction, pair: tuple[str, str], after: int | None) -> Paired:
    """Differences of the loss: after some epochs of its fall from the insertion, or at the end."""
    first, second = (found.arms[name] for name in pair)
    if after is None:
        return paired(final_loss(first), final_loss(second))
    epoch = found.experiment.before
    return paired(-drop(first, epoch, after), -drop(second, epoch, after))


def _levels(found: Reproduction) -> dict[str, Any]:
    """How many runs reach a loss, the median epochs and work to it, and the work of all epochs."""
    content: dict[str, Any] = {}
    for name, runs in found.arms.items():
        spent = work(runs, found.experiment, found.samples)
        rows = {}
        for level in LEVELS:
            epochs, cost = reached(runs, level), reached(runs, level, spent)
            rows[str(level)] = {
                "reached": float(np.isfinite(epochs).mean()),
                "epochs": _median(epochs),
                "multiply_adds": _median(cost),
            }
        content[name] = {"levels": rows, "multiply_adds": float(spent[-1].mean())}
    return content


def _effort(found: Reproduction) -> Table:
    small, grown, _ = (int(n) for n in found.arms["LImax"].operations)
    table = Table("", *(f"to {level} nats" for level in LEVELS), "all epochs, mean")
    table.title = "Share of runs that reach a loss; median epochs and 10⁶ multiply-adds to it"
    for name, content in _levels(found).items():
        if name not in _shown(found):
            continue
        cells = [
            f"{row['reached']:.0%}: {_count(row['epochs'])}, {_million(row['multiply_adds'])}"
            for row in content["levels"].values()
        ]
        table.add_row(name, *cells, _million(content["multiply_adds"]))
    table.caption = (
        "Runs that never get there count as ∞. The choice of the site is counted. Without it and "
        "without early stops, the multiply-adds saved against the final network from the start "
        f"would be {saving(found.experiment, small, grown):.1%}."
    )
    return table


def _times(found: Reproduction) -> Table:
    table = Table("inserted at epoch", "mean", "median (quartiles)", "lower than N1")
    table.title = "When to insert the layer of the largest sensitivity: final loss in nats"
    kept = final_loss(found.arms["N1"])
    for epoch, runs in found.inserted_at.items():
        values = final_loss(runs)
        s = summary(values)
        table.add_row(
            str(epoch),
            f"{s.mean:.3f}",
            f"{s.median:.3f} [{s.low:.3f}, {s.high:.3f}]",
            f"{(values < kept).sum()}/{len(kept)}",
        )
    return table


def _after(epochs: int | None) -> str:
    return "the end" if epochs is None else f"{epochs} epoch{'s' if epochs > 1 else ''}"


def _between(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"[{low:+.2g}, {high:+.2g}]"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _median(values: Array) -> float | None:
    """None where the median run never gets there."""
    found = float(np.sort(values)[len(values) // 2])
    return found if math.isfinite(found) else None


def _count(value: float | None) -> str:
    return "∞" if value is None else f"{value:.0f}"


def _million(value: float | None) -> str:
    return "∞" if value is None else f"{value / 1e6:.3g}"


def _list(values: Array) -> list[float]:
    return np.round(values.astype(float), 6).tolist()


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(experiment: Experiment) -> Text:
    """What is run, in a line or two."""
    batch = "all data at once" if experiment.batch is None else f"batches of {experiment.batch}"
    return Text(
        f"{experiment.name}: {experiment.shows} {experiment.family} "
        f"{list(experiment.widths)}, SGD, learning rate {experiment.lr}, × {experiment.factor} "
        f"after the insertion at epoch {experiment.before} of {experiment.epochs}, {batch}."
    )
