"""A candidate, a layer that could be inserted; and a table of proposed ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from constrained_growth._arguments import flag, instance
from constrained_growth._tables import Table, as_html, as_text
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError, CandidateError
from constrained_growth.solution import listed


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
        wrapped: True has the layer inserted around its site in any case. False (default) lets a
            copied block become the next element of the `nn.ModuleList` or `nn.Sequential` that
            its site is in, where that is the same network.

    Raises:
        CandidateError: `after`, `name`, `output` or `wrapped` is of the wrong type.
        BlockError: `block` is no `nn.Module`.
    """

    after: str
    block: nn.Module
    name: str = ""
    output: int | str | None = None
    wrapped: bool = False

    def __post_init__(self) -> None:
        fix = 'the name of a submodule, such as "3"'
        if not instance("after", self.after, str, CandidateError, fix):
            raise CandidateError(f'after="" is no submodule; give {fix}.')
        example = "an instance of one, such as cg.blocks.IdentityLinear(64, nn.ReLU())"
        instance("block", self.block, nn.Module, BlockError, example)
        if any(map(is_lazy, self.block.parameters())):
            raise BlockError(
                f"block={type(self.block).__name__} has parameters that are not initialised; run "
                "it on a tensor of its width first."
            )
        instance("name", self.name, str, CandidateError, "text, or leave it out")
        if isinstance(self.output, bool) or not isinstance(self.output, Integral | str | None):
            raise CandidateError(
                f"output={self.output!r} after {self.after!r} is neither an index, a name nor None."
            )
        flag("wrapped", self.wrapped, CandidateError)
        if isinstance(self.output, Integral):
            object.__setattr__(self, "output", int(self.output))  # of NumPy, say
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

    def __repr__(self) -> str:
        return f"Proposals({listed(repr(candidate.name) for candidate in self)})"

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        rows = list[tuple[str, ...]]()
        for candidate in self:
            new = sum(p.numel() for p in candidate.block.parameters())
            pinned = sum(p.numel() for p in pinned_parameters(candidate.block).values())
            kind, why = type(candidate.block).__name__, self.reasons.get(candidate.name, "")
            rows.append((candidate.after, kind, f"{new:,}", f"{pinned:,}", why))
        heads = ("after", "block", "parameters", "pinned", "why")
        found: list[str | Table] = [Table(rows, heads, numbers=(2, 3))]
        if self.skipped:
            found += ["", "nothing proposed after", Table(list(self.skipped.items()))]
        return found
