"""Multipliers collected during ordinary training, from the user's own backward passes."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import function, instance, number, positive_int
from constrained_growth._data import batch_size
from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._multipliers.groups import Span, accumulation_dtype
from constrained_growth._multipliers.measure import accumulators, refuse_moving
from constrained_growth._sensitivities import (
    agreement_of,
    groups_of,
    sensitivities_of,
    wanted_by,
)
from constrained_growth._sites.collector import Collector, Forward, Use
from constrained_growth._sites.untouched import eagerly, is_untouched
from constrained_growth._solve import check_unchanged, norm_of, solution_of
from constrained_growth.errors import DataError, RuleError
from constrained_growth.norms import MomentNorm, needs_moments
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import DecisionRule, TopK
from constrained_growth.rules.rule import decide, needs_model, refuse_no_rule
from constrained_growth.solution import (
    Decision,
    Method,
    Norm,
    Sensitivity,
    Solution,
    Status,
    listed,
)

__all__ = ["Monitor", "monitor"]


@contextmanager
def monitor(
    problem: GrowthProblem,
    *,
    norm: Norm | MomentNorm | None = None,
    every: int = 1,
    scale: float | Callable[[], float] = 1.0,
) -> Iterator[Monitor]:
    """Watch the multipliers while a model is trained, at next to no cost.

    Within the context, whenever the problem's model runs forward with gradients on and the
    user's own `loss.backward()` passes the sites, their (x, δ) are summed up. Batch b of n_b
    samples, at the parameters θ_b that the model had then, counts with its size:

        λ_c = −Σ_b n_b ∇_{v_c} L_b(θ_b, 0) / Σ_b n_b.

    The parameters move, so this is an **average over a window** of training (from entering the
    context, or the last `reset()`), not λ at the present parameters; with the step size at zero
    it is what `solve` gives for the same batches. Training itself is the same to the last bit.

    What is assumed, and what happens else:

    * What `backward` is called on is the mean of the loss over the samples of the batch. Where it
      is multiplied by a factor (loss scaling, 1/m with gradient accumulation over m batches), say
      so in `scale`. Every forward pass counts as a batch of its own.
    * The batch size is the first dimension of the first tensor that the model is called with.
    * A forward pass without backward (validation, with or without `torch.no_grad()`) counts for
      nothing and keeps nothing alive; neither does one that an exception ended. At each site the
      mean is over the samples whose δ arrived there, and those that went elsewhere (an idle
      expert), for which λ is zero. What `solve` runs in between does not count.
    * Several backward passes through one forward pass (`retain_graph=True`) add up, as their
      gradients do, and the batch counts once; its variance is then not known, nor are second
      moments, which the recommended norm asks for. A gradient penalty (`create_graph=True`) adds
      what comes through the tensor at the site, and not what would come through the derivative of
      the block. Batches whose loss is of another kind than that of the problem's first are not
      noticed here, as they are by `solve`.
    * What was compiled (`torch.compile`) runs as written within the context.
    * Each process of a distributed group averages over its own batches.

    Args:
        problem: Its model is watched at the sites of its candidates; its data are not read.
        norm: How large a multiplier is, as in `solve`.
        every: Watch only every k-th forward pass; the others cost next to nothing.
        scale: What the loss was multiplied with before `backward`, or a function that says so at
            each forward pass: `scale=scaler.get_scale` for a `torch.amp.GradScaler`. With a
            function, what is NaN or infinite at a site is left out there, as the scaler leaves
            out the step (which asks the device for an answer).

    Yields:
        The `Monitor`, which can be read within the context and after it.

    Raises:
        RuleError: `norm`, `every` or `scale` make no sense.
        CandidateError: The model has changed at a site since the problem was made.
        DataError: `problem` is not a `GrowthProblem`, has `weight=`, or has no closed form of λ; or
            (while training) a batch has no size.

    Example:
        >>> import torch
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with cg.monitor(problem) as monitor:
        ...     for input, target in data:
        ...         optimizer.zero_grad()
        ...         nn.functional.cross_entropy(net(input), target).backward()
        ...         optimizer.step()
        >>> monitor.num_samples, tuple(monitor.multipliers()["1"]["weight"].shape)
        (8, (4, 4))
    """
    _check(problem, norm, every, scale)
    norm = norm_of(None) if norm is None else norm
    found = Monitor(problem, norm, every, scale)
    with found.watching():
        yield found


@dataclass(eq=False)
class _Batch:
    """A forward pass that is watched, of one window, and the sites where its δ has arrived."""

    size: int
    scale: float
    window: _Window
    span: Span | None = None
    counted: set[int] = field(default_factory=set)
    runs: Counter[int] = field(default_factory=Counter)  # of the modules at the sites, in forward


class Monitor:
    """What `monitor` gives: the multipliers of a window of training so far."""

    def __init__(
        self,
        problem: GrowthProblem,
        norm: Norm | MomentNorm,
        every: int,
        scale: float | Callable[[], float],
    ) -> None:
        self._problem = problem
        self._norm = norm
        self._every = every
        self._scale = scale
        self._collector = Collector(problem.sites)
        self._latest: weakref.ref[Forward] | None = None
        self._hooks = ExitStack()
        self._hooked = False
        self.reset()

    def __repr__(self) -> str:
        names = listed(candidate.name for candidate in self._problem.candidates)
        return f"Monitor({self.num_samples} samples, candidates: {names})"

    def reset(self) -> None:
        """Begin a new window.

        A backward pass still to come through an earlier forward pass counts for the old one.
        """
        self._passes = 0
        self._settle()
        self._window = _Window(self._problem, self._norm)

    @property
    def num_samples(self) -> int:
        """How many samples count in the window so far, at the site with the most."""
        return max(self._window.samples.values(), default=0)

    @property
    def num_batches(self) -> int:
        """How many batches count in the window so far, at the site with the most."""
        return max(self._window.batches.values(), default=0)

    def multipliers(self) -> dict[str, dict[str, Tensor]]:
        """Candidate → pinned parameter → λ, the average over the window.

        Raises:
            DataError: No backward pass arrived at some site in this window.
            BlockError: A block is the identity on the first batch and not on a later one.
        """
        return {name: estimate.multiplier for name, estimate in self._estimates().items()}

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Candidate → how large its λ, the average over the window, is.

        Within a window `standard_error` and `variance` take the samples for independent draws
        at the same parameters, which they are only for small steps.

        Raises:
            DataError: As `multipliers`; or several backward passes went through one forward pass,
                and the norm asks for second moments, which do not add up as λ does.
            BlockError: As `multipliers`.
        """
        estimates = {name: one.kept() for name, one in self._estimates().items()}
        accumulators = self._window.accumulators.values()
        if needs_moments(self._norm) and any(one.counts.again for one in accumulators):
            raise DataError(
                f"norm={self._norm!r:.80}: several backward passes went through one forward pass, "
                "and second moments of their parts are not those of the sum. Add the losses up and "
                "call backward() once, or take a norm of λ alone: norm=cg.norms.Frobenius()."
            )
        return sensitivities_of(self._problem, estimates, self._norm)

    def solution(self, rule: DecisionRule | None = None) -> Solution:
        """The window's multipliers and a rule's decision about them; `insert` takes it.

        The loss, which is not seen, is NaN.

        Raises:
            RuleError: `rule` cannot be called (it asks the model), or returns no decision.
            DataError, BlockError: As `multipliers`.
        """
        rule = TopK(1) if rule is None else rule
        refuse_no_rule("rule", rule)
        if needs_model(rule):
            raise RuleError(f"rule={rule!r} asks the model; give cg.TopK(1), or ask by cg.solve.")
        sensitivities = self.sensitivities()
        finite = all(math.isfinite(sensitivity.value) for sensitivity in sensitivities.values())
        status = Status.STATIONARITY_UNKNOWN if finite else Status.NOT_FINITE
        return solution_of(
            self._problem,
            status=status,
            loss=math.nan,
            stationarity=None,
            multipliers=self.multipliers(),
            sensitivities=sensitivities,
            decision=decide(rule, sensitivities) if finite else Decision((), status.value),
            agreement=agreement_of(rule, sensitivities),
            num_samples=self.num_samples,
            num_batches=self.num_batches,
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model for a while; windows go on from one time to the next."""
        model = self._problem.model
        with (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(lambda *_: self._collector.end()),
            eagerly(),
        ):
            try:
                yield
            finally:
                self._settle()
                self._watch(False)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: is it to be watched?"""
        watched = False
        if torch.is_grad_enabled() and not is_untouched():
            watched = self._passes % self._every == 0
            self._passes += 1
        if watched:
            scale = self._scale() if callable(self._scale) else self._scale
            self._settle()
            batch = _Batch(batch_size(args, kwargs), scale, self._window)
            forward = self._collector.begin(self._take, batch, keeps=True)
            # weakly: it goes with the graph of a pass that is never differentiated (validation)
            batch.runs, self._latest = forward.seen, weakref.ref(forward)
        self._watch(watched)

    def _watch(self, watched: bool) -> None:
        """Hooks at the sites for a batch, or none, so that an unwatched pass goes unhindered."""
        if watched and not self._hooked:
            self._hooks.enter_context(self._collector.watching())
        elif not watched:
            self._hooks.close()
        self._hooked = watched

    def _settle(self) -> None:
        """Take in what has arrived of the latest batch, no more of it being waited for."""
        forward = self._latest() if self._latest is not None else None
        if forward is not None:
            forward.settle()

    def _take(self, index: int, uses: list[Use], batch: _Batch) -> None:
        # only then, as asking makes the device wait
        if callable(self._scale) and not all(bool(use.delta.isfinite().all()) for use in uses):
            return
        if batch.scale != 1.0:  # in a precision where what is small stays
            dtype = accumulation_dtype(uses[0].delta.dtype)
            uses = [replace(use, delta=use.delta.to(dtype) / batch.scale) for use in uses]
        batch.window.take(index, uses, batch)

    def _estimates(self) -> dict[str, Estimate]:
        self._settle()
        return self._window.estimates()


class _Window:
    """The sums of a window of training."""

    def __init__(self, problem: GrowthProblem, norm: Norm | MomentNorm) -> None:
        self._sites = problem.sites
        self._groups = groups_of(problem, None, norm)
        self.accumulators = accumulators(problem.sites, wanted_by(norm, self._groups))
        self.samples: Counter[int] = Counter()
        self.batches: Counter[int] = Counter()

    def take(self, index: int, uses: list[Use], batch: _Batch) -> None:
        """Take in what a batch has brought to a site, at all uses."""
        again, size = index in batch.counted, batch.size
        if batch.span is None:
            batch.span = self._groups.span(size)
            self._groups.advance(batch.span, size)
        for name in self._sites[index].blocks:
            self.accumulators[name].add(uses, size, size, again=again, span=batch.span)
        idle = [i for i in range(len(self._sites)) if not batch.counted and not batch.runs[i]]
        for counting in idle if again else [index, *idle]:
            self.samples[counting] += size
            self.batches[counting] += 1
        batch.counted.add(index)

    def estimates(self) -> dict[str, Estimate]:
        """Candidate → what is known of it, over the samples that count at its site."""
        counts = {name: a.counts for name, a in self.accumulators.items()}
        arrived = {name for name, c in counts.items() if c.by_sample or c.batches}
        silent = [s.after for s in self._sites if not arrived.issuperset(s.blocks)]
        if silent:
            raise DataError(
                f"after={silent}: no backward pass has arrived there since the window began; call "
                "the problem's own model within the context, and backward() on its loss."
            )
        for index, site in enumerate(self._sites):
            samples = self.samples[index]
            for name in site.blocks:
                self.accumulators[name].count_all(samples, samples, self.batches[index])
        with torch.inference_mode(False), torch.no_grad():
            found = {name: a.estimate() for name, a in self.accumulators.items()}
        refuse_moving(found)
        return found


def _check(problem: object, norm: object, every: int, scale: object) -> None:
    problem = instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    check_unchanged(problem)
    if problem.weight is not None:
        raise DataError(
            "problem: its weight= asks for targets, which a monitor does not see; monitor a "
            "problem without it, and batches count by their size."
        )
    if problem.method is Method.IN_GRAPH:
        raise DataError(
            "problem: its loss contains derivatives of the output, say, so that a training step "
            "alone does not give λ; call cg.solve(problem) between the steps."
        )
    function("norm", norm, RuleError, "cg.norms.Frobenius()", optional=True)
    positive_int("every", every, RuleError)
    if not callable(scale):  # as scaler.get_scale can be
        number("scale", scale, RuleError, "(0, inf)")
