"""One candidate by short real trainings: successive halving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import data_again, flag, instance, number, positive_int
from constrained_growth._data import batch_size, counted
from constrained_growth._distributed import several
from constrained_growth._progress import progress_bar
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth._sites.snapshot import deepcopied
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.curvature import FORWARD_PASSES, mean_over, stand
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import OptimizerFactory, check_optimizer, check_question
from constrained_growth.solution import Decision, Planned, Solution

NOTHING = "(nothing)"
"""The name in the evidence of the copy without a new layer."""


@dataclass(frozen=True)
class Trial:
    """The candidate that trains best for some steps, if it beats inserting nothing.

    Copies of the model, each with one candidate at its pins or with none, are trained on the same
    batches with the same random numbers. The best 1/η of the candidates train η times as long,
    until one is left; it is chosen if its loss is below that of the copy without a new layer.
    This is the expensive brute force to compare other rules with.

    The evidence holds `rungs`, a list of {"steps": number, "losses": {name: loss}}, the `losses`
    of the last rung, and `passes`.

    Args:
        steps: For how many steps the last candidate is trained.
        optimizer: The optimizer that trains the model now, to go on from its state (the new
            parameters get the settings of its last group); or a function that makes a fresh one
            from parameters, such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        eta: η, above 1; 3 as in the source. Infinite: every candidate is trained for all steps.
        data: Batches on which the losses are compared; those of the problem by default.
        seed: Of the order in which a list of batches is read.
        progress: Progress bar: True, False, or None (default) for on a terminal, after a second.

    Raises:
        RuleError: An argument is out of range, the optimizer is another model's, or there are
            several processes.

    Source:
        Jamieson and Talwalkar, arXiv 1502.07943.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(4)]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> rule = Trial(20, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        >>> sorted(cg.solve(problem, rule=rule).decision.evidence["losses"])
        ['(nothing)', '1']
    """

    steps: int
    optimizer: torch.optim.Optimizer | OptimizerFactory
    _: KW_ONLY
    eta: float = 3.0
    data: Iterable[Any] | None = None
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        positive_int("steps", self.steps, RuleError)
        check_optimizer(self.optimizer, "Trial")
        number("eta", self.eta, RuleError, "(1, inf]")
        instance("seed", self.seed, Integral, RuleError, "a whole number")
        flag("progress", self.progress, RuleError, optional=True)
        if self.data is not None:
            data_again("data", self.data)

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The winner, or nothing."""
        check_question(problem, solution)
        if several(problem.group):
            raise RuleError("Trial does not run on several processes; use another rule.")
        if isinstance(self.optimizer, torch.optim.Optimizer):
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if trained.isdisjoint(map(id, problem.model.parameters())):
                raise RuleError(
                    "optimizer of Trial has no parameters of the model; pass one that has."
                )
        left = list(solution.sensitivities)
        if not left:
            return Decision((), "no candidates")
        numbers = [len(left)]  # of the candidates that are trained in each rung
        while numbers[-1] > 1 and math.isfinite(self.eta):
            numbers.append(max(1, int(numbers[-1] / self.eta)))
        rungs, losses, done = [], dict[str, float](), 0
        data = problem.data if self.data is None else self.data
        cuda = {p.device.index for p in problem.model.parameters() if p.device.type == "cuda"}
        bar = progress_bar(total=self.steps, desc="trial", unit="step", progress=self.progress)
        standing = ExitStack()
        with (
            untouched(problem.model, problem.loss_fn, problem.data, data),
            differentiable(),
            bar,
            standing,
        ):
            copies = {n: _Copy(problem, self, solution.candidates[n], standing) for n in left}
            copies[NOTHING] = _Copy(problem, self, None, standing)
            stream = _endless(problem, self.seed)
            for rung, number in enumerate(numbers):
                left = sorted(left, key=lambda name: losses.get(name, 0.0))[:number]
                steps = max(1, round(self.steps / self.eta ** (len(numbers) - 1 - rung)))
                for batch in itertools.islice(stream, steps - done):
                    # the same random numbers for all candidates, or luck would decide
                    for name in left:
                        with torch.random.fork_rng(devices=cuda):
                            copies[name].step(*batch)
                    copies[NOTHING].step(*batch)  # this one advances the random state
                    bar.update()
                done = steps
                losses = {name: copies[name].loss(data) for name in (*left, NOTHING)}
                finite = {n: loss if math.isfinite(loss) else None for n, loss in losses.items()}
                rungs.append({"steps": steps, "losses": finite})
        passes = sum(one.samples for one in copies.values()) / solution.num_samples
        evidence = {"losses": rungs[-1]["losses"], "rungs": rungs, "passes": passes}
        best = min(left, key=lambda name: losses[name])
        if losses[best] < losses[NOTHING]:
            reason = f"loss {losses[best]:.3g}, without a new layer {losses[NOTHING]:.3g}"
            return Decision((best,), reason, evidence=evidence)
        return Decision((), f'"{best}" ends no lower than inserting nothing', evidence=evidence)


class _Copy:
    """A copy of the model, with a layer at its pins or without one, and its optimizer."""

    def __init__(
        self, problem: GrowthProblem, rule: Trial, planned: Planned | None, standing: ExitStack
    ) -> None:
        given = rule.optimizer if isinstance(rule.optimizer, torch.optim.Optimizer) else None
        self.model, optimizer = deepcopied((problem.model, given))
        self.parts, self.problem, self.samples = nn.ModuleList([self.model]), problem, 0.0
        if planned is not None:
            block = deepcopied(planned.block)
            self.parts.append(block)
            standing.enter_context(stand(self.model, planned, block))
        if optimizer is None:
            trained = [p for p in self.parts.parameters() if p.requires_grad]
            optimizer = rule.optimizer(trained)  # type: ignore[operator]
        elif planned is not None:
            group = {**optimizer.param_groups[-1]}
            named = group.pop("param_names", None) is not None  # then the new ones need names too
            new = [(f"(trial).{n}", p) for n, p in self.parts[1].named_parameters()]
            group["params"] = [(n, p) if named else p for n, p in new if p.requires_grad]
            optimizer.add_param_group(group)
        self.optimizer = optimizer

    def step(self, input: Any, target: Any) -> None:
        """One step of training, in training mode also where the user's model is in eval mode."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = checked_loss(self.problem.loss_fn(call(self.model, input), target))
            loss.backward()
            self.samples += batch_size(input, target)
            return loss

        modes = [(module, module.training) for module in self.parts.modules()]
        if not self.model.training:  # otherwise single modules may be in eval mode on purpose
            self.parts.train()
        self.optimizer.step(closure)  # type: ignore[arg-type]
        for module, training in modes:
            module.training = training

    def loss(self, data: Iterable[Any]) -> float:
        """The mean loss; infinite if it is not a number."""

        def one(input: Any, target: Any) -> Tensor:
            self.samples += FORWARD_PASSES * batch_size(input, target)
            return checked_loss(self.problem.loss_fn(call(self.model, input), target))

        with untouched(self.model):
            loss = float(mean_over(data, self.problem, one))
        return loss if math.isfinite(loss) else math.inf


def _endless(problem: GrowthProblem, seed: int) -> Iterator[tuple[Any, Any]]:
    """The batches again and again; a list of them in another order each time."""
    generator, data = torch.Generator().manual_seed(seed), problem.data
    while True:
        read: Iterable[Any] = data
        if isinstance(data, Sequence):
            read = [data[i] for i in torch.randperm(len(data), generator=generator).tolist()]
        for input, target, _ in counted(read, device_of(problem.model), problem.weight):
            yield input, target
