"""The state of whatever takes part in a run: of a `state_dict`, of generators, of loaders."""

from __future__ import annotations

from typing import Any

import torch

from constrained_growth._sites.untouched import generators_of
from constrained_growth.errors import CheckpointError


def state_of(thing: Any) -> Any:
    """What `give_state` puts back; nothing of what has none, such as a plain function."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if hasattr(thing, "state_dict"):
        return thing.state_dict()
    return [generator.get_state() for generator in generators_of(thing)]


def give_state(name: str, thing: Any, state: Any) -> None:
    """Put back what `state_of` gave.

    Raises:
        CheckpointError: It has another number of generators than it had; the message names it.
    """
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(state)
    else:
        generators = generators_of(thing)
        if len(generators) != len(state):
            raise CheckpointError(
                f"{name}: the checkpoint has the state of {len(state)} generators, and it has "
                f"{len(generators)}; make it as it was when it was saved."
            )
        for generator, kept in zip(generators, state, strict=True):
            generator.set_state(kept)
