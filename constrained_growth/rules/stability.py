"""Whether the steps of SGD stay stable once a layer is inserted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import flag, function, number, positive_int
from constrained_growth._data import batch_size, copied, counted, some_of
from constrained_growth._distributed import everywhere, num_processes
from constrained_growth._progress import progress_bar
from constrained_growth._sites.untouched import untouched
from constrained_growth.curvature import Curvature, VirtualLoss, gauss_newton
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import OptimizerFactory, check_optimizer, check_question
from constrained_growth.rules.subproblem import lanczos
from constrained_growth.solution import Decision, Solution


@dataclass(frozen=True)
class Stable:
    """Every candidate with which SGD stays below its stability limit.

    On a quadratic loss, steps of size η with momentum β diverge along a direction of curvature κ
    where

        η κ > 2(1 + β)    (with Nesterov's momentum: η κ > 2(1 + β)/(1 + 2β)).

    A new layer adds directions even while it does nothing: the largest eigenvalue of the
    Gauss–Newton matrix in (θ, v) is never below that in θ alone. A candidate is refused if η
    times this eigenvalue, at v = 0, exceeds `factor` times the limit. λ says how steep the new
    directions are, not how curved, so this is a second rule: `then(TopK(1), Stable(optimizer))`
    inserts the best candidate or nothing, and `then(Stable(optimizer), TopK(1))` the best of the
    stable ones, at a cost for each candidate.

    Dampening, weight decay and groups with different learning rates are taken into account. The
    pins get the largest rate of the model's parameters; parameters that the optimizer does not
    have count as fixed. The evidence holds `stability`, candidate → fraction of the limit that is
    used (None if not finite), and `passes`: for each candidate one gradient pass over what is read
    and 3 for each product (1.5 if θ is frozen).

    Args:
        optimizer: The `torch.optim.SGD` that trains the model, whose current settings are used; or
            a function that makes one from parameters, as `grow` takes it.
        factor: The fraction of the limit that may be used. 0.75 by default, because mini-batch
            noise lowers the limit and training raises the curvature.
        max_products: Products with the matrix for each candidate. 3 (default) find the largest
            eigenvalue to a few per cent if it is well separated, and never overestimate it.
        max_samples: About how many samples are drawn, in whole batches, and kept in memory; None
            for all data. On fewer samples the eigenvalue is larger on average.
        curvature: The matrix: `gauss_newton` (default), or `hessian` for a loss that is linear in
            the outputs of the model, such as NLLLoss after LogSoftmax.
        progress: Progress bar: True, False, or None (default) for on a terminal, after a second.

    Raises:
        RuleError: An argument is out of range. When asked: the optimizer is not an SGD of the model
            with one momentum below 1; or the matrix is zero.

    Source:
        Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964; Cohen et
        al., arXiv 2103.00065, appendix B.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> rules = [Stable(torch.optim.SGD(net.parameters(), lr)) for lr in (0.1, 100.0)]
        >>> [cg.solve(problem, cg.rules.then(cg.TopK(1), rule)).decision.chosen for rule in rules]
        [('1',), ()]
    """

    optimizer: torch.optim.Optimizer | OptimizerFactory = field(repr=False)
    factor: float = 0.75
    max_products: int = 3
    max_samples: int | None = 100
    curvature: Curvature = gauss_newton
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer, "Stable")
        function("curvature", self.curvature, RuleError, "cg.curvature.gauss_newton")
        positive_int("max_products", self.max_products, RuleError)
        positive_int("max_samples", self.max_samples, RuleError, optional=True)
        number("factor", self.factor, RuleError, "(0, inf)")
        flag("progress", self.progress, RuleError, optional=True)

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """All stable candidates."""
        check_question(problem, solution)
        trained = [p for p in problem.model.parameters() if p.requires_grad]
        counts = [p.numel() for p in trained]
        settings, limit = _settings(self.optimizer, problem.model, trained)
        names = tuple(solution.sensitivities)
        data, share = self._drawn(problem, solution)
        used, passes = {}, 0.0
        for name in progress_bar(names, desc="stability", unit="candidate", progress=self.progress):
            loss = VirtualLoss(problem, solution.candidates[name], joint=True, data=data)
            used[name] = self._sharpness(loss, settings, counts) / limit
            passes += share * loss.passes
        chosen = tuple(name for name in names if used[name] <= self.factor)
        reason = f"{len(chosen)} of {len(names)} use at most {self.factor:g} of the stability limit"
        stability = {name: part if math.isfinite(part) else None for name, part in used.items()}
        return Decision(chosen, reason, evidence={"stability": stability, "passes": passes})

    def _drawn(self, problem: GrowthProblem, solution: Solution) -> tuple[Iterable[Any], float]:
        """Some batches of the data, and about which fraction of the samples they have."""
        if self.max_samples is None:
            return problem.data, 1.0
        per_process = self.max_samples / num_processes(problem.group)
        number = math.ceil(per_process * solution.num_batches / solution.num_samples)
        drawn: list[Any] = []

        def draw() -> tuple[int, bool]:
            with untouched(problem.model, problem.loss_fn, problem.data):
                pairs = ((x, y) for x, y, _ in counted(problem.data, None, problem.weight))
                drawn[:], is_all = some_of(pairs, number, keep=copied)
            return sum(batch_size(*pair) for pair in drawn), is_all

        sizes, whole = zip(*everywhere(draw, problem.group), strict=True)
        return drawn, 1.0 if all(whole) else min(1.0, sum(sizes) / solution.num_samples)

    def _sharpness(self, loss: VirtualLoss, settings: Tensor, counts: Sequence[int]) -> float:
        """The largest eigenvalue of √η (B + weight decay) √η in (θ, v)."""
        zero = loss.zero()
        repeats = torch.tensor([*counts, loss.size])
        rates, decays = settings.repeat_interleave(repeats, dim=0).to(zero).unbind(1)
        root = rates.sqrt()

        def product(vector: Tensor) -> Tensor:
            scaled = root * vector
            image = self.curvature(loss, scaled)
            if bool(scaled.any()) and not bool(image.any()):
                raise RuleError(
                    "curvature of Stable: the matrix is zero, as Gauss–Newton's is where the loss "
                    "is linear in the outputs (NLLLoss); use curvature=cg.curvature.hessian."
                )
            return root * (image + decays * scaled)

        # the gradient lies mostly in the sharpest directions; noise, since it may be zero there
        start = root * loss.gradient()
        noise = torch.randn(len(zero), generator=torch.Generator().manual_seed(0)).to(zero)
        start = start / (start.norm() or 1.0) + 0.1 * noise / noise.norm()
        if not bool(start.isfinite().all()):
            return math.inf
        found = [matrix for _, matrix, _ in islice(lanczos(product, start), self.max_products)]
        if not bool(found[-1].isfinite().all()):
            return math.inf
        return float(torch.linalg.eigvalsh(found[-1])[-1])  # never above the largest


def _settings(
    optimizer: torch.optim.Optimizer | OptimizerFactory,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
) -> tuple[Tensor, float]:
    """Learning rate and weight decay of each trained parameter, then of the pins; and max η κ."""
    made = optimizer
    if not isinstance(made, torch.optim.Optimizer):
        made = made(trained or [*model.parameters()])
    if not isinstance(made, torch.optim.SGD) or any(g["maximize"] for g in made.param_groups):
        raise RuleError(
            f"optimizer={type(made).__name__} of Stable: the limit is known only for a "
            "torch.optim.SGD that minimises; leave Stable out for others."
        )
    mine = {id(p) for p in model.parameters()}
    groups = [g for g in made.param_groups if any(id(p) in mine for p in g["params"])]
    if not groups:
        raise RuleError("optimizer of Stable has no parameters of the model; pass one that has.")
    kinds = {(float(g["momentum"]), bool(g["nesterov"])) for g in groups}
    if len(kinds) > 1 or not max(kinds)[0] < 1:
        raise RuleError(
            f"optimizer of Stable: its groups have (momentum, nesterov) {sorted(kinds)}, but the "
            "limit is known only for one momentum below 1."
        )
    momentum, nesterov = kinds.pop()
    by_parameter, largest = {}, (0.0, 0.0)
    for group in groups:
        # once the momentum has built up, a gradient counts 1 − dampening times
        damped = 1 - float(group["dampening"]) * (momentum != 0)
        setting = (float(group["lr"]) * damped, float(group["weight_decay"]))
        by_parameter |= dict.fromkeys(map(id, group["params"]), setting)
        largest = max(largest, setting)
    rows = [*(by_parameter.get(id(p), (0.0, 0.0)) for p in trained), largest]
    limit = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
    return torch.tensor(rows, dtype=torch.float64), limit
