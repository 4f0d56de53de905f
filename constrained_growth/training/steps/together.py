"""Several policies as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from constrained_growth.training.steps.protocol import Grown, Inserted


class Together:
    """Several policies as one, one after the other.

    Args:
        *policies: `NewLayers`, `LineSearch`, or functions of your own.

    Example:
        >>> from constrained_growth.training import LineSearch, NewLayers
        >>> policy = Together(NewLayers(warmup=50), LineSearch())
    """

    def __init__(self, *policies: Callable[[Any, Any], object]) -> None:
        self.policies = policies

    def __repr__(self) -> str:
        return f"Together({', '.join(map(repr, self.policies))})"

    def __call__(self, grower: Grown, one: Inserted) -> None:
        """Call all of them."""
        for policy in self.policies:
            policy(grower, one)

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Let those go on that were given a state."""
        for policy in self._with("watch"):
            policy.watch(model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Of those that remember something."""
        return {"policies": [policy.state_dict() for policy in self._with("state_dict")]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for policy, kept in zip(self._with("load_state_dict"), state["policies"], strict=True):
            policy.load_state_dict(kept)

    def _with(self, method: str) -> list[Any]:
        return [policy for policy in self.policies if hasattr(policy, method)]
