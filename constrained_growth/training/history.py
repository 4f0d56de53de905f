"""What happened in a training run that grows: losses, metrics, decisions with their evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from constrained_growth.solution import Solution

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Round:
    """One time that was asked where to grow, whatever the answer was.

    Attributes:
        when: NOW; LATER or NEVER when the answer was that nothing is to be inserted yet, or ever.
        step: How many optimizer steps had been taken.
        epoch: How many rows the history had: the decision came after the last of them.
        loss: L(θ, 0) on the data that decided.
        stationarity: ‖∇_θ L‖₂, or None if not asked for.
        status: Name of the solution's status.
        sensitivities: Candidate → ‖λ‖.
        standard_errors: Candidate → its standard error, NaN where it cannot be known.
        sites: Candidate → qualified name of the module after which it would stand.
        chosen: Names of the candidates inserted, maybe none.
        reason: Of the decision.
        evidence: Of the decision, as the rule gave it.
        new_parameters: Names, in the grown model, of the parameters that it gained.
        layers: Weight layers in the model afterwards (see `count_layers`).
        parameters: Parameters in the model afterwards.
        seconds: What solving and inserting took.
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


@dataclass
class History:
    """A training run, row by row: one for each epoch, or whatever `Grower.maybe_grow` closes.

    Attributes:
        losses: Mean of the losses of the steps in a row.
        steps: How many optimizer steps had been taken at its end.
        layers: Weight layers in the model while it lasted (see `count_layers`).
        seconds: How long it took, decisions not included.
        metrics: Name → one number for each row, NaN where it was not measured.
        rounds: Every decision, also those to insert nothing.

    Example:
        >>> history = History()
        >>> history.add(loss=0.7, step=10, layers=2, seconds=0.1, metrics={"accuracy": 0.5})
        >>> history.losses, history.metrics
        ([0.7], {'accuracy': [0.5]})
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    @property
    def insertions(self) -> list[Round]:
        """The rounds in which something was inserted."""
        return [one for one in self.rounds if one.chosen]

    def predictions(self) -> tuple[list[float], list[float]]:
        """Predicted and actual decrease of the loss, of the rounds whose rule tried its step.

        They are what `plotting.plot_predictions` draws.
        """
        tried = [
            one.evidence for one in self.rounds if {"predicted", "actual"} <= set(one.evidence)
        ]
        return [e["predicted"] for e in tried], [e["actual"] for e in tried]

    def add(
        self, *, loss: float, step: int, layers: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        """Append a row."""
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

        Columns: step, loss, the metrics, layers, seconds, and what was `inserted` at the end of
        the epoch (names with commas between them, empty for nothing).
        """
        import pandas

        inserted = {one.epoch: ", ".join(one.chosen) for one in self.insertions}
        epochs = range(1, len(self.losses) + 1)
        return pandas.DataFrame(
            {
                "step": self.steps,
                "loss": self.losses,
                **self.metrics,
                "layers": self.layers,
                "seconds": self.seconds,
                "inserted": [inserted.get(epoch, "") for epoch in epochs],
            },
            index=pandas.Index(epochs, name="epoch"),
        )

    def plot(self) -> Figure:
        """The loss with the insertions marked, above the sensitivities over site and time.

        Needs matplotlib. `constrained_growth.plotting.runs` draws each of them on Axes of yours.
        """
        from constrained_growth.plotting import (
            plot_run,  # only here: matplotlib is not always installed
        )

        return plot_run(
            self.losses,
            {one.epoch: ", ".join(one.chosen) for one in self.insertions},
            {one.epoch: one.sensitivities for one in self.rounds},
            {one.epoch: one.chosen for one in self.rounds},
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)
        self.rounds = [Round(**one) for one in state["rounds"]]


class Writer(Protocol):
    """What takes numbers for a picture on the way: TensorBoard's `SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Note one number at one step."""
        ...


def round_of(
    solution: Solution,
    model: nn.Module,
    *,
    when: str,
    step: int,
    epoch: int,
    new_parameters: tuple[str, ...],
    seconds: float,
) -> Round:
    """The round of a solution that was just inserted into the model."""
    return Round(
        when=when,
        step=step,
        epoch=epoch,
        loss=solution.loss,
        stationarity=solution.stationarity,
        status=solution.status.name,
        sensitivities={name: s.value for name, s in solution.sensitivities.items()},
        standard_errors={name: s.standard_error for name, s in solution.sensitivities.items()},
        sites={name: planned.after for name, planned in solution.candidates.items()},
        chosen=solution.decision.chosen,
        reason=solution.decision.reason,
        evidence=dict(solution.decision.evidence),
        new_parameters=new_parameters,
        layers=count_layers(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
    )


def measurements(one: Round) -> dict[str, float]:
    """The numbers of a round under tags for a logger: sensitivities, insertions, depth.

    `growth/sensitivity/…` has one entry for each candidate; `growth/inserted` says how many were
    chosen, `growth/layers` and `growth/parameters` how large the model is then.
    """
    found = {f"growth/sensitivity/{name}": value for name, value in one.sensitivities.items()}
    found["growth/inserted"] = float(len(one.chosen))
    found["growth/layers"] = float(one.layers)
    found["growth/parameters"] = float(one.parameters)
    found["growth/loss"] = one.loss
    if one.stationarity is not None:
        found["growth/stationarity"] = one.stationarity
    return found


def count_layers(model: nn.Module) -> int:
    """How many weight layers: modules with a matrix, or a tensor of more dimensions, of their own.

    Example:
        >>> count_layers(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
        2
    """
    return sum(
        any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
