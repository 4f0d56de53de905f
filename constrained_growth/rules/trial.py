"""One candidate by short real trainings: successive halving, inserting nothing among them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth._data import batch_size, batch_weight, batches
from constrained_growth._distributed import several
from constrained_growth._sites.context import takes_context
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.curvature import FORWARD_PASSES, stand
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.protocol import OptimizerFactory
from constrained_growth.solution import Decision, Planned, Solution

NOTHING = "(nothing)"
"""What inserting nothing is called in the evidence."""


@dataclass(frozen=True)
class Trial:
    """The candidate that really trains best for a while, if it beats inserting nothing.

    Every candidate is put into a copy of the model at its pin, where it does nothing, and all
    copies are trained on the same batches with the same random numbers; a copy without a new
    layer is among them. By successive halving the best 1/η of the candidates train on η times as
    long, until one is left, and it and the copy without a new layer have made `steps` steps. The
    candidate is chosen if its loss is below that of inserting nothing by more than `margin`
    standard errors. The model itself, its optimizer and the random state never change.

    Args:
        steps: How many steps the last ones make.
        optimizer: The optimizer that trains the model now, whose state a trial starts from (new
            parameters join with the settings of its last group); or a function from parameters to
            a fresh optimizer, such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        eta: η; 3 as in the source. Infinite: all of them make all the steps.
        repeats: How often each trial is repeated with batches in another order (a list of batches
            is shuffled, a DataLoader iterated again), so that luck averages out.
        margin: In standard errors of the difference: over the repeats, or over the batches it is
            evaluated on where there is one repeat. 0 takes any difference.
        data: What the loss is compared on, batches as in a problem; the problem's by default.
        seed: Of the order of a list of batches.
        progress: Progress bar: True, False, or None (default) for one on a terminal when it takes
            longer than a second.

    Raises:
        RuleError: An argument is out of range, the optimizer is not the model's, or there are
            several processes.

    Source:
        Jamieson and Talwalkar, *Non-stochastic best arm identification and hyperparameter
        optimization*, 2016, arXiv 1502.07943.

    Example:
        >>> import functools
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(4)]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> rule = Trial(20, functools.partial(torch.optim.SGD, lr=0.1))
        >>> sorted(cg.solve(problem, rule=rule).decision.evidence["losses"])
        ['(nothing)', '1']
    """

    steps: int
    optimizer: torch.optim.Optimizer | OptimizerFactory
    eta: float = 3.0
    repeats: int = 1
    margin: float = 2.0
    data: Iterable[Any] | None = None
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RuleError(f"{name}={value!r} of Trial is not a positive whole number.")
        if not self.eta > 1:
            raise RuleError(f"eta={self.eta!r} of Trial must be above 1, such as 3.")
        if not self.margin >= 0:
            raise RuleError(f"margin={self.margin!r} of Trial must not be negative.")
        if not (callable(self.optimizer) or isinstance(self.optimizer, torch.optim.Optimizer)):
            raise RuleError(
                f"optimizer={self.optimizer!r} of Trial is neither an optimizer nor a function "
                "that makes one; give functools.partial(torch.optim.SGD, lr=0.1), say."
            )

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The winner, or nothing."""
        self._check(problem)
        names = tuple(solution.sensitivities)
        if not names:
            return Decision((), "no candidates")
        evaluation = problem.data if self.data is None else self.data
        with untouched(problem.model, problem.data, evaluation), differentiable():
            arena = _Arena(self, problem, evaluation, solution.num_samples)
            left = {name: arena.entered(solution.candidates[name]) for name in names}
            nothing = arena.entered(None)
            schedule = lengths(len(names), self.steps, self.eta)
            rungs, scores, done = [], {}, 0
            for length in schedule:
                arena.train({**left, NOTHING: nothing}, length - done)
                done = length
                scores = {
                    name: arena.losses(replicas)
                    for name, replicas in {**left, NOTHING: nothing}.items()
                }
                means = {name: score.mean() for name, score in scores.items()}
                rungs.append({"steps": done, "losses": _plain(means)})
                keep = 1 if length == schedule[-1] else kept(len(left), self.eta)
                best = sorted(left, key=lambda name: means[name])[:keep]
                left = {name: replicas for name, replicas in left.items() if name in best}
        (winner,) = left
        found = compared(scores[winner], scores[NOTHING])
        return self._decision(winner, found, rungs, arena.passes)

    def _decision(
        self, winner: str, found: Comparison, rungs: list[dict[str, Any]], passes: float
    ) -> Decision:
        evidence = {
            "winner": winner,
            "gain": found.gain if math.isfinite(found.gain) else None,
            "standard_error": found.error if math.isfinite(found.error) else None,
            "losses": rungs[-1]["losses"],
            "rungs": rungs,
            "passes": passes,
        }
        noise = self.margin * found.error if math.isfinite(found.error) else 0.0
        if found.gain > noise:
            reason = f"{self.steps} steps on, lower by {found.gain:.3g} ± {found.error:.2g}"
            return Decision((winner,), reason, {}, evidence)
        if found.gain < -noise or math.isnan(found.gain):
            reason = f"inserting nothing is better by {-found.gain:.3g} ± {found.error:.2g}"
        else:
            reason = f"no better than inserting nothing: {found.gain:.3g} ± {found.error:.2g}"
        return Decision((), reason, {}, evidence)

    def _check(self, problem: GrowthProblem) -> None:
        if several(problem.group):
            raise RuleError(
                "Trial: several processes cannot train trials together yet; make the problem with "
                "group=None on one of them, or take another rule."
            )
        if isinstance(self.optimizer, torch.optim.Optimizer):
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if trained.isdisjoint(id(p) for p in problem.model.parameters()):
                raise RuleError(
                    "optimizer of Trial trains none of the parameters of the model; give the one "
                    "that does, or a function that makes one."
                )


