"""`bench decisions --family expansions`: small GPTs that learn another kind of text."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from constrained_growth.blocks import TransformerBlock
from constrained_growth.experiments.data import CHARACTERS, parted, random_windows, text
from constrained_growth.experiments.decisions.adaptation import (
    Adaptation,
    Origin,
    plan,
    quick,
)
from constrained_growth.experiments.decisions.study import run, tables
from constrained_growth.experiments.networks import Embed
from constrained_growth.experiments.training import Data, Training

__all__ = ["FULL", "QUICK", "run", "tables"]

_LENGTH, _WIDTH, _HEADS = 64, 64, 4
_FIRST, _LEARNT, _HELD_OUT = 6_000, 768, 128
"""Pieces of text."""


class _Logits(nn.Sequential):
    """(samples, positions, width) to (samples, characters, positions)."""

    def forward(self, input: Tensor) -> Tensor:  # as its base calls it
        return super().forward(input).mT


def _pieces(whole: Tensor, seed: int, learnt: int) -> tuple[Data, Data]:
    """Pieces from random places of nine tenths of a text, and held-out ones from the rest."""
    parts = zip(parted(whole), (learnt, _HELD_OUT), strict=True)
    train, held_out = (next(random_windows(part, n, _LENGTH, seed)) for part, n in parts)
    return train, held_out


def _adapted(name: str, seed: int) -> tuple[Data, Data]:
    if name != "alphabet":
        return _pieces(text(name), seed, _LEARNT)
    order = torch.randperm(CHARACTERS, generator=torch.Generator().manual_seed(seed))
    return _pieces(order[text("english")], seed, _LEARNT)


def _begin(blocks: int, seed: int) -> tuple[nn.Sequential, Data, Data]:
    body = [TransformerBlock(_WIDTH, _HEADS, causal=True) for _ in range(blocks)]
    for block in body:
        for linear in (block.qkv, block.fc1, block.proj, block.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    head = _Logits(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, CHARACTERS, bias=False))
    embed = Embed(CHARACTERS, _LENGTH, _WIDTH)
    return nn.Sequential(embed, *body, head), *_pieces(text("english"), seed, _FIRST)


def _copies(model: nn.Sequential) -> list[nn.Module]:
    """Of the block before each site, or after the first site, with its pins at zero."""
    copies = [copy.deepcopy(model[max(1, site)]) for site in range(len(model) - 1)]
    for block in copies:
        for name in TransformerBlock.pinned:
            nn.init.zeros_(block.get_parameter(name))
    return copies


TEXTS = {
    "program": "Python's own modules",
    "register": "the documentation of PyTorch",
    "alphabet": "the first text, its alphabet permuted",
}

ORIGINS = [
    Origin(
        f"gpt{blocks}",
        f"a GPT on characters, {blocks} blocks of width {_WIDTH}, trained on Python's help texts",
        partial(_begin, blocks),
        _copies,
        Training(steps=1_500, batch=16, lr=0.002),
    )
    for blocks in (4, 6)
]

TASKS = [
    Adaptation(
        f"{origin.name}-{name}{'' if frozen else '-all'}",
        about if frozen else f"{about}, all weights trained",
        origin,
        partial(_adapted, name),
        Training(steps=150, batch=12, lr=0.001),
        frozen,
        asked=256,
    )
    for origin in ORIGINS
    for frozen in (True, False)
    for name, about in TEXTS.items()
]

FULL = plan(TASKS, networks=5, runs=4)

QUICK = quick(TASKS, "gpt4-program", "gpt4-program-all")
