"""What an experiment gave: numbers for a file, and from these the tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import stats

from constrained_growth.experiments.reproduction.protocols import EXPERIMENTS, Count, Experiment
from constrained_growth.experiments.reproduction.runs import (
    Array,
    Reproduction,
    Runs,
    drop,
    final_loss,
    reached,
    saved,
    work,
)
from constrained_growth.experiments.statistics import Paired, Spread, agreement, paired, same_share
from constrained_growth.experiments.tables import interval, number, tabled

Content = Mapping[str, Any]

ARMS = {
    "N1": "small network kept",
    "LImax": "largest sensitivity",
    "LImin": "smallest sensitivity",
    "random": "random site",
    "N2": "deep one, as coded",
    "N2fix": "deep one, right depth",
    "N1lr": "small network, learning rate as grown",
    "N2lr": "deep one, learning rate as grown",
    "recommended": "our decision, warm-up",
}

PAIRS = (
    *(("LImax", other) for other in ("N1", "LImin", "random", "N2", "N2fix", "N1lr", "N2lr")),
    *(("recommended", other) for other in ("N1", "LImax", "N2fix")),
)

STEPS = (1, 10, 100)
"""Arms are compared after this many epochs (steps, on all data at once), and at the end."""

LEVELS = (0.5, 0.4, 0.3, 0.2, 0.1)
"""Training losses, in nats, to reach."""

EVERY = 25
"""Median curves are written every 25 epochs, and those of up to 100 epochs at each epoch."""

SIGNIFICANT = 0.05


def overview() -> RenderableType:
    """What there is to reproduce."""
    rows = [
        (
            name,
            experiment.shows,
            f"{experiment.family} {list(experiment.widths)}",
            f"{experiment.before} + {experiment.after}",
            f"about {experiment.seconds} s",
        )
        for name, experiment in EXPERIMENTS.items()
    ]
    images = "With and without insertion on images: --data digits or mnist1d."
    kinds = "relu [8, 8], residual-outer [8, 8], convolution [4, 4]"
    rows.append(("images", images, kinds, "20 + 40", "about 25 min"))
    table = Table("name", "what it stands for", "network", "epochs", "100 seeds on one core")
    for row in rows:
        table.add_row(*row)
    return table


def numbers(found: Reproduction) -> dict[str, Any]:
    """What the tables are made of, per seed where that is small; what `--json` writes."""
    experiment, arms = found.experiment, found.arms
    described = {
        key: value
        for key, value in asdict(experiment).items()
        if key not in ("data", "reference", "counts", "seconds", "chunk")
    }
    small, grown, _ = (int(n) for n in arms["LImax"].operations)
    return {
        "experiment": experiment.name,
        "seeds": len(found.seeds),
        "first_seed": found.seeds[0],
        "protocol": described,
        "arms": {name: _arm(runs) for name, runs in arms.items()},
        "reference": {name: asdict(r) for name, r in experiment.reference.items()},
        "agreement": {
            name: agreement(final_loss(arms[name]), r.runs, r.mean, r.median)
            for name, r in experiment.reference.items()
        },
        "counts": [asdict(c) | _counted(found, c) for c in experiment.counts],
        "pairs": [
            {"arms": list(pair), "after": after, **asdict(_compare(found, pair, after))}
            for pair in PAIRS
            for after in _moments(found, pair)
        ],
        "effort": {name: _effort(found, runs) for name, runs in arms.items()},
        "saved": saved(experiment, small, grown),
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


def _arm(runs: Runs) -> dict[str, Any]:
    every = EVERY if len(runs.loss) > 100 else 1
    low, median, high = np.quantile(runs.loss[::every], [0.25, 0.5, 0.75], axis=1)
    curve = {"every": every, "median": _list(median), "low": _list(low), "high": _list(high)}
    return {
        "final_loss": _list(final_loss(runs)),
        "test_error": _list(runs.test_error[-1]),
        "trained": runs.trained.tolist(),
        "site": runs.site.tolist(),
        "curve": curve,
    }


def _counted(found: Reproduction, count: Count) -> dict[str, Any]:
    held, runs = _compare(found, count.arms, count.after).smaller, len(found.seeds)
    return {"ours": held, "p": same_share(held, runs, count.held, count.runs)}


def _moments(found: Reproduction, pair: tuple[str, str]) -> tuple[int | None, ...]:
    """After how many epochs to compare; networks without a common start only at the end."""
    steps = () if pair[1].startswith("N2") else STEPS
    return (*(step for step in steps if step < found.experiment.after), None)


def _compare(found: Reproduction, pair: tuple[str, str], after: int | None) -> Paired:
    """Differences of the loss's fall some epochs after the insertion, or of the final loss."""
    first, second = (found.arms[name] for name in pair)
    if after is None:
        return paired(final_loss(first), final_loss(second))
    epoch = found.experiment.before
    return paired(-drop(first, epoch, after), -drop(second, epoch, after))


