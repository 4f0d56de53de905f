"""A stack of residual blocks, and layers to put into it."""

from typing import Any

from helpers import CROSS_ENTROPY, choose, solved
from torch import Tensor, nn
from torch.optim import Optimizer

import constrained_growth as cg
from constrained_growth.blocks import CopiedBlock, ResidualMLP


class Residual(nn.Module):
    """x + W₂ tanh(W₁ norm(x))."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.Tanh()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.act(self.inner(self.norm(x))))


class Stack(nn.Module):
    """A stem, a list of residual blocks, a head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(after: str, name: str = "") -> cg.Candidate:
    return cg.Candidate(after, ResidualMLP(4, 3, nn.GELU()), name=name or f"mlp {after}")


def copied(model: nn.Module, after: str, name: str = "") -> cg.Candidate:
    return cg.Candidate(after, CopiedBlock(model.get_submodule(after)), name=name)


def plan(model: nn.Module, data: Any, *candidates: cg.Candidate) -> cg.Solution:
    return solved(model, data, *candidates, rule=choose(*(one.name for one in candidates)))


def both(model: nn.Module, data: Any) -> cg.Solution:
    """A layer around the stem, and one more in the list."""
    return plan(model, data, mlp("stem"), copied(model, "blocks.0"))


def steps(model: nn.Module, data: Any, *optimizers: Optimizer, count: int = 3) -> None:
    for _ in range(count):
        for x, y in data:
            for one in optimizers:
                one.zero_grad()
            CROSS_ENTROPY(model(x), y).backward()
            for one in optimizers:
                one.step()


def homes(*optimizers: Optimizer) -> dict[int, Optimizer]:
    return {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
