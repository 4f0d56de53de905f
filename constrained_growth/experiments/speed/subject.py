"""A model to time: ordinary gradient passes, and decisions beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import constrained_growth as cg


@dataclass(frozen=True)
class Subject:
    """A model in train mode, its loss, and batches; without random numbers in the forward pass.

    Inputs that are dicts are keyword arguments of the model.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    data: Sequence[tuple[Any, Any]]
    candidates: Sequence[cg.Candidate] = ()

    def loss(self, input: Any, target: Any) -> Tensor:
        """Of a batch."""
        output = self.model(**input) if isinstance(input, dict) else self.model(input)
        return self.loss_fn(output, target)

    def plain_pass(self) -> None:
        """An ordinary gradient pass."""
        for batch in self.data:
            self.model.zero_grad()
            self.loss(*batch).backward()

    def pass_and_free(self) -> None:
        """One that leaves no gradients, so that those of each pass count for its memory."""
        self.plain_pass()
        self.model.zero_grad()

    def first(self) -> Subject:
        """The same with one batch."""
        return replace(self, data=self.data[:1])

    def to(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """The same on a device, its floating-point tensors in a dtype."""

        def moved(part: Any) -> Any:
            if isinstance(part, dict):
                return {key: moved(value) for key, value in part.items()}
            if part is None:
                return None
            return part.to(device, dtype if part.is_floating_point() else None)

        for candidate in self.candidates:
            candidate.block.to(device, dtype)
        data = [(moved(input), moved(target)) for input, target in self.data]
        return replace(self, model=self.model.to(device, dtype), data=data)

    def problem(self, data: Iterable[tuple[Any, Any]] | None = None) -> cg.GrowthProblem:
        """Of the candidates on these data, or on other batches of them."""
        data = self.data if data is None else data
        return cg.GrowthProblem(self.model, self.loss_fn, data, self.candidates)


def solving(
    problem: cg.GrowthProblem,
    norm: Any = None,
    *,
    stationarity: bool = False,
    multipliers: bool = True,
) -> Callable[[], cg.Solution]:
    """A decision as a function to time; None is the recommended norm."""
    options: Any = {"stationarity": stationarity, "multipliers": multipliers, "progress": False}
    return lambda: cg.solve(problem, norm=norm, **options)
