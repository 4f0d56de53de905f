"""Wrong arguments: blocks."""

from typing import Any

import torch
from table import INF, Row, nothing
from torch import nn

from constrained_growth import blocks

OPTIONS: dict[str, tuple[Any, ...]] = {
    "device": ("nowhere", [3]),
    "dtype": ("float", torch.int32, [3]),
}

ROWS: dict[str, Row] = {
    "IdentityLinear": Row(
        blocks.IdentityLinear,
        lambda s: {"width": 4, "activation": nn.ReLU()},
        {"width": "count", "activation": "activation", "shift": "number"},
        optional=("shift",),
        more={**OPTIONS, "shift": (INF,)},
    ),
    "ResidualLinear": Row(
        blocks.ResidualLinear,
        lambda s: {"width": 4, "activation": torch.tanh},
        {"width": "count", "activation": "activation"},
        more=OPTIONS,
    ),
    "ResidualMLP": Row(
        blocks.ResidualMLP,
        lambda s: {"width": 4, "hidden": 3, "activation": torch.tanh},
        {"width": "count", "hidden": "count", "activation": "activation", "inner_init": "number"},
        more={**OPTIONS, "pinned": ("both", 1, None), "inner_init": (torch.ones(2),)},
    ),
    "IdentityConv2d": Row(
        blocks.IdentityConv2d,
        lambda s: {"channels": 4, "activation": nn.ReLU()},
        {
            "channels": "count",
            "activation": "activation",
            "kernel_size": "count",
            "shift": "number",
        },
        optional=("shift",),
        more={**OPTIONS, "kernel_size": (2,)},
    ),
    **{
        block.__name__: Row(
            block,
            lambda s: {"channels": 4, "activation": nn.ReLU()},
            {
                "channels": "count",
                "activation": "activation",
                "hidden": "count",
                "kernel_size": "count",
                "norm_layer": "function",
            },
            optional=("hidden", "norm_layer"),
            more={**OPTIONS, "pinned": ("both", 1), "norm_layer": (nn.ReLU,)},
        )
        for block in (blocks.ResidualConv2d, blocks.ResidualBottleneck2d)
    },
    "TransformerBlock": Row(
        blocks.TransformerBlock,
        lambda s: {"width": 4, "heads": 2},
        {
            "width": "count",
            "heads": "count",
            "hidden": "count",
            "activation": "activation",
            "causal": "bool",
        },
        optional=("hidden",),
        more={**OPTIONS, "heads": (3,)},
    ),
    "GatedMLP": Row(
        blocks.GatedMLP,
        lambda s: {"width": 4, "hidden": 3},
        {"width": "count", "hidden": "count", "activation": "activation", "eps": "positive"},
        more=OPTIONS,
    ),
    "TanhLU": Row(blocks.TanhLU, nothing, {"eps": "positive"}),
    "CopiedBlock": Row(
        blocks.CopiedBlock,
        lambda s: {
            "module": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
        },
        {"module": "model", "pinned": "name", "kwargs": "mapping"},
        optional=("pinned", "kwargs"),
        more={"pinned": (["nothing.weight"], [5]), "args": (5,), "share": ("yes", None)},
    ),
    "register": Row(
        blocks.register,
        lambda s: {"kind": blocks.ResidualMLP},
        {},
        more={"kind": (None, 5, "ResidualMLP", nn.ReLU, nn.ReLU())},
    ),
    "pinned_parameters": Row(
        blocks.pinned_parameters, lambda s: {"block": s.candidate.block}, {"block": "module"}
    ),
}
