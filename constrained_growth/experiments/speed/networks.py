"""Networks to measure the multiplier pass on, with a candidate at every block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments import networks
from constrained_growth.experiments.networks import Embed

INPUTS, CLASSES = 16, 10
PIXELS = 16
VOCABULARY, POSITIONS, HEADS = 96, 64, 4


@dataclass(frozen=True)
class Network:
    """A network, the layers that it could gain, its loss, and `draw(n)` for n random samples."""

    model: nn.Module
    candidates: tuple[cg.Candidate, ...]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def feedforward(depth: int, width: int) -> Network:
    """`depth` hidden ReLU layers, an identity layer after each."""
    # after He et al. (2015), so that the signal survives the depth
    model = networks.feedforward((INPUTS, *[width] * depth, CLASSES), he_init=True)
    candidates = tuple(
        cg.Candidate(str(2 * i + 1), cg.blocks.IdentityLinear(width, nn.ReLU()))
        for i in range(depth)
    )
    return Network(model, candidates, _vectors)


def residual(depth: int, width: int) -> Network:
    """`depth` residual blocks with two weights, one more such block after each, W₂ pinned."""
    blocks = [cg.blocks.ResidualMLP(width, width, torch.tanh) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(INPUTS, width), *blocks, nn.Linear(width, CLASSES))
    candidates = tuple(
        cg.Candidate(str(i + 1), cg.blocks.ResidualMLP(width, width, torch.tanh))
        for i in range(depth)
    )
    return Network(model, candidates, _vectors)


class NewConvolution(nn.Module):
    """x + W₂ relu(W₁x + b) with 3 × 3 convolutions, W₂ = 0 pinned; a user's block, as it were.

    Without a closed form, its multipliers come from differentiating it alone.
    """

    pinned = ("outer.weight",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, channels, height, width) to the same."""
        return x + self.outer(torch.relu(self.inner(x)))


def convolutional(depth: int, width: int) -> Network:
    """A residual ConvNet of `depth` blocks with `width` channels, a new block after each."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(cg.blocks.ResidualConv2d(width, nn.ReLU) for _ in range(depth)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )
    candidates = tuple(cg.Candidate(str(i + 1), NewConvolution(width)) for i in range(depth))
    return Network(model, candidates, _images)


def transformer(depth: int, width: int) -> Network:
    """GPT-style, `depth` blocks; after each a residual GELU network of four times the width."""
    model = nn.Sequential(
        Embed(VOCABULARY, POSITIONS, width),
        *(cg.blocks.TransformerBlock(width, HEADS, causal=True) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, VOCABULARY, bias=False),
    )
    candidates = tuple(
        cg.Candidate(str(i + 1), cg.blocks.ResidualMLP(width, 4 * width, nn.GELU()))
        for i in range(depth)
    )
    return Network(model, candidates, _tokens, _next_token_loss)


def with_all_built_in(model: nn.Module, candidates: tuple[cg.Candidate, ...]) -> nn.Module:
    """A copy of the model that contains all the blocks; only their pins are trainable."""
    extended = copy.deepcopy(model).requires_grad_(False)
    for candidate in candidates:
        block = copy.deepcopy(candidate.block).requires_grad_(False)
        for parameter in pinned_parameters(block).values():
            parameter.requires_grad_()
        site = extended.get_submodule(candidate.after)
        extended.set_submodule(candidate.after, nn.Sequential(site, block))
    return extended


def _vectors(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, INPUTS), torch.randint(CLASSES, (samples,))


def _images(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, PIXELS, PIXELS), torch.randint(CLASSES, (samples,))


def _tokens(samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (samples, POSITIONS + 1))
    return tokens[:, :-1], tokens[:, 1:]


def _next_token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
