"""A candidate: a site in a model and a block that could stand there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from constrained_growth.errors import BlockError, CandidateError


@dataclass(frozen=True)
class Candidate:
    """A layer that could be inserted.

    Attributes:
        after: Qualified name (as in `model.named_modules()`) of the submodule whose output is
            the site.
        block: A layer that is the identity at its pins; see `constrained_growth.blocks`. It is
            never changed: what is measured and inserted is a copy where it has to be moved.
        name: How the candidate is called; `after` by default. Unique in a problem.
        output: Which tensor of the module's output is the site, where that is a tuple, a dict or
            a dataclass: an index, a key or the name of an attribute. None (default): the output
            itself, or the first floating-point tensor in it.
    """

    after: str
    block: nn.Module
    name: str = ""
    output: int | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.after, str):
            raise CandidateError(
                f"after={self.after!r} is not a string; give the qualified name of a submodule, "
                'such as "3" or "encoder.layers.0".'
            )
        if not isinstance(self.block, nn.Module):
            raise BlockError(
                f"block={self.block!r} of the candidate after {self.after!r} is not an nn.Module; "
                "give an instance of one, such as cg.blocks.IdentityLinear(64, nn.ReLU())."
            )
        if isinstance(self.output, bool) or not isinstance(self.output, int | str | None):
            raise CandidateError(
                f"output={self.output!r} of the candidate after {self.after!r} is neither an "
                "index, nor a key or the name of an attribute, nor None for the first tensor."
            )
        if not self.name:
            object.__setattr__(self, "name", self.after)
