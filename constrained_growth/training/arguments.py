"""What `Grower` and `grow` can be given, checked before the first step of training."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        if fits is not None and not fits(value):
            raise TrainingError(f"{name}={value!r:.80} is not {wanted}.")


def _function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)  # a class makes objects, it is not one


def _rule(value: Any) -> bool:
    return _function(value) or (needs_model(value) and not isinstance(value, type))


def _batches(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, Iterator | Tensor | Mapping | str)


def _candidates(value: Any) -> bool:
    named = isinstance(value, Sequence) and all(isinstance(one, Candidate) for one in value)
    return named or _function(value)


def _metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_function, value.values()))


def _blocks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(b, nn.Module) for b in value.values())


def _file(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike):
        return False
    path = Path(value)
    return not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= least and not isinstance(value, bool)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_BATCHES = "(input, target) batches that can be read again and again, such as a DataLoader or list"
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, nn.Module), "an nn.Module"),
    "optimizer_factory": (callable, "a function of the parameters that makes an optimizer"),
    "loss_fn": (_function, "a function (output, target) -> loss, such as nn.CrossEntropyLoss()"),
    "loader": (_batches, _BATCHES),
    "data": (_or_none(_batches), _BATCHES),
    "validation": (_or_none(_batches), _BATCHES),
    "epochs": (_whole(0), "a whole number of at least 0"),
    "rule": (_rule, "a rule, such as cg.TopK(1), or a function sensitivities -> cg.Decision"),
    "when": (
        _or_none(lambda value: isinstance(value, Plateau) or _function(value)),
        "a Plateau() or a function of the losses",
    ),
    "confirm": (_or_none(_function), "a function solution -> When, such as Exhausted()"),
    "candidates": (_or_none(_candidates), "a sequence of cg.Candidate or a function model -> them"),
    "max_insertions": (_or_none(_whole(0)), "a whole number of at least 0, or None"),
    "patience": (_or_none(_whole(1)), "a positive whole number or None"),
    "target": (
        _or_none(lambda value: isinstance(value, numbers.Real) and not math.isnan(value)),
        "a number or None",
    ),
    "metrics": (_or_none(_metrics), "a dict of functions (output, target) -> number"),
    "scheduler_factory": (_or_none(callable), "a function of the optimizer"),
    "after_insertion": (_or_none(_function), "a function of grower and round, or NewLayers()"),
    "solver": (_function, "a function (problem, rule) -> Solution, such as cg.solve"),
    "callbacks": (
        lambda value: isinstance(value, Sequence) and all(map(_function, value)),
        "a list of functions of the grower",
    ),
    "checkpoint": (_or_none(_file), "the name of a file in a folder that exists and is writable"),
    "checkpoint_every": (_or_none(_whole(1)), "a positive whole number or None"),
    "blocks": (_or_none(_blocks), "a dict of names and nn.Modules"),
    "writer": (
        _or_none(lambda value: callable(getattr(value, "add_scalar", None))),
        "an object with add_scalar(tag, value, step), such as a SummaryWriter",
    ),
    "wrapper": (_or_none(lambda value: isinstance(value, nn.Module)), "an nn.Module"),
    "progress": (lambda value: value in (None, True, False), "True, False or None"),
}
