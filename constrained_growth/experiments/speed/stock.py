"""Ten models that people have, with random weights: stock architectures, most of Transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth.experiments.speed.subject import Subject

Batch = tuple[dict[str, Tensor], Tensor | None]

CLASSES = 100
"""Of images."""


@dataclass(frozen=True)
class Stock:
    """An architecture: its name, what it reads, the config, and a small one to see that it runs.

    `kind` is "tokens" for a language model, "pairs" for one with an encoder and a decoder, and
    "images"; `shape` of a batch: samples and tokens, or samples and pixels of a side. The config is
    of the class `family`Config of Transformers, the model of `family``head`.
    """

    name: str
    family: str
    head: str
    kind: Literal["tokens", "pairs", "images"]
    shape: tuple[int, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    small_shape: tuple[int, int] = (2, 8)

    def make(self, *, small: bool, batches: int, seed: int) -> Subject:
        """The model and its data, from random numbers of their own."""
        samples, size = self.small_shape if small else self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model(small=small)
            if self.kind == "images":
                data = [_images(samples, size) for _ in range(batches)]
            else:
                size_of = model.config.vocab_size
                data = [_tokens(samples, size, size_of) for _ in range(batches)]
        return Subject(model, _classes if self.kind == "images" else _own_loss, data)

    def model(self, *, small: bool) -> Any:
        """The model alone, in train mode."""
        if self.family == "VGG":
            return VGG((4, 4, None, 8) if small else VGG_11)
        return _transformers(f"{self.family}{self.head}")(self._config(small)).train()

    def _config(self, small: bool) -> Any:
        options = {**self.config, **(self.small if small else {})}
        if self.kind == "images":
            options["num_labels"] = CLASSES
        else:
            options["use_cache"] = False
        config = _transformers(f"{self.family}Config")(**options)
        # so that both passes compute the same; it is what most people train with today
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        return config


def _transformers(name: str) -> Any:
    import transformers  # its import takes seconds

    return getattr(transformers, name)


def _own_loss(output: Any, target: object) -> Tensor:
    return output.loss


def _classes(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, target)


def _tokens(samples: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(vocabulary, (samples, length))
    return {"input_ids": tokens, "labels": tokens}, None


def _images(samples: int, size: int) -> Batch:
    labels = torch.randint(CLASSES, (samples,))
    return {"pixel_values": torch.randn(samples, 3, size, size)}, labels


VGG_11 = 64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512


class VGG(nn.Module):
    """Convolutions with ReLUs, as torchvision's VGG 11 without its wide head."""

    def __init__(self, channels: Iterable[int | None]) -> None:
        super().__init__()
        layers, width = list[nn.Module](), 3
        for each in channels:
            if each is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, each, 3, padding=1), nn.ReLU()]
                width = each
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of shape (samples, classes)."""
        return self.head(self.features(pixel_values).mean((2, 3)))


_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 17}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
_STAGES = {"depths": [1, 2], "hidden_sizes": [8, 16], "num_channels": 3}

STOCK = (
    Stock(
        *("GPT-2 124M", "GPT2", "LMHeadModel", "tokens", (2, 256)),
        config={"bos_token_id": 0, "eos_token_id": 0},
        small={"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 16},
    ),
    Stock(
        *("Llama-like 100M", "Llama", "ForCausalLM", "tokens", (2, 256)),
        config={
            "vocab_size": 32000,
            "hidden_size": 640,
            "intermediate_size": 1728,
            "num_hidden_layers": 14,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
        },
        small=_TEXT | {"intermediate_size": 24, "num_key_value_heads": 1},
    ),
    Stock(
        *("OPT-125M", "OPT", "ForCausalLM", "tokens", (2, 256)),
        small=_TEXT
        | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
        | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    ),
    Stock(
        *("BERT-base", "Bert", "ForMaskedLM", "tokens", (2, 256)),
        small=_TEXT | {"intermediate_size": 24, "max_position_embeddings": 16},
    ),
    Stock(
        *("T5-small", "T5", "ForConditionalGeneration", "pairs", (2, 256)),
        config={"decoder_start_token_id": 0},
        small={
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 17,
        },
    ),
    Stock(
        *("ViT-B/16", "ViT", "ForImageClassification", "images", (8, 224)),
        small=_VISION | {"intermediate_size": 24, "patch_size": 4},
        small_shape=(2, 16),
    ),
    Stock(
        *("DINOv2-S/14", "Dinov2", "ForImageClassification", "images", (8, 224)),
        config={"hidden_size": 384, "num_attention_heads": 6},
        small=_VISION | {"patch_size": 4},
        small_shape=(2, 16),
    ),
    Stock(
        *("ResNet-50", "ResNet", "ForImageClassification", "images", (8, 224)),
        small=_STAGES | {"embedding_size": 8},
        small_shape=(4, 32),
    ),
    Stock(
        *("ConvNeXt-T", "ConvNext", "ForImageClassification", "images", (8, 224)),
        small=_STAGES | {"num_stages": 2},
        small_shape=(2, 32),
    ),
    Stock("VGG-11", "VGG", "", "images", (8, 224), small_shape=(2, 16)),
)

LLAMA_350M = replace(
    STOCK[1],
    name="Llama-like 350M",
    config={
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
)
"""For a GPU."""
