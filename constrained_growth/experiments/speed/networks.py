"""Networks to measure the multiplier pass on, with a candidate at every block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments import networks
from constrained_growth.experiments.networks import Embed
from constrained_growth.experiments.speed.subject import Subject

INPUTS, CLASSES = 16, 10
PIXELS = 16
VOCABULARY, POSITIONS, HEADS = 96, 64, 4


def feedforward(depth: int, width: int, samples: int) -> Subject:
    """`depth` hidden ReLU layers, an identity layer after each."""
    # after He et al. (2015), so that the signal survives the depth
    model = networks.feedforward((INPUTS, *[width] * depth, CLASSES), he_init=True)
    blocks = [cg.blocks.IdentityLinear(width, nn.ReLU()) for _ in range(depth)]
    return _subject(model, range(1, 2 * depth, 2), blocks, _vectors(samples))


def residual(depth: int, width: int, samples: int) -> Subject:
    """`depth` residual blocks with two weights, one more such block after each, W₂ pinned."""
    old, new = (
        [cg.blocks.ResidualMLP(width, width, torch.tanh) for _ in range(depth)] for _ in range(2)
    )
    model = nn.Sequential(nn.Linear(INPUTS, width), *old, nn.Linear(width, CLASSES))
    return _subject(model, range(1, depth + 1), new, _vectors(samples))


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


def convolutional(depth: int, width: int, samples: int) -> Subject:
    """A residual ConvNet of `depth` blocks with `width` channels, a new block after each."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(cg.blocks.ResidualConv2d(width, nn.ReLU) for _ in range(depth)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )
    blocks = [NewConvolution(width) for _ in range(depth)]
    images = torch.randn(samples, 3, PIXELS, PIXELS), torch.randint(CLASSES, (samples,))
    return _subject(model, range(1, depth + 1), blocks, images)


def transformer(depth: int, width: int, samples: int) -> Subject:
    """GPT-style, `depth` blocks; after each a residual GELU network of four times the width."""
    body, blocks = _blocks(depth, width, causal=True)
    ends = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
    model = nn.Sequential(Embed(VOCABULARY, POSITIONS, width), *body, *ends)
    tokens = torch.randint(VOCABULARY, (samples, POSITIONS + 1))
    data = tokens[:, :-1], tokens[:, 1:]
    return _subject(model, range(1, depth + 1), blocks, data, _next_token_loss)


def vision(depth: int, width: int, samples: int) -> Subject:
    """ViT-style on patches of 4 × 4 pixels, with the blocks and candidates of `transformer`."""
    body, blocks = _blocks(depth, width, causal=False)
    model = nn.Sequential(
        nn.Conv2d(3, width, 4, stride=4),
        nn.Flatten(2),
        Transposed(),
        *body,
        nn.LayerNorm(width),
        Pooled(),
        nn.Linear(width, CLASSES),
    )
    images = torch.randn(samples, 3, PIXELS, PIXELS), torch.randint(CLASSES, (samples,))
    return _subject(model, range(3, depth + 3), blocks, images)


class Transposed(nn.Module):
    """(samples, channels, positions) to (samples, positions, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """The last two dimensions the other way round."""
        return x.mT


class Pooled(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """(samples, positions, channels) to (samples, channels)."""
        return x.mean(1)


def _blocks(depth: int, width: int, *, causal: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    old = [cg.blocks.TransformerBlock(width, HEADS, causal=causal) for _ in range(depth)]
    return [*old], [cg.blocks.ResidualMLP(width, 4 * width, nn.GELU()) for _ in range(depth)]


def _subject(
    model: nn.Module,
    sites: Iterable[int],
    blocks: Iterable[nn.Module],
    data: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Subject:
    pairs = zip(map(str, sites), blocks, strict=True)
    return Subject(model, loss_fn, [data], [cg.Candidate(*pair) for pair in pairs])


def with_all_built_in(subject: Subject) -> Subject:
    """With a copy of the model that contains all the blocks; only their pins are trainable."""
    extended = copy.deepcopy(subject.model).requires_grad_(False)
    for candidate in subject.candidates:
        block = copy.deepcopy(candidate.block).requires_grad_(False)
        for parameter in pinned_parameters(block).values():
            parameter.requires_grad_()
        site = extended.get_submodule(candidate.after)
        extended.set_submodule(candidate.after, nn.Sequential(site, block))
    return Subject(extended, subject.loss_fn, subject.data, subject.candidates)


def _vectors(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, INPUTS), torch.randint(CLASSES, (samples,))


def _next_token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
