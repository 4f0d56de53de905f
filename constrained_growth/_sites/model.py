"""Calling a user's model and loss, and what the model is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._distributed import unwrapped
from constrained_growth.errors import DataError


def call(model: Callable[..., Any], input: object) -> Any:
    """`model(input)`, with a tuple spread as positional and a dict as keyword arguments."""
    model = unwrapped(model)
    if isinstance(input, Mapping):
        return model(**input)
    if isinstance(input, tuple | list):
        return model(*input)
    return model(input)


def checked_loss(loss: object) -> Tensor:
    """The loss, if it is a scalar tensor.

    Raises:
        DataError: It is not.
    """
    if not isinstance(loss, Tensor):
        raise DataError(
            f"loss_fn returned a {type(loss).__name__}, not a scalar tensor; it is called as "
            "loss_fn(model output, target)."
        )
    if loss.dim() != 0:
        raise DataError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar; use the mean "
            'over the samples (reduction="mean").'
        )
    return loss


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters of a module."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's parameters (or else buffers) are; None if it has neither."""
    tensor = next(tensors_of(model), None)
    return None if tensor is None else tensor.device


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Its parameters, then its buffers."""
    return itertools.chain(model.parameters(), model.buffers())
