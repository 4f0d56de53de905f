"""What modules keep of what they have seen, by which one batch may bear on the next."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Kept = list[tuple[object, Any]]
"""Objects, and of those that may change their contents these."""


def is_watched(model: nn.Module) -> bool:
    """Whether a user's hooks stand on a model, which are to see each batch as it is."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )


def kept_in(*owners: object) -> Kept:
    """What running modules may change, to be compared by `is_as_before`.

    Buffers, other attributes that are no parameters, what lists and dicts there hold, and the
    state of the random numbers.

    Args:
        *owners: Modules; of anything else nothing is known.
    """
    found: list[object] = []
    for owner in owners:
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            for value in vars(module).values():
                if isinstance(value, Mapping):
                    found += value.values()
                elif isinstance(value, list | tuple | deque):
                    found += value
                else:
                    found.append(value)
    kept: Kept = [(value, _copied(value)) for value in found]
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    kept += [(None, state) for state in (torch.get_rng_state(), *devices)]
    name, keys, *place = np.random.get_state()  # noqa: NPY002
    return [*kept, (None, (random.getstate(), name, np.asarray(keys).tobytes(), place))]


def is_as_before(before: Kept, after: Kept) -> bool:
    """Whether nothing has changed of what is kept, from `kept_in`, as far as one can see."""
    try:
        return len(before) == len(after) and all(
            one is other and (torch.equal(x, y) if isinstance(x, Tensor) else x == y)
            for (one, x), (other, y) in zip(before, after, strict=True)
        )
    except RuntimeError:  # some kinds of tensors cannot be compared
        return False


def _copied(value: object) -> Tensor | None:
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return None
    return value.detach().clone()
