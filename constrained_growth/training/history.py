"""The record of a training run that grows: losses, metrics, decisions with their evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import nn

from constrained_growth._arguments import instance
from constrained_growth._extras import extra_packages
from constrained_growth._later import Later, ReadLater
from constrained_growth._tables import Table, as_html, as_text
from constrained_growth.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


_ROWS = 20
"""How many rows a printed history shows, besides those with an insertion."""


@dataclass(frozen=True)
class Round(ReadLater):
    """One decision where to grow, also one to insert nothing.

    Attributes:
        when: NOW; or LATER or NEVER where `confirm` ruled against inserting.
        step: Optimizer steps taken so far.
        epoch: Rows of the history so far: the decision came after the last of them.
        loss: L(θ, 0) on the data that decided.
        stationarity: ‖∇_θ L‖₂, or None if not asked for.
        status: Name of the solution's status.
        sensitivities: Candidate → ‖λ‖.
        standard_errors: Candidate → its standard error, NaN where unknown. They are computed when
            they are first read, which may take seconds: a checkpoint holds those that had been
            read by then, and NaN for others.
        sites: Candidate → qualified name of the module it would follow.
        chosen: Names of the candidates inserted, maybe none.
        reason: The decision's reason.
        evidence: The decision's evidence, as the rule gave it.
        new_parameters: Names of the new parameters in the model grown so far; a later insertion
            into the same list renumbers them, and `grower.record.new_parameters(model)` has the
            names of now.
        layers: Weight layers in the model afterwards (see `count_layers`).
        parameters: Parameters in the model afterwards.
        seconds: Time spent on solving and inserting.
    """

    when: str
    step: int
    epoch: int
    loss: float
    stationarity: float | None
    status: str
    sensitivities: Mapping[str, float]
    standard_errors: Mapping[str, float]
    sites: Mapping[str, str]
    chosen: tuple[str, ...]
    reason: str
    evidence: Mapping[str, Any]
    new_parameters: tuple[str, ...]
    layers: int
    parameters: int
    seconds: float


@dataclass(repr=False)
class History:
    """A training run in rows, one per epoch or per call of `Grower.maybe_grow`.

    Attributes:
        losses: Mean training loss over the steps of each row.
        steps: Optimizer steps taken at its end.
        layers: Weight layers in the model during it (see `count_layers`).
        seconds: Its duration, decisions excluded.
        metrics: Name → one number per row, NaN where it was not measured.
        rounds: Every decision, also those to insert nothing.

    Example:
        >>> history = History()
        >>> history.add(loss=0.7, step=10, layers=2, seconds=0.1, metrics={"accuracy": 0.5})
        >>> history, history.metrics
        (History(rows: 1, loss 0.7 to 0.7; inserted: nothing), {'accuracy': [0.5]})
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def __repr__(self) -> str:
        said = [f"{one.chosen or 'nothing'} after row {one.epoch}" for one in self.rounds]
        if len(said) > 5:
            said[5:] = [f"and {len(said) - 5} decisions more"]
        losses = [f"{loss:.3g}" for loss in (*self.losses[:1], *self.losses[-1:])]
        loss = f", loss {' to '.join(losses)}" if losses else ""
        return f"History(rows: {len(self.losses)}{loss}; inserted: {', '.join(said) or 'nothing'})"

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        """A summary and a table: all rows, or some between those with an insertion."""
        count, inserted = len(self.losses), self._inserted()
        step = max(1, math.ceil(count / _ROWS))
        shown = sorted({*range(1, count + 1, step), *inserted, count} & {*range(1, count + 1)})
        columns = {"step": self.steps, "loss": self.losses, **self.metrics}
        columns |= {"layers": self.layers, "seconds": self.seconds}
        rows = [
            (
                str(row),
                *(f"{values[row - 1]:.4g}" for values in columns.values()),
                f"+ {inserted[row]}" if row in inserted else "",
            )
            for row in shown
        ]
        if 0 in inserted:  # before the first step, as a model of which all was frozen
            rows.insert(0, ("0", *("" for _ in columns), f"+ {inserted[0]}"))
        heads = ("epoch", *columns, "inserted at its end")
        bold = [index for index, row in enumerate(rows) if row[-1]]
        decisions = f"{len(self.rounds)} decision{'s' if len(self.rounds) != 1 else ''}"
        summary = f"{count} epochs, {decisions}, {len(inserted)} with an insertion"
        summary += f"; {len(shown)} epochs shown" if len(shown) < count else ""
        table = Table(rows, heads, numbers=range(len(columns) + 1), bold=bold)
        return [summary, table] if rows else [summary]

    @property
    def insertions(self) -> list[Round]:
        """The rounds in which something was inserted."""
        return [round for round in self.rounds if round.chosen]

    def predictions(self) -> tuple[list[float], list[float]]:
        """Predicted and actual decreases of the loss where the rule tried its step."""
        evidence = [round.evidence for round in self.rounds]
        tried = [e for e in evidence if "predicted" in e and "actual" in e]
        return [e["predicted"] for e in tried], [e["actual"] for e in tried]

    def add(
        self, *, loss: float, step: int, layers: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        """Append a row."""
        instance("metrics", metrics, Mapping, TrainingError, "a dict of numbers")
        for name, value in {"loss": loss, "step": step, "seconds": seconds, **metrics}.items():
            instance(name, value, Real, TrainingError, "a number")
        for name in metrics:
            self.metrics.setdefault(name, [float("nan")] * len(self.losses))
        for name, values in self.metrics.items():
            values.append(float(metrics.get(name, "nan")))
        self.losses.append(loss)
        self.steps.append(step)
        self.layers.append(layers)
        self.seconds.append(seconds)

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, indexed by epoch from 1; needs pandas.

        Columns: step, loss, the metrics, layers, seconds, and the names `inserted` at the end of
        the epoch, separated by commas (empty for nothing).
        """
        with extra_packages():
            import pandas

        epochs = pandas.RangeIndex(1, len(self.losses) + 1, name="epoch")
        columns = {"step": self.steps, "loss": self.losses, **self.metrics}
        frame = pandas.DataFrame(columns, index=epochs)
        names = [self._inserted().get(epoch, "") for epoch in epochs]
        return frame.assign(layers=self.layers, seconds=self.seconds, inserted=names)

    def plot(self) -> Figure:
        """`plotting.plot_run`: loss and insertions above the sensitivities.

        Needs the extra `plot`.
        """
        from constrained_growth.plotting import plot_run

        return plot_run(
            self.losses,
            self._inserted(),
            {round.epoch: round.sensitivities for round in self.rounds},
            {round.epoch: round.chosen for round in self.rounds},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain data; standard errors that were never read are NaN in it."""
        rounds = [asdict(_without_unread(one)) for one in self.rounds]
        return {**asdict(replace(self, rounds=[])), "rounds": rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; a CheckpointError for anything else."""
        given = instance("state", state, Mapping, CheckpointError, "what state_dict returned")
        if given.keys() != {one.name for one in fields(self)}:
            raise CheckpointError(f"state has {sorted(given)}; give what state_dict returned.")
        for name, value in state.items():
            setattr(self, name, value)
        self.rounds = [Round(**one) for one in state["rounds"]]

    def _inserted(self) -> dict[int, str]:
        return {round.epoch: ", ".join(round.chosen) for round in self.insertions}


def _without_unread(round: Round) -> Round:
    unknown = dict.fromkeys(round.sensitivities, math.nan)
    # the attributes as they are: reading a field would compute it
    known: dict[str, Any] = {
        name: unknown if isinstance(v, Later) else v for name, v in vars(round).items()
    }
    return Round(**known)


def measurements(round: Round) -> dict[str, float]:
    """The numbers of a round, tagged for a logger; a stationarity that is unknown is left out."""
    found = {
        **{f"sensitivity/{name}": value for name, value in round.sensitivities.items()},
        "inserted": float(len(round.chosen)),
        "layers": float(round.layers),
        "parameters": float(round.parameters),
        "loss": round.loss,
        "stationarity": round.stationarity,
    }
    return {f"growth/{name}": value for name, value in found.items() if value is not None}


def count_layers(model: nn.Module) -> int:
    """The number of weight layers: modules that own a parameter of two or more dimensions.

    Raises:
        TrainingError: `model` is no `nn.Module`.

    Example:
        >>> count_layers(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
        2
    """
    instance("model", model, nn.Module, TrainingError, "an nn.Module")
    return sum(
        any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
