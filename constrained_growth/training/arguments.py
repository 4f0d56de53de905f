"""What `Grower` and `grow` can be given, checked before the first step of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from constrained_growth.candidates import Candidate
from constrained_growth.errors import TrainingError
from constrained_growth.rules import Plateau, needs_model


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse the first of the arguments that is not what it has to be; others are passed over."""
    for name, value in given.items():
        fits, wanted = _WANTED.get(name, (None, ""))
        if fits is not None and not fits(value) and not (value is None and "None" in wanted):
            raise TrainingError(f"{name}={value!r:.80} is not {wanted}.")


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _has(name: str) -> Callable[[Any], bool]:
    return lambda value: callable(getattr(value, name, None))


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Integral) and value >= least and not isinstance(value, bool)
    )


def _function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)  # TopK makes a rule, and is none


def _batches(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, Iterator | Tensor | Mapping | str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and all(map(fits, value))


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(fits, value.values()))


def _file(value: Any) -> bool:
    path = Path(value) if isinstance(value, str | os.PathLike) else Path("/")
    return not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)


_BATCHES = "(input, target) batches that can be read many times, such as a DataLoader or a list"
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is(nn.Module), "an nn.Module"),
    "optimizer_factory": (callable, "a function of the parameters that makes an optimizer"),
    "loss_fn": (_function, "a function (output, target) -> loss, such as nn.CrossEntropyLoss()"),
    "loader": (_batches, _BATCHES),
    "data": (_batches, _BATCHES),
    "validation": (_batches, f"{_BATCHES}, or None"),
    "epochs": (_whole(0), "a whole number of at least 0"),
    "rule": (
        lambda value: _function(value) or (needs_model(value) and not isinstance(value, type)),
        "a rule, such as cg.TopK(1), or a function sensitivities -> cg.Decision",
    ),
    "when": (
        lambda value: _function(value) or isinstance(value, Plateau),
        "a Plateau(), a function of the losses, or None",
    ),
    "confirm": (_function, "a function solution -> When, such as Exhausted(), or None"),
    "candidates": (
        lambda value: _function(value) or _list_of(_is(Candidate))(value),
        "a list of cg.Candidate, a function model -> such a list, or None",
    ),
    "max_insertions": (_whole(0), "a whole number of at least 0, or None"),
    "patience": (_whole(1), "a positive whole number, or None"),
    "target": (_is(Real), "a number, or None"),
    "metrics": (_dict_of(_function), "a dict of functions (output, target) -> number, or None"),
    "scheduler_factory": (callable, "a function of the optimizer, or None"),
    "after_insertion": (_function, "a function of grower and round, NewLayers(), or None"),
    "solver": (_function, "a function (problem, rule) -> Solution, such as cg.solve"),
    "callbacks": (_list_of(_function), "a list of functions of the grower"),
    "checkpoint": (_file, "a file in a folder that exists and can be written to, or None"),
    "checkpoint_every": (_whole(1), "a positive whole number, or None"),
    "blocks": (_dict_of(_is(nn.Module)), "a dict of names and nn.Modules, or None"),
    "writer": (_has("add_scalar"), "a SummaryWriter or the like, with add_scalar, or None"),
    "wrapper": (_is(nn.Module), "an nn.Module, or None"),
    "progress": (_is(bool), "True, False, or None"),
}
