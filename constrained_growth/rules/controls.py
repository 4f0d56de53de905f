"""Rules that ask no multipliers: what people do without them, and what a rule has to beat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from torch import Tensor, nn

from constrained_growth._arguments import data_again, instance, positive_int
from constrained_growth._sites.model import call, checked_loss
from constrained_growth._sites.outputs import tensor_in, with_tensor
from constrained_growth._sites.site import Site
from constrained_growth.curvature import mean_over
from constrained_growth.errors import CandidateError, RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import check_question, check_sensitivities
from constrained_growth.solution import Decision, Sensitivity, Solution

Where = Literal["first", "last", "middle", "interleaved", "upper"]


@dataclass(frozen=True)
class Random:
    """Candidates drawn uniformly at random, as a control.

    Args:
        k: How many; all candidates if there are fewer.
        seed: The draw depends only on it and on the names of the candidates.

    Example:
        >>> Random(seed=1)({"a": Sensitivity(0.2), "b": Sensitivity(0.5)}).chosen
        ('b',)
    """

    k: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        positive_int("k", self.k, RuleError)
        instance("seed", self.seed, Integral, RuleError, "a whole number")

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The draw."""
        check_sensitivities(sensitivities)
        names = list(sensitivities)
        # by its text: the hash of a tuple of strings differs from process to process
        generator = random.Random(repr((self.seed, names)))
        chosen = tuple(generator.sample(names, min(self.k, len(names))))
        return Decision(chosen, f"drawn at random of {len(names)}")


@dataclass(frozen=True, init=False)
class Fixed:
    """Candidates fixed in advance, by name or by index in the problem.

    Args:
        *candidates: Names, or indices as into a list: `Fixed(-1)` takes the last, `Fixed()` none.

    Raises:
        RuleError: An argument is neither; or, when called, there is no such candidate.

    Example:
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5)}
        >>> Fixed(-1)(given).chosen, Fixed("a")(given).chosen
        (('b',), ('a',))
    """

    candidates: tuple[str | int, ...]

    def __init__(self, *candidates: str | int) -> None:
        for candidate in candidates:
            if not isinstance(candidate, str | int) or isinstance(candidate, bool):
                raise RuleError(
                    f"candidates: {candidate!r} of Fixed is neither a name nor an index."
                )
        object.__setattr__(self, "candidates", candidates)

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """These candidates."""
        check_sensitivities(sensitivities)
        names = tuple(sensitivities)
        by_index = {i: names[i] for i in range(-len(names), len(names))}
        known: dict[str | int, str] = by_index | {name: name for name in names}
        for candidate in self.candidates:
            if candidate not in known:
                raise RuleError(f"Fixed({candidate!r}): no such candidate; they are {names}.")
        chosen = dict.fromkeys(known[candidate] for candidate in self.candidates)
        return Decision(tuple(chosen), "fixed in advance")


@dataclass(frozen=True)
class Placed:
    """Places by a rule of thumb, in the order of the candidates in the problem.

    Args:
        where: "first", "last" or "middle": the first, the last, the middle k candidates;
            "interleaved": the last candidate of each of k equal parts; "upper": the same within
            the upper half, or the last k if they are more than half.
        k: How many; all candidates if there are fewer.

    Raises:
        RuleError: `where` is none of these, or k is not a positive whole number.

    Source:
        "interleaved": LLaMA-Pro, arXiv 2401.02415; "upper": OpT-DeUS, arXiv 2508.08011; "middle":
        MIDAS, Saunshi et al. 2024.

    Example:
        >>> given = {name: Sensitivity(0.0) for name in "abcdef"}
        >>> Placed("interleaved", k=2)(given).chosen, Placed("middle", k=2)(given).chosen
        (('c', 'f'), ('c', 'd'))
    """

    where: Where
    k: int = 1

    def __post_init__(self) -> None:
        if self.where not in get_args(Where):
            raise RuleError(f"where={self.where!r} of Placed is none of {get_args(Where)}.")
        positive_int("k", self.k, RuleError)

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The candidates there."""
        check_sensitivities(sensitivities)
        names = tuple(sensitivities)
        n, k = len(names), min(self.k, len(names))
        half = n // 2 if k <= n // 2 else k
        start, stop = {
            "first": (0, k),
            "middle": ((n - k) // 2, (n - k) // 2 + k),
            "last": (n - k, n),
            "interleaved": (0, n),
            "upper": (n - half, n),
        }[self.where]
        places = [start + (i + 1) * (stop - start) // k - 1 for i in range(k)]
        return Decision(tuple(names[i] for i in places), f"{self.where} of {len(sensitivities)}")


@dataclass(frozen=True)
class LeastImportant:
    """After the modules that matter least for other data, such as those of the old task.

    A module matters by how much the loss on these data rises when it is skipped: its output is
    replaced by its input. A module that changes the shape of its input cannot be, and is not
    chosen. One forward pass over the data for each site, and one more.

    Args:
        data: Batches (input, target), as those of a problem.
        k: How many; fewer if there are not so many modules that can be skipped.

    Raises:
        DataError: `data` cannot be read more than once; or, when called, holds nothing.
        RuleError: k is not a positive whole number.

    Source:
        ADEPT, arXiv 2510.10071.
    """

    data: Iterable[Any]
    k: int = 1

    def __post_init__(self) -> None:
        data_again("data", self.data)
        positive_int("k", self.k, RuleError)

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The candidates after these modules; how much each loss rises is the evidence."""
        check_question(problem, solution)
        before, rise = self._loss(problem, None), dict[str, float]()
        for site in problem.sites:
            with suppress(CandidateError):  # it cannot be skipped
                skipped = self._loss(problem, site)
                asked = [name for name in site.blocks if name in solution.sensitivities]
                rise |= dict.fromkeys(asked, skipped - before)
        chosen = tuple(sorted(rise, key=rise.__getitem__)[: self.k])
        reason = f"least important of {len(rise)} for the data given"
        return Decision(chosen, reason, evidence={"rise": rise})

    def _loss(self, problem: GrowthProblem, skipped: Site | None) -> float:
        """The mean loss, without a site; a CandidateError if that cannot be skipped."""

        def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            assert skipped is not None
            x, y = tensor_in((args, kwargs)), tensor_in(output, skipped.output)
            if x.shape != y.shape:
                raise CandidateError(f"after={skipped.after!r}: {x.shape} turns into {y.shape}.")
            return with_tensor(output, skipped.output, x)

        def loss(input: Any, target: Any) -> Tensor:
            return checked_loss(problem.loss_fn(call(problem.model, input), target))

        module = nn.Module() if skipped is None else skipped.module
        with module.register_forward_hook(skip, with_kwargs=True):
            return float(mean_over(self.data, problem, loss))
