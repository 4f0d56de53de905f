"""Parts of networks that several experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def feedforward(
    widths: Sequence[int], *, he_init: bool = False, dtype: torch.dtype | None = None
) -> nn.Sequential:
    """Linear layers from input to output of these widths, with ReLU between them.

    With `he_init`, weights are drawn after He et al. (2015) and biases are zero.
    """
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after, dtype=dtype)
        if he_init:
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Embed(nn.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(samples, positions) to (samples, positions, width)."""
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]
