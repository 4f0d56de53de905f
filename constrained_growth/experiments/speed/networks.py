"""Networks to measure the multiplier pass on, with a candidate at every block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors, pinned_parameters

INPUTS, CLASSES = 16, 10
PIXELS = 16
VOCABULARY, POSITIONS, HEADS = 96, 64, 4


@dataclass(frozen=True)
class Network:
    """A network, what it is to learn, and the layers that it could gain.

    Attributes:
        model: The network as it is.
        candidates: The layers that it could gain.
        draw: `draw(n)` gives inputs and targets of n random samples.
        loss_fn: `loss_fn(output, target)`, a mean over the samples.
    """

    model: nn.Module
    candidates: tuple[cg.Candidate, ...]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def feedforward(depth: int, width: int) -> Network:
    """`depth` hidden ReLU layers, an identity layer after each."""
    layers: list[nn.Module] = [nn.Linear(INPUTS, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    for layer in layers[::2]:  # after He et al. (2015), so that deep ones are not silent
        nn.init.kaiming_normal_(layer.get_parameter("weight"), nonlinearity="relu")
    candidates = tuple(
        cg.Candidate(str(2 * i + 1), cg.blocks.IdentityLinear(width, nn.ReLU()))
        for i in range(depth)
    )
    return Network(model, candidates, _vectors)


class ResidualBlock(nn.Module):
    """x + W₂ tanh(W₁x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, width) to the same."""
        return x + self.outer(torch.tanh(self.inner(x)))


def residual(depth: int, width: int) -> Network:
    """`depth` residual blocks with two weights, one more such block after each, W₂ pinned."""
    blocks = [ResidualBlock(width) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(INPUTS, width), *blocks, nn.Linear(width, CLASSES))
    candidates = tuple(
        cg.Candidate(str(i + 1), cg.blocks.ResidualMLP(width, width, torch.tanh))
        for i in range(depth)
    )
    return Network(model, candidates, _vectors)


class ConvolutionBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), 3 × 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, channels, height, width) to the same."""
        return x + self.branch(x)


class NewConvolution(nn.Module):
    """x + W₂ relu(W₁x + b) with 3 × 3 convolutions, W₂ = 0 pinned; without a closed form.

    So its multipliers come from differentiating it alone, as for any block of a user's own.
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


class NewPointwiseConvolution(nn.Module):
    """x + W₂ relu(W₁x + b) with 1 × 1 convolutions, W₂ = 0 pinned; with a closed form."""

    pinned = ("outer",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 1)
        self.outer = nn.Parameter(torch.zeros(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, channels, height, width) to the same."""
        return x + F.conv2d(torch.relu(self.inner(x)), self.outer[:, :, None, None])

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = δ, φ = relu(W₁x + b), with the positions before the channels."""
        psi, phi = (t.flatten(2).mT for t in (delta, torch.relu(self.inner(x))))
        return (AffineFactors("outer", None, psi, phi),)


def convolutional(
    depth: int, width: int, block: Callable[[int], nn.Module] = NewConvolution
) -> Network:
    """A residual ConvNet of `depth` blocks with `width` channels, a new block after each."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(ConvolutionBlock(width) for _ in range(depth)),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )
    candidates = tuple(cg.Candidate(str(i + 1), block(width)) for i in range(depth))
    return Network(model, candidates, _images)


def pointwise(depth: int, width: int) -> Network:
    """The same ConvNet with 1 × 1 convolutions as candidates."""
    return convolutional(depth, width, NewPointwiseConvolution)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, positions, width) to the same."""
        parts = self.mixed(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a GELU network of four times the width, each after a normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width))
        self.network = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (samples, positions, width) to the same."""
        x = x + self.attention(x)
        return x + self.network(x)


class Embedding(nn.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(POSITIONS, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (samples, positions) to (samples, positions, width)."""
        return self.tokens(tokens) + self.positions


def transformer(depth: int, width: int) -> Network:
    """GPT-style, `depth` blocks; after each a residual GELU network of four times the width."""
    model = nn.Sequential(
        Embedding(width),
        *(TransformerBlock(width) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, VOCABULARY, bias=False),
    )
    candidates = tuple(
        cg.Candidate(str(i + 1), cg.blocks.ResidualMLP(width, 4 * width, nn.GELU()))
        for i in range(depth)
    )
    return Network(model, candidates, _tokens, _next_token_loss)


def with_all_built_in(model: nn.Module, candidates: tuple[cg.Candidate, ...]) -> nn.Module:
    """A copy of the model in which all the blocks really stand, only their pins trainable."""
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
