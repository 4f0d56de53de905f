"""Every wrong argument of every public function is refused early, by name, in a GrowthError.

A table: each public callable with right arguments, and for each argument what kind of value it
takes. The wrong values follow from the kind. Each must be refused before the model runs.
"""

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import building_rows
import deciding_rows
import growing_rows
import numpy as np
import pytest
import reporting_rows
from helpers import nothing_left_behind, refused
from table import KINDS, Setting, make_setting
from torch import nn

import constrained_growth as cg
from constrained_growth import (
    blocks,
    bookkeeping,
    candidates,
    checkpoint,
    curvature,
    insertion,
    monitoring,
    norms,
    plotting,
    rules,
    solution,
    statistics,
    testing,
    training,
    verification,
)
from constrained_growth.integrations import lightning, trainer, transformers

ROWS = {**growing_rows.ROWS, **deciding_rows.ROWS, **building_rows.ROWS, **reporting_rows.ROWS}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make_setting()


def shown(value: Any) -> str:
    """The value as text that is the same in every process."""
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def wrong() -> Iterator[Any]:
    for name, row in ROWS.items():
        arguments = {**dict.fromkeys(row.more, ()), **{a: KINDS[k] for a, k in row.kinds.items()}}
        arguments |= {a: (None, *arguments[a]) for a in row.kinds if a not in row.optional}
        for argument, values in arguments.items():
            for value in (*values, *row.more.get(argument, ())):
                yield pytest.param(
                    name, argument, value, id=f"{name}-{argument}={shown(value):.30}"
                )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "argument", "value"), list(wrong()))
def test_wrong_arguments_are_refused(
    name: str, argument: str, value: Any, setting: Setting, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    row = ROWS[name]
    right = dict(row.right(setting))
    setting.model.runs = 0
    with nothing_left_behind(setting.model), refused(cg.GrowthError, argument):
        row.call(**{**right, argument: value})
    assert setting.model.runs == 0, "the model ran first"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_numpy_are_taken_where_those_of_python_are(kind: Any, setting: Setting) -> None:
    value = 0.5 if kind is np.float32 else 2
    numbers = {"count", "whole", "number", "positive", "fraction"}
    for row in ROWS.values():
        for argument in (name for name, of in row.kinds.items() if of in numbers):
            if row.call not in (cg.grow, checkpoint.save, verification.check_with_scipy):
                right = dict(row.right(setting))
                try:
                    row.call(**{**right, argument: value})
                except cg.GrowthError:
                    continue
                row.call(**{**right, argument: kind(value)})


# Is the table complete?

MODULES: dict[str, ModuleType] = {
    "": cg,
    "trainer.": trainer,
    "lightning.": lightning,
    "transformers.": transformers,
    "checkpoint.": checkpoint,
    "bookkeeping.": bookkeeping,
    **{
        f"{module.__name__.rpartition('.')[2]}.": module
        for module in (
            *(blocks, candidates, curvature, insertion, monitoring, norms, plotting),
            *(rules, solution, statistics, testing, training, verification),
        )
    },
}
MADE_BY_US = (
    *("Constraint", "GrowthRecord", "History", "Sensitivity", "Solution", "AffineFactors"),
    *("HeldOut", "Planned", "Proposals", "InsertedLayer", "Round", "Checkpoint", "Resumed"),
    *("Check", "KKTResiduals", "VerificationReport", "Monitor"),
)
WITHOUT_A_ROW = {
    **dict.fromkeys(MADE_BY_US, "users read it; the library makes it"),
    **dict.fromkeys(("has_factors", "needs_moments", "needs_model"), "says no to anything else"),
    **dict.fromkeys(("Frobenius.lipschitz", "Spectral.lipschitz"), "1, whatever it is given"),
    "VirtualLoss.__call__": "as VirtualLoss.unflatten, which it calls first",
    "VirtualLoss.hessian_product": "as hessian, which calls it",
    "VirtualLoss.gauss_newton_product": "as gauss_newton, which calls it",
    "VirtualLoss.rounding": "arithmetic with a number",
    "Budget.gain": "half_square by default",
    "TrustRegion.curvature": "hessian by default",
    "Stable.curvature": "gauss_newton by default",
    "NewLayers.__call__": "called by a Grower; as attach",
    "LineSearch.__call__": "called by a Grower",
}


def is_called_by_others(kind: type, name: str) -> bool:
    """Methods of modules and callbacks, which PyTorch, the Trainers or the solver call."""
    callbacks = (trainer.GrowthCallback, lightning.GrowthCallback)
    hook = name.startswith("on_") or name in {"setup", "teardown", "load_state_dict"}
    return issubclass(kind, nn.Module) or (issubclass(kind, callbacks) and hook)


def public_callables() -> Iterator[tuple[str, Any]]:
    """Functions, classes and methods that take arguments, once each."""
    seen: set[int] = set()
    for prefix, module in MODULES.items():
        for name in module.__all__:
            item = getattr(module, name)
            listed = inspect.isfunction(item) or inspect.isclass(item)
            if not listed or id(item) in seen:
                continue
            seen.add(id(item))
            if not inspect.isclass(item):
                yield f"{prefix}{name}", item
            elif not issubclass(item, Exception | enum.Enum) and not item.__dict__.get(
                "_is_protocol"
            ):
                yield f"{prefix}{name}", item
                for method, function in vars(item).items():
                    hidden = method.startswith("_") and method != "__call__"
                    if not hidden and not is_called_by_others(item, method):
                        yield f"{prefix}{name}.{method}", getattr(function, "__func__", function)


def takes_arguments(item: Any) -> bool:
    without_fields = dataclasses.is_dataclass(item) and not dataclasses.fields(item)
    if not callable(item) or without_fields:
        return False
    return bool(inspect.signature(item).parameters.keys() - {"self", "cls"})


FREE = {
    **dict.fromkeys(("target", "ylabel", "layers"), "anything is shown, or kept as it is"),
    **dict.fromkeys(("args", "kwargs", "options", "stateful"), "handed on"),
    "example_input": "only running the model on it can tell",
    "rules": "as the first of them",
    **dict.fromkeys(("bias", "mean", "rows", "columns"), "of moments, which the library makes"),
    **dict.fromkeys(("transposed", "same_units"), "of moments, which the library makes"),
}
"""Arguments of which no value is wrong by itself."""


def test_every_argument_is_tried() -> None:
    for name, item in public_callables():
        row = ROWS.get(name) or ROWS.get(name.partition(".")[2])
        if row is not None and takes_arguments(item):
            arguments = inspect.signature(item).parameters.keys() - {"self", "cls"}
            tried = {*row.kinds, *row.more}
            assert arguments - tried <= FREE.keys(), name


def test_every_public_callable_has_a_row_or_a_reason_to_have_none() -> None:
    found = {name for name, item in public_callables() if takes_arguments(item)}
    known = {*ROWS, *WITHOUT_A_ROW}
    short = {name: name if name in known else name.partition(".")[2] for name in found}
    assert sorted(name for name, other in short.items() if {name, other}.isdisjoint(known)) == []
    # no reason is given for what is not there
    assert WITHOUT_A_ROW.keys() <= {*short, *short.values()}
    assert WITHOUT_A_ROW.keys().isdisjoint(ROWS)
