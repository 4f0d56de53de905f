"""What `Grower` and `grow` can be given, checked before the first step of training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from constrained_growth._arguments import (
    data_again,
    flag,
    function,
    functions,
    instance,
    integer,
    number,
    positive_int,
)
from constrained_growth._data import check_pair
from constrained_growth.errors import CheckpointError, DataError, OptimizerError, TrainingError
from constrained_growth.insertion.training_state import as_copies, checked_copies
from constrained_growth.problem import checked_candidates
from constrained_growth.rules import Plateau
from constrained_growth.rules.rule import refuse_no_rule


def check_growing(given: Any) -> None:
    """The arguments that `Grower` and `grow` share, as attributes."""
    instance("model", given.model, nn.Module, TrainingError, "the network")
    checked_copies(given.model, given.averaged)
    check_decisions(given)


def check_decisions(given: Any) -> None:
    """All but the model and its optimizers, which a callback does not have when it is made."""
    as_copies(given.averaged)
    function("loss_fn", given.loss_fn, TrainingError, "nn.CrossEntropyLoss()")
    if (
        type(given.loss_fn).__module__ == nn.MSELoss.__module__
        and given.loss_fn.reduction == "none"
    ):
        raise DataError('loss_fn has reduction="none" and gives no scalar; use reduction="mean".')
    data_again("data", given.data)
    if isinstance(given.data, list | tuple) and given.data:  # any other may be slow, or draw
        check_pair(given.data[0], 0)
    if given.rule is not None:
        refuse_no_rule("rule", given.rule)
    examples = {
        "norm": "cg.norms.Frobenius()",
        "when": "cg.rules.Plateau()",
        "confirm": "cg.rules.Exhausted()",
        "after_insertion": "cg.training.NewLayers()",
        "solver": "cg.solve",
        "candidates": "model -> [cg.Candidate(…)], or such a list",
    }
    others: dict[str, Any] = {"when": Plateau, "candidates": Sequence}
    for name, example in examples.items():
        if not isinstance(getattr(given, name), others.get(name, ())):
            function(name, getattr(given, name), TrainingError, example, optional=True)
    if given.solver is not None and given.norm is not None:
        raise TrainingError(
            f"norm={given.norm!r:.80} would not be used: solver= chooses the norm. Give one of "
            "them, or solver=functools.partial(cg.solve, norm=…)."
        )
    integer("max_insertions", given.max_insertions, TrainingError, 0, optional=True)
    if isinstance(given.candidates, Sequence):
        checked_candidates(given.candidates)
    if not callable(getattr(given.writer, "add_scalar", None)) and given.writer is not None:
        raise TrainingError(f"writer={given.writer!r:.80} has no add_scalar; give a SummaryWriter.")


def check_training(given: Any) -> None:
    """The other arguments of `grow`."""
    example = "functools.partial(torch.optim.Adam, lr=1e-3)"
    function("optimizer_factory", given.optimizer_factory, TrainingError, example, or_class=True)
    scheduler, example = given.scheduler_factory, "functools.partial(StepLR, step_size=10)"
    function("scheduler_factory", scheduler, TrainingError, example, optional=True, or_class=True)
    for name in ("loader", "data", "validation"):
        data = getattr(given, name)
        if data is not None or name == "loader":
            data_again(name, data)
            if not length_hint(data, 1):
                raise DataError(f"{name} is empty; give at least one (input, target) batch.")
    integer("epochs", given.epochs, TrainingError, 0)
    positive_int("patience", given.patience, TrainingError, optional=True)
    number("target", given.target, TrainingError, "[-inf, inf]", optional=True)
    if given.metrics is not None:
        functions("metrics", given.metrics, TrainingError, '{"mae": nn.L1Loss()}')
    for callback in given.callbacks:
        function("callbacks", callback, TrainingError, "lambda grower: None")
    positive_int("checkpoint_every", given.checkpoint_every, TrainingError, optional=True)
    check_blocks(given.blocks)
    flag("progress", given.progress, TrainingError, optional=True)
    if given.checkpoint is not None:
        instance("checkpoint", given.checkpoint, (str, os.PathLike), TrainingError, "a path")
        path = Path(given.checkpoint)
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise TrainingError(
                f'checkpoint="{path}" cannot be written; give a file in a folder that exists.'
            )


def check_trained(optimizers: Iterable[Optimizer], inserted: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers, as those made before a run was resumed, that train no inserted layer."""
    trained = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    new = [parameter for parameter in inserted if parameter.requires_grad]
    if new and trained.isdisjoint(new):
        raise OptimizerError(
            "optimizer: it trains no layer that was inserted before; make the Grower after "
            "checkpoint.resume, with the optimizer that this returns."
        )


def check_blocks(blocks: Any) -> None:
    """Blocks of a user's own for a record, by name."""
    instance("blocks", blocks, Mapping, TrainingError, "name → nn.Module", optional=True)
    for name, block in (blocks or {}).items():
        instance(f"blocks: {name!r}", block, nn.Module, TrainingError, "the block of that name")


def check_parts(state: Any, parts: Mapping[str, Any]) -> None:
    """Refuse the state of a grower whose parts with a state are others than these."""
    found = state.get("parts") if isinstance(state, Mapping) else None
    saved = found if isinstance(found, Mapping) else {}
    for name in sorted(saved.keys() ^ parts.keys()):
        raise CheckpointError(
            f"{name}: the one given has {'a' if name in parts else 'no'} state_dict, and "
            f"{'a' if name in saved else 'no'} state of it was saved; give the one of that run."
        )


_PARTS = "rule", "norm", "when", "after_insertion"


def stateful(given: Any) -> dict[str, Any]:
    """Rule, norm, schedule and policy of a grower, where they have a state."""
    parts = {name: getattr(given, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def attributes_of(given: Any) -> dict[str, str]:
    """What these remember, and what the confirmation does, as text."""
    names = *_PARTS, "confirm"
    return {name: repr(getattr(getattr(given, name), "__dict__", None)) for name in names}
