"""A candidate, a layer that could be inserted; and a table of proposed ones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError, CandidateError


@dataclass(frozen=True)
class Candidate:
    """A layer that could be inserted.

    Attributes:
        after: Qualified name (as in `model.named_modules()`) of the submodule whose output is
            the site.
        block: A layer that is the identity at its pins; see `constrained_growth.blocks`. It is
            never changed: copies of it are measured and inserted.
        name: Unique in a problem; `after` by default.
        output: Which tensor is the site if the module returns a tuple, a dict or a dataclass: an
            index, a key or the name of an attribute. None (default): the output itself, or the
            first floating-point tensor in it.
    """

    after: str
    block: nn.Module
    name: str = ""
    output: int | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.after, str):
            raise CandidateError(
                f"after={self.after!r} is not a string; give the name of a submodule, such as '3'."
            )
        if not isinstance(self.block, nn.Module):
            raise BlockError(
                f"block={self.block!r} of the candidate after {self.after!r} is not an nn.Module; "
                "give an instance of one, such as cg.blocks.IdentityLinear(64, nn.ReLU())."
            )
        if isinstance(self.output, bool) or not isinstance(self.output, int | str | None):
            raise CandidateError(
                f"output={self.output!r} after {self.after!r} is neither an index, a name nor None."
            )
        if not self.name:
            object.__setattr__(self, "name", self.after)


class Proposals(tuple[Candidate, ...]):
    """A tuple of candidates that prints as a table, with the reason for each.

    Pass it to `GrowthProblem` as it is, or pick from it.

    Attributes:
        reasons: Candidate → why this block at this site.
        skipped: Qualified name of a module that was considered → why nothing is proposed after it.
    """

    reasons: Mapping[str, str]
    skipped: Mapping[str, str]

    def __new__(
        cls,
        candidates: Iterable[Candidate] = (),
        reasons: Mapping[str, str] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> Proposals:
        """The candidates with their reasons."""
        self = super().__new__(cls, candidates)
        self.reasons, self.skipped = dict(reasons or {}), dict(skipped or {})
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.reasons, self.skipped

    def __str__(self) -> str:
        rows = [("after", "block", "pinned", "why")]
        for candidate in self:
            pinned = sum(p.numel() for p in pinned_parameters(candidate.block).values())
            kind, why = type(candidate.block).__name__, self.reasons.get(candidate.name, "")
            rows.append((candidate.after, kind, f"{pinned:,}", why))
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        starts = [f"{row[0]:{wide[0]}}  {row[1]:{wide[1]}}  {row[2]:>{wide[2]}}" for row in rows]
        lines = [*_with_reasons(starts, [row[3] for row in rows])]
        if self.skipped:
            longest = max(map(len, self.skipped))
            starts = [f"{name:{longest}}" for name in self.skipped]
            lines += ["", "nothing proposed after"]
            lines += _with_reasons(starts, list(self.skipped.values()))
        return "\n".join(lines)


def _with_reasons(starts: Iterable[str], reasons: list[str]) -> Iterator[str]:
    """Lines with a last column of reasons; a long one is wrapped, and printed once."""
    last = ""
    for start, why in zip(starts, reasons, strict=True):
        parts = textwrap.wrap(why, max(40, 98 - len(start))) or [""]
        if len(parts) > 1 and why == last:
            parts = ["as above"]
        last = why
        yield f"{start}  {parts[0]}".rstrip()
        yield from (" " * (len(start) + 2) + part for part in parts[1:])