@dataclass(frozen=True)
class Replica:
    """One copy of the model, with or without a new layer, and what trains it.

    Attributes:
        model: The copy.
        optimizer: Of its parameters and those of the new layer.
        modes: All modules, and whether they were in training mode at the start. They are trained
            in these modes, or all in training mode where the model was not.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    modes: tuple[tuple[nn.Module, bool], ...]


@dataclass(frozen=True)
class Losses:
    """What replicas of one candidate have come to.

    Attributes:
        values: Loss on each batch of the evaluation, shape (repeats, batches).
        weights: Share of the samples that each batch has.
    """

    values: np.ndarray
    weights: np.ndarray

    def mean(self) -> float:
        """Over all samples and repeats; infinite where it is not a number."""
        mean = float((self.values @ self.weights).mean())
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Comparison:
    """By how much one loss is below another, and how sure that is.

    Attributes:
        gain: The difference.
        error: Its standard error, over the repeats or else over the batches; NaN when there is
            one of both.
    """

    gain: float
    error: float


def compared(losses: Losses, others: Losses) -> Comparison:
    """How far some losses are below others, which saw the same batches.

    The standard error is that of the mean of paired differences: over the repeats if there are
    several, else over the batches, weighted by their samples.
    """
    gain = others.mean() - losses.mean()
    differences = others.values - losses.values
    weights = losses.weights
    repeats, number = differences.shape
    if repeats > 1:
        each = differences @ weights
        return Comparison(gain, float(each.std(ddof=1)) / math.sqrt(repeats))
    if number > 1:
        around = weights * (differences[0] - differences[0] @ weights)
        return Comparison(gain, math.sqrt(number / (number - 1) * float(around @ around)))
    return Comparison(gain, math.nan)


def lengths(candidates: int, steps: int, eta: float) -> list[int]:
    """After how many steps successive halving looks, the last time after all of them.

    Example:
        >>> lengths(10, 90, 3.0), lengths(1, 90, 3.0), lengths(10, 90, math.inf)
        ([10, 30, 90], [90], [90])
    """
    if not math.isfinite(eta):
        return [steps]
    halvings = 0
    while candidates > 1:
        candidates, halvings = kept(candidates, eta), halvings + 1
    return sorted({max(1, round(steps / eta**k)) for k in range(halvings + 1)})


def kept(candidates: int, eta: float) -> int:
    """How many go on: 1/η of them, at least one."""
    return max(1, int(candidates / eta))


class _Arena:
    """Where the trials of one decision are held."""

    def __init__(
        self, rule: Trial, problem: GrowthProblem, evaluation: Iterable[Any], num_samples: int
    ) -> None:
        self._rule = rule
        self._problem = problem
        self._evaluation = evaluation
        self._num_samples = num_samples
        self._device = device_of(problem.model)
        self._streams = [_stream(problem, rule.seed + repeat) for repeat in range(rule.repeats)]
        self.passes = 0.0

    def entered(self, planned: Planned | None) -> list[Replica]:
        """The replicas of one contestant, all at the same start."""
        return [self._replica(planned) for _ in range(self._rule.repeats)]

    def _replica(self, planned: Planned | None) -> Replica:
        given = self._rule.optimizer
        if isinstance(given, torch.optim.Optimizer):
            model, optimizer = copy.deepcopy((self._problem.model, given))
        else:
            model, optimizer = copy.deepcopy(self._problem.model), None
        parts = [model]
        if planned is not None:
            block = copy.deepcopy(planned.block)
            takes = takes_context(block)
            site = model.get_submodule(planned.after)
            stand(site, block, takes_context=takes, output=planned.output)
            parts.append(block)
            if optimizer is not None:
                _join(optimizer, block)
        if optimizer is None:
            assert not isinstance(given, torch.optim.Optimizer)
            optimizer = given([p for part in parts for p in part.parameters() if p.requires_grad])
        modes = [(module, module.training) for part in parts for module in part.modules()]
        return Replica(model, optimizer, tuple(modes))

    def train(self, contestants: Mapping[str, Sequence[Replica]], steps: int) -> None:
        """Some steps more for all of them, batch by batch in turn."""
        quiet = None if self._rule.progress is None else not self._rule.progress
        total = steps * self._rule.repeats
        bar = tqdm(total=total, desc="trials", unit="step", leave=False, delay=1, disable=quiet)
        for repeat, stream in enumerate(self._streams):
            replicas = [contestant[repeat] for contestant in contestants.values()]
            for module, training in itertools.chain(*(replica.modes for replica in replicas)):
                module.training = training or not self._problem.model.training
            for batch in itertools.islice(stream, steps):
                self._step_all(replicas, batch)
                bar.update()
        bar.close()

    def _step_all(self, replicas: Sequence[Replica], batch: tuple[Any, Any]) -> None:
        """One step of each, with the same random numbers, which the last one uses up."""
        devices = [d.index for d in (self._device,) if d is not None and d.type == "cuda"]
        for replica in replicas[:-1]:
            with torch.random.fork_rng(devices=devices):
                self._step(replica, batch)
        self._step(replicas[-1], batch)

    def _step(self, replica: Replica, batch: tuple[Any, Any]) -> None:
        def closure() -> Tensor:
            replica.optimizer.zero_grad()
            loss = checked_loss(self._problem.loss_fn(call(replica.model, batch[0]), batch[1]))
            loss.backward()
            self.passes += batch_size(*batch) / self._num_samples
            return loss

        replica.optimizer.step(closure)  # type: ignore[arg-type]

    def losses(self, replicas: Sequence[Replica]) -> Losses:
        """On each batch of the evaluation, in the modes of the problem's model."""
        rows, weights = [], []
        for replica in replicas:
            for module, training in replica.modes:
                module.training = training
            with untouched(replica.model, self._evaluation), torch.no_grad():
                pairs = list(self._evaluated(replica))
            rows.append([loss for loss, _ in pairs])
            weights = [weight for _, weight in pairs]
        return Losses(np.array(rows), np.array(weights) / sum(weights))

    def _evaluated(self, replica: Replica) -> Iterator[tuple[float, float]]:
        for input, target in batches(self._evaluation, self._device):
            weight = batch_weight(self._problem.weight, input, target)
            if weight == 0:  # there is no mean loss
                continue
            self.passes += FORWARD_PASSES * batch_size(input, target) / self._num_samples
            loss = self._problem.loss_fn(call(replica.model, input), target)
            yield float(checked_loss(loss)), weight


def _stream(problem: GrowthProblem, seed: int) -> Iterator[tuple[Any, Any]]:
    """Batches without end; a list of them in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    data, device = problem.data, device_of(problem.model)
    while True:
        read: Iterable[Any] = data
        if isinstance(data, Sequence):
            order = torch.randperm(len(data), generator=generator).tolist()
            read = [data[index] for index in order]
        for pair in batches(read, device):
            if batch_weight(problem.weight, *pair) > 0:  # else there is no mean loss
                yield pair


def _join(optimizer: torch.optim.Optimizer, block: nn.Module) -> None:
    """The parameters of a block as a group of their own, with the settings of the last one."""
    last = optimizer.param_groups[-1]
    settings = {k: v for k, v in last.items() if k not in ("params", "param_names")}
    named = "param_names" in last
    new = [(f"(trial).{n}", p) for n, p in block.named_parameters() if p.requires_grad]
    optimizer.add_param_group({**settings, "params": new if named else [p for _, p in new]})


def _plain(means: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON takes it."""
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
