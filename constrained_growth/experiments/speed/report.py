"""The results of the benchmarks as a reader on a terminal sees them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.speed.benchmarks import (
    COLUMNS,
    Cell,
    MultiplierBenchmark,
    Target,
)
from constrained_growth.experiments.tables import titled
from constrained_growth.experiments.timing import Spread

WIDTH = 120
"""Characters in a line of the widest table."""

TITLES = {
    "feedforward": "Feedforward ReLU networks, an identity layer after every ReLU",
    "residual": "Residual networks, one more block with two weights (W₂ pinned) after every block",
    "others": "A residual ConvNet and a GPT, a residual candidate (W₂ pinned) after every block",
}

NETWORKS = {
    "convolutional": "ConvNet, 3 × 3",
    "pointwise": "ConvNet, 1 × 1",
    "transformer": "GPT",
}

HEADINGS = {
    "ratio": "multipliers",
    "with_stationarity": "… with ‖∇_θ L‖",
    "all_built_in": "all built in",
    "solve_without_stationarity": "solve(problem, stationarity=False)",
    "solve": "solve(problem)",
    "problem_and_solve": "solve(GrowthProblem(…))",
}


def multipliers(found: MultiplierBenchmark) -> RenderableType:
    """The machine, the tables, `solve` as a whole, and the targets."""
    return Group(
        Text(f"{found.machine}; seed {found.seed}.\n"),
        Text(
            "Times in ordinary gradient passes (zero_grad, forward, loss, backward of the same "
            "model on the same batches): median [quartiles] over the pairs. “All built in” is a "
            "network that holds all candidates, with gradients of the pinned parameters alone "
            "(and no standard errors); “λ differs” is ‖λ − λ′‖/‖λ′‖ against it, of the worst "
            "candidate.\n"
        ),
        *(_table(name, cells) for name, cells in found.tables.items()),
        Text(
            "The 3 × 3 candidates are a user's own, differentiated alone; all others have a "
            "closed form.\n"
        ),
        _whole(found.whole),
        _targets(found.targets()),
    )


def _table(name: str, cells: Sequence[Cell]) -> Table:
    samples = sorted({cell.samples for cell in cells})
    sizes = "depth", "width", "batch", "plain/ms"
    table = titled(
        f"{TITLES.get(name, name)}; {' to '.join(f'{n:,}' for n in samples)} samples",
        "network" if name == "others" else "",
        *sizes,
        *(HEADINGS[column] for column in COLUMNS),
        "pairs",
        "λ differs",
        width=WIDTH,
    )
    for cell in cells:
        table.add_row(
            NETWORKS.get(cell.network, ""),
            *map(str, (cell.depth, cell.width, cell.batch)),
            f"{cell.plain_ms:.1f}",
            *(_spread(cell.ratios[column]) for column in COLUMNS),
            str(cell.pairs),
            "" if cell.lambda_error is None else f"{cell.lambda_error:.0e}",
        )
    table.add_section()
    columns = [[cell.ratios[column].median for cell in cells] for column in COLUMNS]
    for label, of in (("geometric mean", statistics.geometric_mean), ("worst", max)):
        table.add_row(label, *[""] * len(sizes), *(_padded(of(values)) for values in columns))
    return table


def _whole(cell: Cell) -> Table:
    table = titled(
        f"solve as a whole: {cell.network}, depth {cell.depth}, width {cell.width}, "
        f"batch {cell.batch}; {cell.samples:,} samples, {cell.pairs} pairs",
        "",
        "in ordinary passes",
        width=WIDTH,
    )
    for name, spread in cell.ratios.items():
        table.add_row("multiplier pass" if name == "ratio" else HEADINGS[name], _spread(spread))
    return table


def _targets(targets: Sequence[Target]) -> Table:
    table = titled("Targets", "", "measured", "limit", "", width=WIDTH)
    for target in targets:
        met, style = ("met", None) if target.met else ("missed", "bold")
        table.add_row(target.what, f"{target.value:.3g}", f"{target.limit:g}", met, style=style)
    return table


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f} {spread.high:.2f}]"


def _padded(value: float) -> str:
    """The value where `_spread` has its median."""
    return f"{value:.2f}".ljust(len("0.00 [0.00 0.00]"))
