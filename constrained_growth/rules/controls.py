"""Rules that look at no sensitivity, to compare others with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from constrained_growth.errors import RuleError
from constrained_growth.solution import Decision, Sensitivity


@dataclass(frozen=True)
class Random:
    """Candidates drawn at random, all alike.

    The draw depends on the seed and on the names of the candidates alone, so that a rule decides
    the same about the same candidates; for another draw give another seed.

    Args:
        k: How many; all of them where there are fewer.
        seed: Of the draw.

    Raises:
        RuleError: k is not a positive whole number.

    Example:
        >>> Random(seed=1)({"a": Sensitivity(0.2), "b": Sensitivity(0.5)}).chosen
        ('b',)
    """

    k: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise RuleError(f"k={self.k!r} of Random is not a positive whole number.")

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The draw."""
        names = list(sensitivities)
        generator = random.Random(repr((self.seed, names)))
        chosen = tuple(generator.sample(names, min(self.k, len(names))))
        return Decision(chosen, f"drawn at random of {len(names)}")


@dataclass(frozen=True, init=False)
class Fixed:
    """Candidates known beforehand, by name or by their place in the problem.

    Args:
        *candidates: Names, or places as in a list: `Fixed(0)` takes the first candidate,
            `Fixed(-1)` the last one, `Fixed()` none.

    Raises:
        RuleError: Something is neither; or, when called, there is no such candidate.

    Example:
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5)}
        >>> Fixed(-1)(given).chosen, Fixed("a")(given).chosen
        (('b',), ('a',))
    """

    candidates: tuple[str | int, ...]

    def __init__(self, *candidates: str | int) -> None:
        for candidate in candidates:
            if not isinstance(candidate, str | int) or isinstance(candidate, bool):
                raise RuleError(f"candidate={candidate!r} of Fixed is neither a name nor a place.")
        object.__setattr__(self, "candidates", candidates)

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """These candidates."""
        names = tuple(sensitivities)
        chosen = [self._name(candidate, names) for candidate in self.candidates]
        return Decision(tuple(dict.fromkeys(chosen)), "fixed beforehand")

    def _name(self, candidate: str | int, names: tuple[str, ...]) -> str:
        if isinstance(candidate, str) and candidate in names:
            return candidate
        if isinstance(candidate, int) and -len(names) <= candidate < len(names):
            return names[candidate]
        raise RuleError(f"Fixed({candidate!r}): there is no such candidate; they are {names}.")
