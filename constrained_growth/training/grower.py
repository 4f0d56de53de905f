"""Growing within a training loop of one's own: two calls."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from constrained_growth._distributed import everywhere, several
from constrained_growth._sharding import is_sharded, reshard
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import untouched
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.candidates.discovery import find_candidates
from constrained_growth.errors import DataError, TrainingError
from constrained_growth.insertion.distributed import rewrap
from constrained_growth.insertion.insert import insert
from constrained_growth.insertion.layer import structure_kept_on_error
from constrained_growth.insertion.optimizer_state import groups_kept_on_error
from constrained_growth.insertion.record import GrowthRecord
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Rule, TopK
from constrained_growth.rules.plateau import When
from constrained_growth.solution import Decision, Solution
from constrained_growth.solve import solve
from constrained_growth.training.history import (
    History,
    Round,
    Writer,
    count_layers,
    measurements,
    round_of,
)

Candidates = Sequence[Candidate] | Callable[[nn.Module], Sequence[Candidate]]
"""Candidates for every round, or a function that proposes them for the model as it is then."""


@runtime_checkable
class Watch(Protocol):
    """What watches the losses and says when to ask, such as `Plateau`."""

    def update(self, loss: float, /) -> When:
        """Take note of the loss of a row of the history, and say when."""
        ...


Schedule = Watch | Callable[[Sequence[float]], bool]
"""When to ask: a `Watch`, or a function of the losses since the last insertion, a row each."""


class AfterInsertion(Protocol):
    """What is done to optimizer and model right after an insertion; a plain function fits."""

    def __call__(self, grower: Grower, one: Round, /) -> object:
        """Act on `grower.optimizer` and on the parameters named in `one.new_parameters`."""
        ...


_TOP_ONE = TopK(1)


class Grower:
    """Watches a training loop, and inserts layers when it is time to.

    Call `step(loss)` after each step of the optimizer, and `maybe_grow()` where growing fits: at
    the end of an epoch, or every so many steps.

    With `torch.distributed` all processes make one and call the same of it: the losses are the
    means over all of them, the first process's schedule and rule count, every process inserts the
    same layers with the same values, and the wrappers (DistributedDataParallel, `fully_shard`)
    are told, as by `rewrap`. An error on one process is an error on all.

    Args:
        model: Trained by the loop; grows in place.
        optimizer: The one that trains it; keeps its memory, and gets the new parameters.
        loss_fn: As for `GrowthProblem`.
        data: What decides, as for `GrowthProblem`: the training data, a part of them, or others.
        rule: What to insert, as for `solve`; `TopK(1)` by default.
        when: When to ask: a `Plateau`, or `when(losses) -> bool` with the losses since the last
            insertion, one for each row of the history; None (default) for after every row.
        confirm: `confirm(solution) -> When`, such as `Exhausted()`: asked before something is
            inserted, which is done on NOW only; NEVER ends all asking. None (default) for NOW.
        candidates: A sequence, offered every time; or `candidates(model)`, asked every time; None
            (default) for `find_candidates` with the first input of `data`.
        max_insertions: How many layers in all; None (default) for any number.
        after_insertion: `after_insertion(grower, round)`, called after each insertion: the place
            for learning rates and the like of the new layers, such as `training.NewLayers()`.
            None (default) for nothing: they are trained as their neighbours are.
        solver: `solver(problem, rule) -> Solution`; `solve` by default. With
            `functools.partial(cg.solve, norm=…, sampling=…)` it is solved otherwise.
        writer: Gets the sensitivities and the depth at each round (`add_scalar(tag, value,
            step)`), such as TensorBoard's `SummaryWriter`. None (default) for nobody.
        wrapper: The DistributedDataParallel around the model, where `model` is what is inside it,
            as Accelerate's `prepare` returns it; made anew where it is after an insertion. None
            (default) where `model` is given as it is trained.

    Attributes:
        history: Losses and decisions so far.
        record: The insertions so far, for `replay` and `checkpoint.save`.
        num_steps: How many steps the optimizer has taken.
        is_over: Whether there will be no more asking: `max_insertions` are reached, or `when` or
            `confirm` has said NEVER.

    Raises:
        TrainingError: An argument makes no sense.

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

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[Any],
        *,
        rule: Rule = _TOP_ONE,
        when: Schedule | None = None,
        confirm: Callable[[Solution], When] | None = None,
        candidates: Candidates | None = None,
        max_insertions: int | None = None,
        after_insertion: AfterInsertion | None = None,
        solver: Callable[[GrowthProblem, Rule], Solution] = solve,
        writer: Writer | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        _check(confirm=confirm, after_insertion=after_insertion, solver=solver)
        if not (when is None or isinstance(when, Watch) or callable(when)):
            raise TrainingError(
                f"when={when!r} has no update(loss), and cannot be called either; give a "
                "Plateau(), a function of the losses, or None."
            )
        if max_insertions is not None and not max_insertions >= 0:
            raise TrainingError(f"max_insertions={max_insertions!r} must not be negative.")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.data = data
        self.rule = rule
        self.when = when
        self.confirm = confirm
        self.candidates = candidates
        self.max_insertions = max_insertions
        self.after_insertion = after_insertion
        self.solver = solver
        self.writer = writer
        self.wrapper = wrapper
        self.history = History()
        self.record = GrowthRecord((), parameter_shapes(model))
        self.num_steps = 0
        self.is_over = max_insertions == 0
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._begun = time.perf_counter()

    def step(self, loss: Tensor | float) -> None:
        """Note the loss of a step of the optimizer, without asking the device for its value yet.

        Args:
            loss: A scalar.
        """
        if isinstance(loss, Tensor):
            loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        self._sum = self._sum + loss
        self._count += 1
        self.num_steps += 1

    def observe(self, metrics: Mapping[str, float] | None = None) -> bool:
        """Close a row of the history with the mean loss of the steps since the last one.

        Args:
            metrics: Further numbers for the row.

        Returns:
            Whether it is time to `ask`.

        Raises:
            TrainingError: There was no step since the last row.
        """
        rows = everywhere(self._row, None)
        self.history.add(
            loss=sum(total for total, _ in rows) / sum(count for _, count in rows),
            step=self.num_steps,
            layers=count_layers(self.model),
            seconds=time.perf_counter() - self._begun,
            metrics=metrics or {},
        )
        self._sum, self._count, self._begun = 0.0, 0, time.perf_counter()
        answers = everywhere(lambda: (not self.is_over and self._is_time(), self.is_over), None)
        due, self.is_over = answers[0]
        return due

    def maybe_grow(self, metrics: Mapping[str, float] | None = None) -> Round | None:
        """Close a row of the history, and if it is time to, ask the rule and insert what it chose.

        Args:
            metrics: Further numbers for the row.

        Returns:
            What was decided (maybe nothing), or None when it was not time to ask.

        Raises:
            TrainingError: There was no step since the last row.
            GrowthError: What solving or inserting raises.
        """
        return self.ask() if self.observe(metrics) else None

    def ask(self) -> Round:
        """Ask the rule now, and insert what it chose.

        Returns:
            What was decided, maybe nothing.
        """
        began = time.perf_counter()
        reshard(self.model)
        old = {id(parameter) for parameter in self.model.parameters()}
        found: list[tuple[Solution, When, GrowthRecord]] = []
        with ExitStack() as undo:
            undo.enter_context(structure_kept_on_error(self.model))
            undo.enter_context(groups_kept_on_error(self.optimizer))
            self._everywhere(lambda: _done(found.append(self._decide_and_insert())))
        solution, answer, record = found[0]
        self.record = self.record + record
        new_parameters = tuple(n for n, p in self.model.named_parameters() if id(p) not in old)
        self._rewrap()
        one = round_of(
            solution,
            self.model,
            when=answer.name,
            step=self.num_steps,
            epoch=len(self.history.losses),
            new_parameters=new_parameters,
            seconds=time.perf_counter() - began,
        )
        self.history.rounds.append(one)
        inserted = len(self.record.insertions)
        self.is_over = answer is When.NEVER or (
            self.max_insertions is not None and inserted >= self.max_insertions
        )
        policy = self.after_insertion
        if one.chosen and policy is not None:
            self._everywhere(lambda: _done(policy(self, one)))
        if self.writer is not None:
            for tag, value in measurements(one).items():
                self.writer.add_scalar(tag, value, one.step)
        self._begun = time.perf_counter()
        return one

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside model, optimizer and random state."""
        return {
            "num_steps": self.num_steps,
            "is_over": self.is_over,
            "sum": self._sum,
            "count": self._count,
            "seconds": time.perf_counter() - self._begun,
            "history": self.history.state_dict(),
            "record": self.record.to_json(),
            "parts": {name: part.state_dict() for name, part in self._stateful().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model is grown and loaded by the caller."""
        self.num_steps = state["num_steps"]
        self.is_over = state["is_over"]
        total = state["sum"]
        self._sum = total.clone() if isinstance(total, Tensor) else total
        self._count = state["count"]
        self._begun = time.perf_counter() - state["seconds"]
        self.history.load_state_dict(state["history"])
        self.record = GrowthRecord.from_json(state["record"])
        for name, part in self._stateful().items():
            part.load_state_dict(state["parts"][name])
        if hasattr(self.after_insertion, "watch"):
            self.after_insertion.watch(self.model, self.optimizer)  # type: ignore[union-attr]

    def _rewrap(self) -> None:
        """Let the wrapper know what was inserted."""
        trained = self.model if self.wrapper is None else self.wrapper
        wrapped = any(isinstance(one, DistributedDataParallel) for one in trained.modules())
        if several(None) and not wrapped and not is_sharded(trained):
            warnings.warn(
                f"there are several processes, and {type(trained).__name__} is wrapped neither in "
                "DistributedDataParallel nor by fully_shard: if one is around it, give that as "
                "wrapper=, or the gradients of new layers are not averaged.",
                stacklevel=4,
            )
        rewrap(trained, self.optimizer)

    def _everywhere(self, work: Callable[[], None]) -> None:
        """Do it on all processes; an error on one is an error on all."""
        everywhere(work, None, collective=is_sharded(self.model))

    def _decide_and_insert(self) -> tuple[Solution, When, GrowthRecord]:
        problem = GrowthProblem(self.model, self.loss_fn, self.data, self._proposed())
        solution = self.solver(problem, self.rule)
        solution = replace(solution, decision=self._within_limit(solution.decision))
        confirm = self.confirm or (lambda _: When.NOW)
        answer = everywhere(lambda: confirm(solution), None)[0]
        if answer is not When.NOW:
            solution = replace(solution, decision=Decision((), answer.value))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model is wrapped")  # and wrapped anew next
            return solution, answer, insert(self.model, solution, optimizer=self.optimizer)

    def _row(self) -> tuple[float, int]:
        """The sum of the losses since the last row, and of how many."""
        if not self._count:
            raise TrainingError(
                "maybe_grow: there was no step since the last row of the history; call "
                "grower.step(loss) after optimizer.step()."
            )
        return float(self._sum), self._count

    def _is_time(self) -> bool:
        if self.when is None:
            return True
        if isinstance(self.when, Watch):
            answer = self.when.update(self.history.losses[-1])
            self.is_over = answer is When.NEVER
            return answer is When.NOW
        since = max((one.epoch for one in self.history.insertions), default=0)
        return bool(self.when(self.history.losses[since:]))

    def _within_limit(self, decision: Decision) -> Decision:
        """The first of the chosen, as many as there may still be."""
        if self.max_insertions is None:
            return decision
        room = self.max_insertions - len(self.record.insertions)
        if len(decision.chosen) <= room:
            return decision
        chosen = decision.chosen[:room]
        values = {name: v for name, v in decision.values.items() if name in chosen}
        reason = f"{decision.reason}; {room} more of max_insertions={self.max_insertions}"
        return replace(decision, chosen=chosen, values=values, reason=reason)

    def _stateful(self) -> dict[str, Any]:
        """Those of rule, schedule and policy that remember something."""
        parts = {"rule": self.rule, "when": self.when, "after_insertion": self.after_insertion}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _proposed(self) -> Sequence[Candidate]:
        if self.candidates is None:
            return find_candidates(self.model, self._first_input())
        if callable(self.candidates):
            return self.candidates(self.model)
        return self.candidates

    def _first_input(self) -> object:
        with untouched(self.model, self.data):
            for batch in self.data:
                return batch[0]
        raise DataError("data is empty; give at least one (input, target) batch.")


def _done(_: object) -> None:
    """Nothing, which can be sent to other processes."""


def _check(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TrainingError(f"{name}={function!r} cannot be called; give a function, or None.")
