"""What a policy is told after an insertion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Grown(Protocol):
    """What a policy is told about: a `Grower`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[Any, Any], Tensor]
    data: Iterable[Any]


class Inserted(Protocol):
    """What was inserted: a `Round` of the history."""

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Names of parameters."""
        ...
