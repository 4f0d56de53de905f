"""Whether the optimizer's steps would still be stable with a layer inserted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth._data import batch_size, batch_weight, batches, copied, some_of
from constrained_growth._distributed import everywhere, num_processes
from constrained_growth._sites.untouched import untouched
from constrained_growth.curvature import Curvature, VirtualLoss, gauss_newton
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.protocol import OptimizerFactory
from constrained_growth.solution import Decision, Solution


@dataclass(frozen=True)
class Stable:
    """Those candidates with which the steps of SGD stay below the limit of their stability.

    On a quadratic loss, steps of size η with momentum β grow without bound along a direction of
    curvature κ, however small they begin, where

        η κ > 2(1 + β)    (with Nesterov's momentum: η κ > 2(1 + β)/(1 + 2β)).

    A new layer adds directions, also while it does nothing: the largest eigenvalue of the
    Gauss–Newton matrix in (θ, v) is never below that in θ alone. A candidate is refused where η
    times that, at v = 0, is above `factor` times the limit. λ says how fast the loss falls along
    the new directions and nothing about this, so that it is a question for a second rule:
    `then(TopK(1), Stable(optimizer))` inserts the best candidate or nothing, and
    `then(Stable(optimizer), TopK(1))` the best of those that are stable, at a cost for each.

    What the optimizer does with dampening, weight decay and groups of different learning rates
    is counted; the pins are taken to have the largest rate of the model's parameters, and those
    that the optimizer does not have not to move.

    The decision's evidence has `stability`, candidate → part of the limit that is used (None where
    it is not finite), and `passes`: 3 gradient passes over what is read for each product (half of
    it where θ is frozen), and one for where to begin; by default 10 for a candidate, or 10 · 100/N
    of more than 100 samples.

    Args:
        optimizer: The `torch.optim.SGD` that trains the model now, asked for its settings of the
            moment; or a function that makes one of parameters, as `grow` takes it.
        factor: How much of the limit may be used. Three quarters by default, since the noise of
            batches lowers the limit, and training raises the curvature.
        max_products: How many products with the matrix are spent on each candidate. With 3 the
            largest eigenvalue is found to a few per cent where it stands apart from the others, as
            it does in trained networks; what is found is never above that of what is read.
        max_samples: Batches are drawn from the data at random until they have about so many
            samples, at least one, and held; None for all of the data. 100 by default, so that the
            question costs little beside λ. The eigenvalue of a part is off either way, and too
            large on average, the more so the fewer samples it has.
        curvature: The matrix: `gauss_newton` (default), or `hessian` for a loss that is linear in
            the outputs of the model, as NLLLoss is after LogSoftmax.
        progress: Progress bar: True, False, or None (default) for one on a terminal when it takes
            longer than a second.

    Raises:
        RuleError: An argument is out of range; when asked, that the optimizer is no SGD (for
            others, as Adam, no limit is known that foresees anything for parameters without a
            history), or not the model's, or has groups of different momentum, or a momentum of 1
            or more; or that the matrix is zero.

    Source:
        Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964; Cohen et
        al., *Gradient descent on neural networks typically occurs at the edge of stability*, ICLR
        2021, appendix B.

    Example:
        >>> import functools
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> for lr in (0.1, 100.0):
        ...     rule = cg.then(cg.TopK(1), Stable(torch.optim.SGD(net.parameters(), lr=lr)))
        ...     print(cg.solve(problem, rule=rule).decision.chosen)
        ('1',)
        ()
    """

    optimizer: torch.optim.Optimizer | OptimizerFactory = field(repr=False)
    factor: float = 0.75
    max_products: int = 3
    max_samples: int | None = 100
    curvature: Curvature = gauss_newton
    progress: bool | None = None

    def __post_init__(self) -> None:
        if not (callable(self.optimizer) or isinstance(self.optimizer, torch.optim.Optimizer)):
            raise RuleError(
                f"optimizer={self.optimizer!r} of Stable is neither an optimizer nor a function "
                "that makes one; give functools.partial(torch.optim.SGD, lr=0.1), say."
            )
        if not isinstance(self.factor, int | float) or not 0 < self.factor < math.inf:
            raise RuleError(f"factor={self.factor!r} of Stable must be positive and finite.")
        if not callable(self.curvature):
            raise RuleError(
                f"curvature={self.curvature!r} of Stable cannot be called; give "
                "cg.curvature.gauss_newton or cg.curvature.hessian."
            )
        products = self.max_products
        if not isinstance(products, int) or isinstance(products, bool) or products < 1:
            raise RuleError(f"max_products={products!r} of Stable is not a positive whole number.")
        most = self.max_samples
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise RuleError(
                f"max_samples={most!r} of Stable is not a positive whole number, nor None for all."
            )

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """All candidates that are stable."""
        steps = _steps(_sgd(self.optimizer, problem.model), problem.model)
        names = tuple(solution.sensitivities)
        quiet = None if self.progress is None else not self.progress
        bar = tqdm(names, desc="stability", unit="candidate", leave=False, delay=1, disable=quiet)
        data, share = self._drawn(problem, solution)
        used, passes = {}, 0.0
        for name in bar:
            planned = solution.candidates[name]
            loss = VirtualLoss(problem, planned, joint=True, data=data)
            used[name] = self._used(loss, steps)
            passes += share * loss.passes
        chosen = tuple(name for name in names if used[name] <= self.factor)
        reason = f"{len(chosen)} of {len(names)} use at most {self.factor:g} of the stability limit"
        evidence = {"stability": _plain(used), "passes": passes}
        return Decision(chosen, reason, evidence=evidence)

    def _drawn(self, problem: GrowthProblem, solution: Solution) -> tuple[Iterable[Any], float]:
        """Some batches of the data, and about which part of it they are."""
        if self.max_samples is None:
            return problem.data, 1.0
        of_each = self.max_samples / num_processes(problem.group)
        number = math.ceil(of_each * solution.num_batches / solution.num_samples)
        drawn: list[Any] = []

        def draw() -> tuple[int, bool]:
            with untouched(problem.model, problem.data):
                read = batches(problem.data, None)
                counting = (pair for pair in read if batch_weight(problem.weight, *pair) > 0)
                some, all_of_it = some_of(counting, number, keep=copied)
            drawn.extend(some)
            return sum(batch_size(*pair) for pair in some), all_of_it

        sizes, whole = zip(*everywhere(draw, problem.group), strict=True)
        return drawn, 1.0 if all(whole) else min(1.0, sum(sizes) / solution.num_samples)

    def _used(self, loss: VirtualLoss, steps: _Steps) -> float:
        """Which part of the limit is used with one candidate."""
        zero = loss.zero()
        counts = [*(p.numel() for p in steps.parameters), loss.size]
        rates, decays = (
            torch.cat([zero.new_full((n,), value) for n, value in zip(counts, v, strict=True)])
            for v in (steps.rates, steps.decays)
        )
        root = rates.sqrt()

        def product(vector: Tensor) -> Tensor:
            scaled = root * vector
            image = self.curvature(loss, scaled)
            if bool(scaled.any()) and not bool(image.any()):
                raise RuleError(
                    "curvature of Stable: the matrix is zero, as the Gauss–Newton matrix of a loss "
                    "that is linear in the outputs of the model (NLLLoss after LogSoftmax); give "
                    "Stable(..., curvature=cg.curvature.hessian)."
                )
            return root * (image + decays * scaled)

        start = root * loss.gradient()  # which lies among the sharpest directions, mostly
        noise = torch.randn(len(zero), generator=torch.Generator().manual_seed(0)).to(zero)
        start = start / (start.norm() or 1.0) + 0.1 * noise / noise.norm()
        if not bool(start.isfinite().all()):
            return math.inf
        return largest_eigenvalue(product, start, self.max_products) / steps.limit


@dataclass(frozen=True)
class _Steps:
    """What SGD does, for each trained parameter and then for the pins.

    Attributes:
        parameters: The trained parameters.
        rates: η of each; 0 where the optimizer leaves it alone.
        decays: Its weight decay.
        limit: The largest η κ that is stable.
    """

    parameters: Sequence[nn.Parameter]
    rates: Sequence[float]
    decays: Sequence[float]
    limit: float


def stability_limit(momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """The largest step size times curvature with which SGD does not diverge on a quadratic loss.

    Example:
        >>> stability_limit(), stability_limit(0.9)
        (2.0, 3.8)
    """
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, max_products: int
) -> float:
    """The largest eigenvalue of a symmetric matrix, from below, by Lanczos' method.

    Args:
        product: v ↦ B v.
        start: Not zero.
        max_products: How many products are spent, or fewer where that is exact already.

    Returns:
        The largest Ritz value; infinite where a product is not finite.

    Source:
        Golub and Van Loan, *Matrix Computations*, 4th ed. 2013, section 10.1.
    """
    basis, diagonal, beside = start.new_zeros(0, len(start)), [], []
    vector, value = start / start.norm(), math.inf
    for _ in range(min(max_products, len(start))):
        basis = torch.cat([basis, vector[None]])
        image = product(vector)
        if not bool(image.isfinite().all()):
            return math.inf
        diagonal.append(float(vector @ image))
        last = (len(beside), len(beside))
        value = float(
            eigh_tridiagonal(diagonal, beside, eigvals_only=True, select="i", select_range=last)[0]
        )
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - basis.mT @ (basis @ image)
        rest = float(image.norm())
        if rest <= 1e-12 * max(map(abs, diagonal)):
            break
        beside.append(rest)
        vector = image / rest
    return value


def _sgd(optimizer: torch.optim.Optimizer | OptimizerFactory, model: nn.Module) -> torch.optim.SGD:
    if isinstance(optimizer, torch.optim.Optimizer):
        made = optimizer
    else:
        made = optimizer(
            [p for p in model.parameters() if p.requires_grad] or [*model.parameters()]
        )
    if not isinstance(made, torch.optim.SGD) or any(g["maximize"] for g in made.param_groups):
        raise RuleError(
            f"optimizer={type(made).__name__} of Stable: the limit is known for torch.optim.SGD "
            "that minimises, with momentum or without; leave Stable out for others."
        )
    return made


def _steps(optimizer: torch.optim.SGD, model: nn.Module) -> _Steps:
    mine = {id(p) for p in model.parameters()}
    groups = [g for g in optimizer.param_groups if any(id(p) in mine for p in g["params"])]
    if not groups:
        raise RuleError(
            "optimizer of Stable: it has none of the parameters of the model; give the one that "
            "trains it."
        )
    ways = {(float(g["momentum"]), bool(g["nesterov"])) for g in groups}
    if len(ways) > 1 or not max(ways)[0] < 1:
        raise RuleError(
            f"optimizer of Stable: its groups have (momentum, nesterov) {sorted(ways)}; the limit "
            "is known for one momentum below 1 in all of them."
        )
    settings = [(_rate(group), float(group["weight_decay"])) for group in groups]
    of = {id(p): way for way, group in zip(settings, groups, strict=True) for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    each = [*(of.get(id(p), (0.0, 0.0)) for p in trained), max(settings)]
    momentum, nesterov = ways.pop()
    limit = stability_limit(momentum, nesterov=nesterov)
    return _Steps(trained, [rate for rate, _ in each], [decay for _, decay in each], limit)


def _rate(group: Mapping[str, Any]) -> float:
    """Step size: once the momentum runs, a gradient counts 1 − dampening times."""
    return float(group["lr"]) * (1 - float(group["dampening"]) * (group["momentum"] != 0))


def _plain(used: Mapping[str, float]) -> dict[str, float | None]:
    return {name: part if math.isfinite(part) else None for name, part in used.items()}
