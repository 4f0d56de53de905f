"""Copies of a model that grow with it, such as averages of its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim.swa_utils import AveragedModel

from constrained_growth._sites.model import parameter_shapes
from constrained_growth.errors import CandidateError

Copies = nn.Module | Sequence[nn.Module]


def as_copies(averaged: object) -> tuple[nn.Module, ...]:
    """A tuple of one copy, several or none, as given."""
    given = (averaged,) if isinstance(averaged, nn.Module) else averaged
    if not isinstance(given, Sequence) or not all(isinstance(one, nn.Module) for one in given):
        raise CandidateError(f"averaged={averaged!r:.80} is no copy of the model, nor several.")
    return tuple(given)


def grown_in(copy: nn.Module) -> nn.Module:
    """The module that grows: the one within an `AveragedModel`."""
    return copy.module if isinstance(copy, AveragedModel) else copy


def checked_copies(model: nn.Module, averaged: object) -> list[nn.Module]:
    """The modules that grow with the model; refuse what is no copy of it."""
    copies = [grown_in(one) for one in as_copies(averaged)]
    for one in copies:
        shared = {id(p) for p in model.parameters()} & {id(p) for p in one.parameters()}
        if shared or parameter_shapes(one) != parameter_shapes(model):
            fault = (
                "shares parameters with"
                if shared
                else "differs in parameters, by name and shape, from"
            )
            raise CandidateError(
                f"averaged={type(one).__name__} {fault} the model; give a copy of it."
            )
    return copies
