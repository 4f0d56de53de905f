"""Proposed candidates, with what speaks for each: a tuple that prints as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from constrained_growth.blocks import pinned_parameters
from constrained_growth.candidates.candidate import Candidate


class Proposals(tuple[Candidate, ...]):
    """Candidates, with what speaks for each and what was passed over. Printed, a table.

    A tuple of candidates in all else: give it to `GrowthProblem` as it is, or pick from it.

    Attributes:
        reasons: Candidate → why this block there.
        skipped: Qualified name of a module that was looked at → why nothing is proposed there.
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
    """Lines with a last column of reasons; a long one is broken, and said once."""
    last = ""
    for start, why in zip(starts, reasons, strict=True):
        parts = textwrap.wrap(why, max(40, 98 - len(start))) or [""]
        if len(parts) > 1 and why == last:
            parts = ["as above"]
        last = why
        yield f"{start}  {parts[0]}".rstrip()
        yield from (" " * (len(start) + 2) + part for part in parts[1:])
