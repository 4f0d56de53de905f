"""Grow within your own training loop, by two calls."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from constrained_growth._arguments import instance
from constrained_growth._distributed import everywhere, several
from constrained_growth._later import Later, with_fields
from constrained_growth._sharding import is_sharded, reshard
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.placement import undoing
from constrained_growth._solve import solve
from constrained_growth.candidates import Candidate, find_candidates
from constrained_growth.errors import CheckpointError, DataError, TrainingError
from constrained_growth.insertion import GrowthRecord, insert, rewrap
from constrained_growth.insertion.preservation import first_input
from constrained_growth.insertion.training_state import (
    Copies,
    as_optimizers,
    check_optimizers,
    checked_copies,
    groups_and_states,
)
from constrained_growth.norms import MomentNorm
from constrained_growth.problem import GrowthProblem, checked_candidates, places_of
from constrained_growth.rules import Plateau, Rule, When
from constrained_growth.solution import Decision, Norm, Solution
from constrained_growth.training.arguments import (
    attributes_of,
    check_growing,
    check_parts,
    check_trained,
    stateful,
)
from constrained_growth.training.history import History, Round, count_layers, measurements

T = TypeVar("T")

Candidates = Sequence[Candidate] | Callable[[nn.Module], Sequence[Candidate]]
"""Candidates for every round, or a function that proposes them for the model as it is then."""

AfterInsertion = Callable[["Grower", Round], object]
"""Acts on `grower.optimizer` and on the parameters named in `round.new_parameters`."""

"""What may have a state that a resumed run goes on from."""


@dataclass(eq=False, repr=False)
class Grower:
    """Follows a training loop, and inserts layers when it is time to.

    Call `step(loss)` after each step of the optimizer, and `maybe_grow()` wherever the model may
    grow: at the end of an epoch but the last, or every k steps. It asks in the mode in which the
    model is, and, called within `torch.autocast`, in that precision.

    With `torch.distributed` all processes make one and call it alike. Losses are means over all
    processes, the first process's schedule and rule decide, every process inserts the same layers
    with the same values, and the wrappers (DistributedDataParallel, `fully_shard`) are updated,
    as by `rewrap`. An error on one process is an error on all.

    Args:
        model: Trained by the loop; grows in place.
        optimizer: The one that trains it, or several in a list (Muon and AdamW, say); they keep
            their state, and get the new parameters, as in `insert`. Not LBFGS.
        loss_fn: As for `GrowthProblem`.
        data: The data to decide on, as for `GrowthProblem`: the training data, or other data.
        rule: What to insert, as for `solve`; None (default) for the recommended decision.
        norm: How large a multiplier is, as for `solve`; None (default) for the recommended norm.
        when: When to ask: a `Plateau`, or `when(losses) -> bool` (or `When`) with the losses since
            the last insertion, one for each row of the history; None (default) for after every row.
        confirm: `confirm(solution) -> When`, such as `Exhausted()`, called before something is
            inserted, which happens on NOW only; NEVER ends all asking. None (default) for NOW.
        candidates: A sequence, offered every time; or `candidates(model)`, called every time;
            None (default) for `find_candidates` with the first input of `data`.
        max_insertions: Largest number of layers in all; None (default) for no limit.
        after_insertion: `after_insertion(grower, round)`, called after each insertion: the place
            for learning rates and the like of the new layers, such as `training.NewLayers()`.
            None (default) trains them as their neighbours. If it raises, the layers are in.
        solver: `solver(problem, rule) -> Solution`, which also chooses the norm, such as
            `functools.partial(cg.solve, validation=loader)`, to insert only what lowers the loss
            on data that are not trained on. None (default) for `solve`.
        writer: Logs the sensitivities and the depth at each round by `add_scalar(tag, value,
            step)`, as TensorBoard's `SummaryWriter` does. None (default) for no log.
        wrapper: The DistributedDataParallel around the model, where `model` is the module inside
            it; rebuilt in place after an insertion. None (default) where `model` is given as it
            is trained.
        averaged: Copies of the model that grow too, such as an `AveragedModel`, as in `insert`;
            the loop updates them.

    Attributes:
        history: Losses and decisions so far.
        record: The insertions so far, for `replay` and `checkpoint.save`.
        num_steps: Optimizer steps taken.

    Raises:
        TrainingError, DataError: An argument makes no sense.
        OptimizerError: An optimizer is none, trains another model, or cannot take new parameters.
        CandidateError: `averaged` is no copy of the model.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(3)]
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> grower = Grower(net, optimizer, nn.CrossEntropyLoss(), data, max_insertions=1)
        >>> for epoch in range(2):
        ...     for input, target in data:
        ...         optimizer.zero_grad()
        ...         loss = nn.functional.cross_entropy(net(input), target)
        ...         loss.backward()
        ...         optimizer.step()
        ...         grower.step(loss)
        ...     _ = grower.maybe_grow()
        >>> grower.history.steps, grower.history.rounds[0].chosen
        ([3, 6], ('1',))
    """

    model: nn.Module
    optimizer: Any  # an Optimizer, or a sequence of them
    loss_fn: Callable[[Any, Any], Tensor]
    data: Iterable[Any]
    _: KW_ONLY
    rule: Rule | None = None
    norm: Norm | MomentNorm | None = None
    when: Plateau | Callable[[Sequence[float]], bool | When] | None = None
    confirm: Callable[[Solution], When] | None = None
    candidates: Candidates | None = None
    max_insertions: int | None = None
    after_insertion: AfterInsertion | None = None
    solver: Callable[[GrowthProblem, Any], Solution] | None = None
    writer: Any = None
    wrapper: nn.Module | None = None
    averaged: Copies = ()

    def __post_init__(self) -> None:
        check_growing(self)
        instance("wrapper", self.wrapper, nn.Module, TrainingError, "that of model", optional=True)
        if not self.optimizers:
            raise TrainingError(f"optimizer={self.optimizer!r} is none; give those that train.")
        check_optimizers(self.model, self.optimizers, ())
        if isinstance(self.candidates, Sequence):
            places_of(self.model, checked_candidates(self.candidates))
        self._attributes = attributes_of(self)
        self.history = History()
        self.record = GrowthRecord((), parameter_shapes(self.model))
        self.num_steps = 0
        self._ended = False  # `when` or `confirm` has said NEVER
        self._sum: Tensor | float = 0.0  # of the losses of the row that is open, and their number
        self._count = 0
        self._started = time.perf_counter()

    def __repr__(self) -> str:
        return f"Grower({type(self.model).__name__}, {self.history!r})"

    @property
    def is_over(self) -> bool:
        """Whether no more decisions will be made.

        `max_insertions` is reached, or `when` or `confirm` has said NEVER.
        """
        return self._ended or self._room() <= 0

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer, or the several."""
        return as_optimizers(self.optimizer)

    def step(self, loss: Tensor | float) -> None:
        """Note the loss (a scalar) of an optimizer step, without waiting for the device."""
        if not isinstance(loss, Real) and not (isinstance(loss, Tensor) and loss.dim() == 0):
            raise TrainingError(f"loss={loss!r:.80} is not a number or a scalar tensor.")
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        self._sum = self._sum + loss
        self._count += 1
        self.num_steps += 1

    def observe(self, metrics: Mapping[str, float] | None = None) -> bool:
        """Close a row of the history as `maybe_grow` does, and say whether it is time to `ask`."""

        def row() -> tuple[float, int]:
            if not self._count:
                raise TrainingError("no step since the last row; call grower.step(loss) first.")
            return float(self._sum), self._count

        rows = everywhere(row, None)
        self.history.add(
            loss=sum(total for total, _ in rows) / sum(count for _, count in rows),
            step=self.num_steps,
            layers=count_layers(self.model),
            seconds=time.perf_counter() - self._started,
            metrics={} if metrics is None else metrics,
        )
        self._sum, self._count, self._started = 0.0, 0, time.perf_counter()
        answers = everywhere(lambda: (not self.is_over and self._is_time(), self._ended), None)
        due, self._ended = answers[0]
        return due

    def maybe_grow(self, metrics: Mapping[str, float] | None = None) -> Round | None:
        """Close a row of the history, and if it is time, ask the rule and insert what it chose.

        Args:
            metrics: Further numbers for the row.

        Returns:
            The decision (maybe to insert nothing), or None when it was not time to ask.

        Raises:
            TrainingError: There was no step since the last row.
            GrowthError: Whatever solving or inserting raises; model and optimizers are as they
                were, and the row is closed: to try again, call `ask`.
        """
        return self.ask() if self.observe(metrics) else None

    def ask(self) -> Round:
        """Ask the rule now, insert what it chose, and return the decision."""
        started = time.perf_counter()
        reshard(self.model)
        old = {id(parameter) for parameter in self.model.parameters()}
        models = [self.model, *checked_copies(self.model, self.averaged)]
        with undoing(models, *groups_and_states(self.optimizers)):
            solution, answer, record = self._everywhere(self._decide_and_insert)
        self.record = self.record + record
        sensitivities = solution.sensitivities
        errors: Any = Later(lambda _: {n: s.standard_error for n, s in sensitivities.items()})
        new_parameters = tuple(n for n, p in self.model.named_parameters() if id(p) not in old)
        self._rewrap()
        round = Round(
            when=answer.name,
            step=self.num_steps,
            epoch=len(self.history.losses),
            loss=solution.loss,
            stationarity=solution.stationarity,
            status=solution.status.name,
            sensitivities={name: s.value for name, s in sensitivities.items()},
            standard_errors=errors,
            sites={name: planned.after for name, planned in solution.candidates.items()},
            chosen=solution.decision.chosen,
            reason=solution.decision.reason,
            evidence=dict(solution.decision.evidence),
            new_parameters=new_parameters,
            layers=count_layers(self.model),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            seconds=time.perf_counter() - started,
        )
        self.history.rounds.append(round)
        self._ended = self._ended or answer is When.NEVER
        policy = self.after_insertion
        if round.chosen and policy is not None:
            self._everywhere(lambda: policy(self, round))
        if self.writer is not None:
            for tag, value in measurements(round).items():
                self.writer.add_scalar(tag, value, round.step)
        self._started = time.perf_counter()
        return round

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside model, optimizer and random state."""
        parts = stateful(self)
        for name, now in attributes_of(self).items():
            if name not in parts and now != self._attributes[name]:
                warnings.warn(
                    f"{name}={getattr(self, name)!r:.80} remembers something and has no state_dict "
                    "and load_state_dict: a run that is resumed would decide otherwise.",
                    stacklevel=2,
                )
        return {
            "num_steps": self.num_steps,
            "is_over": self._ended,
            "sum": self._sum,
            "count": self._count,
            "seconds": time.perf_counter() - self._started,
            "history": self.history.state_dict(),
            "record": self.record.to_json(),
            "parts": {name: part.state_dict() for name, part in parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the caller has grown the model and loaded its weights.

        Raises:
            CheckpointError: The state is that of other parts, or no state of a grower.
            OptimizerError: The optimizers train none of the layers inserted before.
        """
        parts = stateful(self)
        check_parts(state, parts)
        history = History()
        try:
            history.load_state_dict(state["history"])
            record = GrowthRecord.from_json(state["record"])
            total = state["sum"]
            loaded = {
                "_sum": total.clone() if isinstance(total, Tensor) else total,
                "_count": state["count"],
                "num_steps": state["num_steps"],
                "_ended": state["is_over"],
                "_started": time.perf_counter() - state["seconds"],
                "history": history,
                "record": record,
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"state is not that of a Grower: {error!r}.") from error
        check_trained(self.optimizers, (p for _, p in record.new_parameters(self.model)))
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        vars(self).update(loaded)
        if hasattr(self.after_insertion, "attach"):
            self.after_insertion.attach(self.model, self.optimizer)  # type: ignore[union-attr]

    def _rewrap(self) -> None:
        """Update the wrapper for what was inserted."""
        trained = self.model if self.wrapper is None else self.wrapper
        wrapped = any(isinstance(one, DistributedDataParallel) for one in trained.modules())
        if several(None) and not wrapped and not is_sharded(trained):
            warnings.warn(
                f"there are several processes, and {type(trained).__name__} is not wrapped: give a "
                "DistributedDataParallel around it as wrapper=, or gradients are not averaged.",
                stacklevel=4,
            )
        rewrap(trained, self.optimizers)

    def _everywhere(self, work: Callable[[], T]) -> T:
        """The result here of work done on all processes; an error on one is an error on all."""
        results: list[T] = []  # stays here: it need not be picklable
        everywhere(lambda: results.append(work()), None, collective=is_sharded(self.model))
        return results[0]

    def _decide_and_insert(self) -> tuple[Solution, When, GrowthRecord]:
        problem = GrowthProblem(self.model, self.loss_fn, self.data, self._proposed())
        # without a rule, or a confirmation, nobody looks at λ itself
        kept = self.rule is not None or self.confirm is not None
        solver = self.solver or partial(solve, norm=self.norm, multipliers=kept)
        solution = instance(
            f"solver={solver!r:.80}: what it returned",
            solver(problem, self.rule),
            Solution,
            TrainingError,
            "what cg.solve returns",
        )
        solution = with_fields(solution, decision=self._within_limit(solution.decision))
        confirm = self.confirm or (lambda _: When.NOW)
        answer = everywhere(lambda: confirm(solution), None)[0]
        instance(
            f"confirm={confirm!r:.80}: what it returned", answer, When, TrainingError, "a When"
        )
        if answer is not When.NOW:
            solution = with_fields(solution, decision=Decision((), answer.value))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model is wrapped")  # `_rewrap` comes next
            record = insert(self.model, solution, optimizer=self.optimizers, averaged=self.averaged)
        return solution, answer, record

    def _is_time(self) -> bool:
        if self.when is None:
            return True
        if isinstance(self.when, Plateau):
            answer: Any = self.when.update(self.history.losses[-1])
        else:
            since = max((round.epoch for round in self.history.insertions), default=0)
            answer = self.when(self.history.losses[since:])
        if isinstance(answer, When):
            self._ended = answer is When.NEVER
            return answer is When.NOW
        if answer not in (True, False):  # 1, NumPy's and tensors too
            raise TrainingError(
                f"when={self.when!r:.80} returned {answer!r:.80}; return True, False or a When."
            )
        return bool(answer)

    def _room(self) -> float:
        """How many layers may still be inserted."""
        most = math.inf if self.max_insertions is None else self.max_insertions
        return most - len(self.record.insertions)

    def _within_limit(self, decision: Decision) -> Decision:
        """The decision, with only as many of the chosen as there is room for."""
        room = max(0, self._room())
        if len(decision.chosen) <= room:
            return decision
        chosen = decision.chosen[: int(room)]
        values = {name: v for name, v in decision.values.items() if name in chosen}
        reason = f"{decision.reason}; {room} more of max_insertions={self.max_insertions}"
        return replace(decision, chosen=chosen, values=values, reason=reason)

    def _proposed(self) -> Sequence[Candidate]:
        if callable(self.candidates):
            return self.candidates(self.model)
        if self.candidates is not None:
            return self.candidates
        example = first_input(self.data, self.model)
        if example is None:
            raise DataError("data is empty; give at least one (input, target) batch.")
        return find_candidates(self.model, example)
