"""Multipliers collected during ordinary training, from the user's own backward passes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size
from constrained_growth._multipliers.grouping import Site
from constrained_growth._multipliers.sketching import sketch_variance, sketched_sites
from constrained_growth._multipliers.tallies import Estimate
from constrained_growth._multipliers.windows import Batch, Window
from constrained_growth._sites.collector import hooked
from constrained_growth._sites.context import NO_CONTEXT, context_of, detached
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.outputs import tensor_at, with_tensor
from constrained_growth._sites.untouched import eagerly, is_untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import DataError, RuleError
from constrained_growth.norms import Frobenius, MomentNorm, lipschitz, needs_moments
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import DecisionRule, TopK
from constrained_growth.rules.rule import decide
from constrained_growth.solution import Decision, Norm, Planned, Sensitivity, Solution, Status
from constrained_growth.solve import size_of
from constrained_growth.statistics import debiased_square

_FROBENIUS = Frobenius()
_TOP_ONE = TopK(1)


@contextmanager
def monitor(
    problem: GrowthProblem,
    *,
    norm: Norm | MomentNorm = _FROBENIUS,
    sketch: int | None = None,
    every: int = 1,
    scale: float | Callable[[], float] = 1.0,
    seed: int = 0,
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
      mean is over the samples whose δ arrived there. What `solve` runs in between does not count.
    * Several backward passes through one forward pass (`retain_graph=True`) add up, as their
      gradients do, and the batch counts once. A gradient penalty (`create_graph=True`) adds what
      comes through the tensor at the site, and not what would come through the derivative of the
      block.
    * What was compiled (`torch.compile`) runs as written within the context.
    * Each process of a distributed group averages over its own batches.

    Args:
        problem: Its model is watched at the sites of its candidates; its data are not read.
        norm: How large a multiplier is, as in `solve`.
        sketch: None for λ itself; or k, to keep only k random combinations of the rows of λᵀ,
            which cost 2k (in + out) operations for each sample instead of 2 in · out. That
            gives the Frobenius norm: an unbiased estimate of ‖λ‖²_F (see `Monitor.sensitivities`)
            but not λ. Candidates without a closed form (`factors`) are measured exactly.
        every: Watch every so-manieth forward pass only; the others cost next to nothing.
        scale: What the loss was multiplied with before `backward`, or a function that says so at
            each forward pass: `scale=scaler.get_scale` for a `torch.amp.GradScaler`. With a
            function, what is NaN or infinite at a site is left out there, as the scaler leaves
            out the step (which asks the device for an answer).
        seed: Of the random signs of the sketch, which come from a generator of their own.

    Yields:
        The `Monitor`, which can be read within the context and after it.

    Raises:
        RuleError: `norm`, `sketch`, `every` or `scale` make no sense, or `norm` is not the
            Frobenius norm although only a sketch of λ is kept.
        DataError: `problem` is not a `GrowthProblem`, or (while training) a batch has no size.

    Source:
        The sketch: Hutchinson, *A stochastic estimator of the trace of the influence matrix*,
        1990; Achlioptas, *Database-friendly random projections*, 2003.

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
    _check(problem, norm, sketch, every, scale)
    found = Monitor(problem, norm, sketch, every, scale, seed)
    with found.watching():
        yield found


class Monitor:
    """What `monitor` gives: the multipliers of a window of training so far.

    Made by `monitor`, where its arguments are explained.
    """

    def __init__(
        self,
        problem: GrowthProblem,
        norm: Norm | MomentNorm,
        sketch: int | None,
        every: int,
        scale: float | Callable[[], float],
        seed: int,
    ) -> None:
        self._problem = problem
        self._norm = norm
        self._sketch = sketch
        self._every = every
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)
        self._batch: Batch | None = None
        self._hooks = ExitStack()
        self._hooked = False
        self.reset()

    def reset(self) -> None:
        """Begin a new window, in sketch mode with new random signs.

        A backward pass still to come through an earlier forward pass counts for the old one.
        """
        sites = self._problem.sites
        if self._sketch is not None:
            sites = sketched_sites(sites, self._sketch, self._generator)
        self._passes = 0
        self._batch = None
        self._window = Window(sites, moments=needs_moments(self._norm), skips=callable(self._scale))

    @property
    def num_samples(self) -> int:
        """How many samples count in the window so far, at the site with the most."""
        return max(self._window.samples)

    @property
    def num_batches(self) -> int:
        """How many batches count in the window so far, at the site with the most."""
        return max(self._window.batches)

    def multipliers(self) -> dict[str, dict[str, Tensor]]:
        """Candidate → pinned parameter → λ, the average over the window.

        Raises:
            RuleError: Only a sketch is kept.
            DataError: No backward pass arrived at some site in this window.
        """
        if self._sketch is not None:
            raise RuleError(
                f"sketch={self._sketch} keeps the size of the multipliers and not themselves; ask "
                "for sensitivities(), or monitor with sketch=None."
            )
        return {name: estimate.multiplier for name, estimate in self._window.estimates().items()}

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Candidate → how large its λ, the average over the window, is.

        With a sketch of k rows, λ_V = Ωλᵀ with independent signs ±1/√k in Ω, value² is an
        unbiased estimate of ‖λ‖²_F, and with A = λᵀλ (its bias column included)

            Var(value²) = (2/k) (‖A‖²_F − Σ_i A_ii²)  ≤  (2/k) ‖λ‖⁴_F,

        with equality nearly reached by a λ of rank one: a relative standard deviation of `value`
        of at most about 1/√(2k), 18 % for k = 16, and less by √r for a λ of r equal singular
        values. `standard_error` then holds this too, estimated from the spread over the k rows:
        √(tr Cov(λ) + Var(value)).

        Within a window `standard_error` and `variance` take the samples for independent draws
        at the same parameters, which they are only for small steps.

        Raises:
            DataError: No backward pass arrived at some site in this window.
        """
        estimates = self._window.estimates()
        planned = {n: (site, b) for site in self._problem.sites for n, b in site.blocks.items()}
        return {
            candidate.name: self._sensitivity(estimates[candidate.name], *planned[candidate.name])
            for candidate in self._problem.candidates
        }

    def solution(self, rule: DecisionRule = _TOP_ONE) -> Solution:
        """The window's multipliers, and what a rule makes of them; `insert` takes it.

        The loss, which is not seen, is NaN, and `multipliers` is empty in sketch mode.

        Args:
            rule: `rule(sensitivities) -> Decision`.

        Raises:
            RuleError: `rule` cannot be called (it asks the model), or returns no decision.
            DataError: No backward pass arrived at some site in this window.
        """
        if not callable(rule):
            raise RuleError(
                f"rule={rule!r} cannot be called with sensitivities; give cg.TopK(1), or a "
                "function. One that asks the model is for cg.solve."
            )
        sensitivities = self.sensitivities()
        finite = all(math.isfinite(sensitivity.value) for sensitivity in sensitivities.values())
        status = Status.STATIONARITY_UNKNOWN if finite else Status.NOT_FINITE
        return Solution(
            status=status,
            loss=math.nan,
            stationarity=None,
            multipliers=self.multipliers() if self._sketch is None else {},
            sensitivities=sensitivities,
            decision=decide(rule, sensitivities) if finite else Decision((), status.value),
            candidates={
                name: Planned(site.after, block, site.overwritten, site.output)
                for site in self._problem.sites
                for name, block in site.blocks.items()
            },
            parameters=parameter_shapes(self._problem.model),
            num_samples=self.num_samples,
            num_batches=self.num_batches,
            example=self._problem.example,
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model for a while; windows go on from one time to the next."""
        begin = self._problem.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            with eagerly():
                yield
        finally:
            begin.remove()
            self._watch(None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: is it to be watched?"""
        batch = None
        if torch.is_grad_enabled() and not is_untouched():
            if self._passes % self._every == 0:
                scale = self._scale() if callable(self._scale) else self._scale
                batch = Batch(batch_size(args, kwargs), scale)
                self._window.make_room()
            self._passes += 1
        self._watch(batch)

    def _watch(self, batch: Batch | None) -> None:
        """Hooks at the sites for a batch, or none, so that an unwatched pass goes unhindered."""
        self._batch = batch
        if batch is None:
            self._hooks.close()
        elif not self._hooked:
            sites = enumerate(self._problem.sites)
            hooks = [(site.module, functools.partial(self._see, i)) for i, site in sites]
            self._hooks.enter_context(hooked(hooks))
        self._hooked = batch is not None

    def _see(
        self, index: int, module: nn.Module, args: Any, kwargs: Any, output: object
    ) -> object | None:
        """Note x at a site in the forward pass; what it returns takes the place of the output."""
        batch = self._batch
        if batch is None or not torch.is_grad_enabled():
            return None
        site = self._problem.sites[index]
        y = output if isinstance(output, Tensor) else tensor_at(site.after, output, site.output)
        x = y.detach()
        replaced = site.copied or not y.requires_grad
        if not y.requires_grad:  # may be the user's own input, and written over when read
            x, y = x.clone(), x.requires_grad_()
        if replaced:
            y = y.clone()
        context = detached(context_of(module, args, kwargs)) if site.context else NO_CONTEXT
        # x lives as long as the graph does, and no longer where no backward pass comes
        y.register_hook(functools.partial(self._window.receive, index, x, context, batch))
        if not replaced:
            return None
        return y if isinstance(output, Tensor) else with_tensor(output, site.output, y)

    def _sensitivity(self, estimate: Estimate, site: Site, block: nn.Module) -> Sensitivity:
        multiplier, variance = estimate.multiplier, estimate.variance
        pinned = pinned_parameters(block)
        sketched = multiplier.keys() != pinned.keys()
        error = variance + sketch_variance(multiplier) if sketched else variance
        return Sensitivity(
            value=size_of(estimate, self._norm),
            standard_error=lipschitz(self._norm, multiplier) * math.sqrt(error),
            num_parameters=sum(parameter.numel() for parameter in pinned.values()),
            num_new_parameters=sum(parameter.numel() for parameter in block.parameters()),
            norm=self._norm,
            site=site.after,
            variance=variance,
            debiased_square=debiased_square(multiplier.values(), variance),
        )


def _check(problem: object, norm: object, sketch: object, every: object, scale: object) -> None:
    if not isinstance(problem, GrowthProblem):
        raise DataError(f"problem={problem!r} is not a cg.GrowthProblem.")
    if problem.weight is not None:
        raise DataError(
            "problem: its weight= asks for targets, which the model is not called with and a "
            "monitor does not see; monitor a problem without it, and batches count by their size."
        )
    if not callable(norm):
        raise RuleError(f"norm={norm!r} cannot be called; give one of cg.norms, or a function.")
    if sketch is not None and not _is_count(sketch):
        raise RuleError(f"sketch={sketch!r} is neither None nor a positive whole number.")
    if sketch is not None and not isinstance(norm, Frobenius):
        raise RuleError(
            f"norm={norm!r} cannot be had from a sketch, which gives the Frobenius norm only; "
            "monitor with sketch=None."
        )
    if not _is_count(every):
        raise RuleError(f"every={every!r} is not a positive whole number.")
    if not callable(scale) and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise RuleError(
            f"scale={scale!r} is neither a positive number nor a function that returns one, such "
            "as scaler.get_scale."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