def _effort(found: Reproduction, runs: Runs) -> dict[str, Any]:
    """How many runs reach a loss, the median epochs and work to it, and the work of all epochs."""
    spent, rows = work(runs, found.experiment, found.samples), {}
    for level in LEVELS:
        epochs, cost = reached(runs, level), reached(runs, level, spent)
        rows[str(level)] = {
            "reached": float(np.isfinite(epochs).mean()),
            "epochs": _median(epochs),
            "multiply_adds": _median(cost),
        }
    return {"levels": rows, "multiply_adds": float(spent[-1].mean())}


def _median(values: Array) -> float | None:
    """None where the median run never gets there."""
    found = float(np.sort(values)[len(values) // 2])
    return found if math.isfinite(found) else None


def _list(values: Array) -> list[float]:
    return np.round(values.astype(float), 6).tolist()


def tables(found: Content) -> RenderableType:
    """The final losses beside the reference's, the arms in pairs, and the effort."""
    title = f"{found['experiment']}, {found['seeds']} seeds: final training loss in nats"
    finals = tabled(title, "", [(f"{n}, {ARMS[n]}", _final(found, n)) for n in _shown(found)])
    finals.caption = "p: that both are draws from one population, by resampling ours."
    counts = tabled("How often", "better", map(partial(_count, found["seeds"]), found["counts"]))
    efforts = tabled(
        "Share of runs that reach a loss; median epochs and 10⁶ multiply-adds to it",
        "",
        [(name, _effort_row(found["effort"][name])) for name in _shown(found)],
    )
    efforts.caption = (
        "Runs that never reach it count as ∞. The choice of the site is included. Without it and "
        "without early stops, the multiply-adds saved against the final network from the start "
        f"would be {found['saved']:.1%}."
    )
    times = tabled(
        "When to insert the layer of the largest sensitivity: final loss in nats",
        "inserted at epoch",
        _times(found),
    )
    shown = [finals, counts, _pairs(found), efforts, times]
    return Group(*(table for table in shown if table.row_count))


def _shown(found: Content) -> list[str]:
    """The arms without those that are the same as another."""
    twice = ("N1lr", "N2lr") if found["protocol"]["factor"] == 1 else ()
    return [name for name in found["arms"] if name not in twice]


def _final(found: Content, name: str) -> dict[str, str]:
    arm, theirs = found["arms"][name], found["reference"].get(name)
    row = _mean_and_spread(arm)
    if theirs is not None:
        p, limits = found["agreement"][name], theirs["quartiles"]
        spread = f" [{limits[0]:.3f} {limits[1]:.3f}]" if limits else ""
        row |= {
            "reference: mean": f"{theirs['mean']:.3f} (n = {theirs['runs']})",
            "reference: median": ""
            if theirs["median"] is None
            else f"{theirs['median']:.3f}{spread}",
            "p mean": _p(p["mean"]),
            "p median": _p(p["median"]),
        }
    return row | {"no test error": f"{np.mean(np.array(arm['test_error']) == 0):.0%}"}


def _count(seeds: int, count: Content) -> tuple[str, dict[str, str]]:
    better, than = count["arms"]
    return better, {
        "than": than,
        "after": _after(count["after"]),
        "ours": f"{count['ours']}/{seeds}",
        "reference": f"{count['held']}/{count['runs']}",
        "p": _p(count["p"]),
    }


def _pairs(found: Content) -> Table:
    same, shown = list[str](), list[tuple[str, dict[str, str]]]()
    for pair in PAIRS:
        rows = [row for row in found["pairs"] if tuple(row["arms"]) == pair]
        if pair[1] not in _shown(found):
            continue
        if rows[-1]["equal"] == rows[-1]["runs"]:  # at the end
            same.append(f"{pair[0]} and {pair[1]} are the same.")
            continue
        for row in rows:
            cells = {
                "after": _after(row["after"]),
                "mean difference (95 %)": interval(row["mean"], *row["interval"], form="+.2g"),
                "median (95 %)": interval(row["median"], *row["median_interval"], form="+.2g"),
                "lower in": f"{row['smaller']}/{row['runs']}",
                "equal": str(row["equal"]),
                "p": _p(row["p"]),
            }
            shown.append((" − ".join(pair), cells))
    title = "Loss of the first arm − that of the second, seed by seed, in nats"
    table = tabled(title, "", shown, sections=True)
    test = "95 % bootstrap intervals; p of Wilcoxon's signed-rank test."
    table.caption = " ".join([test, *same])
    return table


def _effort_row(effort: Content) -> dict[str, str]:
    row = {
        f"to {level} nats": f"{one['reached']:.0%}: {number(one['epochs'], '.0f', '∞')}, "
        f"{_million(one['multiply_adds'])}"
        for level, one in effort["levels"].items()
    }
    return row | {"all epochs, mean": _million(effort["multiply_adds"])}


def _times(found: Content) -> Iterator[tuple[str, dict[str, str]]]:
    kept = np.array(found["arms"]["N1"]["final_loss"])
    for epoch, arm in found["inserted_at"].items():
        lower = (np.array(arm["final_loss"]) < kept).sum()
        yield epoch, _mean_and_spread(arm) | {"lower than N1": f"{lower}/{len(kept)}"}


def _mean_and_spread(arm: Content) -> dict[str, str]:
    spread = Spread.of(arm["final_loss"])
    return {
        "mean": f"{np.mean(arm['final_loss']):.3f}",
        "median (quartiles)": interval(spread.median, spread.low, spread.high, ".3f"),
    }


def _after(epochs: int | None) -> str:
    return "the end" if epochs is None else f"{epochs} epoch{'s' if epochs > 1 else ''}"


def _p(value: float | None) -> str:
    return number(value, ".2g", "")


def _million(value: float | None) -> str:
    return "∞" if value is None else f"{value / 1e6:.3g}"


def describe(experiment: Experiment) -> Text:
    """What is run, in a line or two."""
    batch = "all data at once" if experiment.batch is None else f"batches of {experiment.batch}"
    return Text(
        f"{experiment.name}: {experiment.shows} {experiment.family} "
        f"{list(experiment.widths)}, SGD, learning rate {experiment.lr}, × {experiment.factor} "
        f"after the insertion at epoch {experiment.before} of {experiment.epochs}, {batch}."
    )


def account(contents: Sequence[Content]) -> RenderableType:
    """All experiments in one table: the reference, the same protocol here, what is recommended.

    Below it, how many cells differ from the reference: with that many tests some would by chance,
    so p-values are also adjusted to the rate of false discoveries (Benjamini and Hochberg).
    """
    rows = list[tuple[str, dict[str, str]]]()
    for content in contents:
        for arm in (*content["reference"], "recommended"):
            loss = content["arms"][arm]["final_loss"]
            p = content["agreement"].get(arm, {})
            theirs = content["reference"].get(arm, {})
            cells = {
                "reference: n": str(theirs.get("runs", "")),
                "mean": number(theirs.get("mean"), ".3f", ""),
                "median": number(theirs.get("median"), ".3f", ""),
                "ours: n": str(len(loss)),
                "our mean": f"{np.mean(loss):.3f}",
                "our median": f"{np.median(loss):.3f}",
                "p mean": number(p.get("mean"), ".3f", ""),
                "p median": number(p.get("median"), ".3f", ""),
            }
            rows.append((f"{content['experiment']} {arm}", cells))
    tested = [p for content in contents for p in content["agreement"].values()]
    values = [p[of] for p in tested for of in ("mean", "median") if p[of] is not None]
    counts = [count["p"] for content in contents for count in content["counts"]]
    return Group(
        tabled("Final training loss in nats", "", rows),
        Text(_differences("means and medians", values)),
        Text(_differences("counts", counts)),
    )


def _differences(what: str, values: Sequence[float]) -> str:
    if not values:
        return f"No {what} to compare."
    below = sum(p < SIGNIFICANT for p in values)
    least = float(np.min(stats.false_discovery_control(values)))
    return (
        f"Of {len(values)} comparisons of {what} {below} have p < {SIGNIFICANT} (by chance "
        f"{SIGNIFICANT * len(values):.1f}); the smallest adjusted p is {least:.2g}."
    )
