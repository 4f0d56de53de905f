"""Insert the chosen layers into the model, its function unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import CandidateError, DataError, RuleError
from constrained_growth.insertion.inserted import Inserted
from constrained_growth.insertion.optimizers import (
    adopt,
    as_optimizers,
    check_optimizers,
    kept_on_error,
)
from constrained_growth.insertion.placement import check_can_change, structure_kept_on_error
from constrained_growth.insertion.preservation import (
    Outputs,
    check_preserved,
    first_input,
    outputs_of,
)
from constrained_growth.insertion.records import GrowthRecord, InsertedLayer
from constrained_growth.insertion.replaying import replay
from constrained_growth.insertion.surgery import Plan, counterparts, grow, plans_for
from constrained_growth.solution import Solution

__all__ = ["GrowthRecord", "Inserted", "InsertedLayer", "insert", "replay"]


def insert(
    model: nn.Module,
    solution: Solution,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    data: Iterable[Any] | None = None,
    settle: Callable[[nn.Module], object] | None = None,
) -> GrowthRecord:
    """Insert the layers that a solution decided on, in place and without moving the function.

    A layer takes the place of its site as `Inserted(base, inserted)`. A copy of the model's own
    block (a block with a method `standalone()`) whose site is an element of an `nn.ModuleList` or
    `nn.Sequential` becomes the next element of that list, as a plain module; the elements after
    it are renumbered. Residual blocks pinned at zero leave the output the same to the last bit,
    identity layers to rounding, and that is seen: the model is run on one batch before and after,
    in train and in eval mode. Then the layers take the values of the decision, if it has any.

    All checks of the arguments come before the first change. After an error, also one of the
    model or the optimizer itself, everything is as it was.

    Args:
        model: The model of the problem, or a copy of it. It is changed. Inside a
            DistributedDataParallel or `fully_shard`, call `rewrap(model, optimizer)` afterwards:
            they do not know the new parameters (a warning says so). On several processes each
            checks on its own data, and all call `insert` with the same solution.
        solution: From `solve`. With nothing chosen, nothing is changed. The layers inserted are
            copies: the candidates can be used again.
        optimizer: The one that trains `model`, or several of them: the state of the old
            parameters is kept, new ones join the groups of their neighbours, with their settings
            and without state. No group is added, so that learning-rate schedulers go on. None
            (default) leaves optimizers to the caller.
        averaged: Copies of the model that are to grow too, such as an exponential moving average
            (`torch.optim.swa_utils.AveragedModel`). They get the layers at the pins, where they
            do nothing: the average of a network that always had them there. They are checked too,
            where they run on the batch.
        data: `(input, target)` batches; the function is checked on the first one. None (default)
            takes the first batch of the problem; `()` leaves the check out.
        settle: Called with each grown model before it is checked, to write its new depth where
            the model keeps it (a config); and again when everything was put back.

    Returns:
        The record, which `replay` can repeat on a fresh model. `record.difference` says by how
        much the output moved in either mode.

    Raises:
        CandidateError: A site is not in the model, or modules in it cannot be exchanged.
        OptimizerError: The optimizer cannot take the new parameters.
        RuleError: The values of the decision do not fit the blocks.
        BlockError: The output moved by more than rounding (in the mode the model is in), a layer
            is never reached, or the grown model fails.
        DataError: The model cannot be run on the batch.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> solution = cg.solve(cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate]))
        >>> record = cg.insert(net, solution)
        >>> sorted(record.difference), max(record.difference.values()) < 1e-6
        (['eval', 'train'], True)
        >>> sorted(net.state_dict())[2:4]
        ['1.inserted.bias', '1.inserted.weight']
    """
    names = _checked_choice(model, solution)
    shapes = parameter_shapes(model)
    models = [model, *_checked_copies(model, averaged)]
    plans = [plans_for(one, solution, names, model) for one in models]
    optimizers = as_optimizers(optimizer)
    check_optimizers(model, optimizers, [plan.planned.block for plan in plans[0]])
    _check_values(solution, plans[0])
    if not names:
        return GrowthRecord((), shapes)
    example = solution.example if data is None else first_input(data, model)
    before = [_outputs(one, example, optional=one is not model) for one in models]
    old = {id(parameter) for parameter in model.parameters()}
    with ExitStack() as undo:
        for one in models:
            if settle is not None:
                undo.push(_on_error(settle, one))
            undo.enter_context(structure_kept_on_error(one))
        for one in optimizers:
            undo.enter_context(kept_on_error(one))
        grown = [grow(*pair) for pair in zip(models, plans, strict=True)]
        if settle is not None:
            for one in models:
                settle(one)
        differences = [
            check_preserved(one, example, outputs, {p.name: p.layer for p in plan})
            for one, outputs, plan in zip(models, before, plans, strict=True)
        ]
        new = [p for p in model.parameters() if id(p) not in old]
        adopt(optimizers, model, new, counterparts(plans[0]))
        _start(plans[0], solution)
        _warn_of_wrappers(model)
    evidence = (dict(solution.decision.evidence),) if solution.decision.evidence else ()
    return GrowthRecord(tuple(grown[0]), shapes, differences[0], evidence)


def _checked_choice(model: nn.Module, solution: Solution) -> tuple[str, ...]:
    """Names of the chosen candidates, in the order of the problem."""
    if not isinstance(solution, Solution):
        raise CandidateError(f"solution={solution!r} is not what cg.solve returns.")
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = solution.decision.chosen
    for name in chosen:
        if name not in solution.candidates:
            raise CandidateError(
                f'solution: the decision chose "{name}", and the candidates are '
                f"{tuple(solution.candidates)}."
            )
        after = solution.candidates[name].after
        if after not in modules:
            raise CandidateError(
                f'model={type(model).__name__} has no submodule "{after}", the site of the chosen '
                f'candidate "{name}"; give the model of the problem, as it was when solved.'
            )
    if chosen and parameter_shapes(model) != dict(solution.parameters):
        raise CandidateError(
            f"model={type(model).__name__} does not have the parameters, by name and shape, of the "
            "model that was solved; give that model or a copy of it. After an insertion make a "
            "new problem and solve it."
        )
    check_can_change(model)
    return tuple(name for name in solution.candidates if name in chosen)


def _checked_copies(model: nn.Module, averaged: object) -> list[nn.Module]:
    """The copies of the model, taken out of their `AveragedModel`."""
    given = [averaged] if isinstance(averaged, nn.Module) else averaged
    if not isinstance(given, Sequence) or not all(isinstance(one, nn.Module) for one in given):
        raise CandidateError(
            f"averaged={averaged!r:.80} is neither a copy of the model nor a sequence of copies, "
            "such as torch.optim.swa_utils.AveragedModel(model)."
        )
    copies = [one.module if isinstance(one, AveragedModel) else one for one in given]
    for one in copies:
        if parameter_shapes(one) != parameter_shapes(model):
            raise CandidateError(
                f"averaged={type(one).__name__} does not have the parameters, by name and shape, "
                "of the model; give a copy of it as it is now."
            )
        shared = {id(p) for p in model.parameters()} & {id(p) for p in one.parameters()}
        if shared:
            raise CandidateError(
                f"averaged={type(one).__name__} shares {len(shared)} parameters with the model; "
                "give a copy of it, such as torch.optim.swa_utils.AveragedModel(model)."
            )
    return copies


def _outputs(model: nn.Module, example: object, *, optional: bool) -> Outputs:
    """What is to stay; a copy in another precision may not run on the batch."""
    if example is None:
        return {}
    try:
        return outputs_of(model, example)
    except DataError:
        if not optional:
            raise
        return {}


def _check_values(solution: Solution, plans: Iterable[Plan]) -> None:
    known = {plan.name: pinned_parameters(plan.planned.block) for plan in plans}
    for name, values in solution.decision.values.items():
        if name not in solution.candidates:
            raise RuleError(
                f'decision.values is about "{name}", and the candidates are '
                f"{tuple(solution.candidates)}."
            )
        for key, value in values.items() if name in known else ():
            pin = known[name].get(key)
            if pin is None or not isinstance(value, Tensor) or value.shape != pin.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:40]
                shapes = {k: tuple(p.shape) for k, p in known[name].items()}
                raise RuleError(
                    f'decision.values["{name}"]["{key}"]={got} is no deviation from a pin of that '
                    f"candidate, whose shapes are {shapes}."
                )
            if not bool(torch.isfinite(value).all()):
                raise RuleError(f'decision.values["{name}"]["{key}"] holds NaN or Inf.')


def _start(plans: Iterable[Plan], solution: Solution) -> None:
    """Move the pinned parameters by the values of the decision."""
    with torch.no_grad():
        for plan in plans:
            pins = pinned_parameters(plan.planned.block)
            for key, value in solution.decision.values.get(plan.name, {}).items():
                pins[key].add_(value.to(pins[key]))


def _on_error(settle: Callable[[nn.Module], object], model: nn.Module) -> Any:
    def exit(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            settle(model)

    return exit


def _warn_of_wrappers(model: nn.Module) -> None:
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped or is_sharded(model):
        warnings.warn(
            "the model is wrapped in DistributedDataParallel or fully_shard, which do not know "
            "the new parameters and would not average their gradients; call on all processes "
            "cg.rewrap(model, optimizer).",
            stacklevel=3,
        )
