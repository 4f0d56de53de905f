"""Insert the chosen layers into the model, its function unchanged; and do it again elsewhere."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.contexts import context_of, takes_context
from constrained_growth.errors import CandidateError, RecordError
from constrained_growth.observation import parameter_shapes
from constrained_growth.optimizers import adopt, check_optimizer
from constrained_growth.outputs import tensor_in, with_tensor
from constrained_growth.records import (
    GrowthRecord,
    InsertedLayer,
    build,
    describe,
)
from constrained_growth.solution import Planned, Solution

__all__ = ["GrowthRecord", "Inserted", "InsertedLayer", "insert", "replay"]


class Inserted(nn.Module):
    """A module with a layer after it: x ↦ inserted(base(x)).

    A layer with a true attribute `takes_context` is called with what the module is called with,
    its own tensor in the place of the first argument.

    Stands in the model under the name of `base`, so every other name in the model stays what it
    was, `"3"` still means "the output of this place", and attributes not found here are looked up
    in `base` (`model.fc.in_features` goes on working). Keys in the state dict change from
    `3.weight` to `3.base.weight`, and `3.inserted.…` is new.

    Args:
        base: The module that stood here.
        inserted: The layer after it.
        overwritten: Whether the model changes the output in place afterwards: then it gets a
            copy, as the layer may need its own output to go backward.
        output: Which tensor of the output of `base` the layer works on, as in `Candidate`.
    """

    def __init__(
        self,
        base: nn.Module,
        inserted: nn.Module,
        *,
        overwritten: bool = False,
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.inserted = inserted
        self.overwritten = overwritten
        self.output = output
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inserted layer applied to the output of the base."""
        output = self.base(*args, **kwargs)
        x = output if isinstance(output, Tensor) else tensor_in(output, self.output)
        if takes_context(self.inserted):
            context = context_of(self.base, args, kwargs)
            y = self.inserted(x, *context.args, **context.kwargs)
        else:
            y = self.inserted(x)
        y = y.clone() if self.overwritten else y
        return y if x is output else with_tensor(output, self.output, y)

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        return self.base[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base)  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)


def insert(
    model: nn.Module,
    solution: Solution,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> GrowthRecord:
    """Insert the layers that a solution decided on, in place and without moving the function.

    Each layer takes the place of its site as `Inserted(base, inserted)`; residual blocks pinned
    at zero leave the output the same to the last bit, identity layers to rounding. All checks
    come before the first change.

    Args:
        model: The model of the problem, or a copy of it. It is changed.
        solution: From `solve`. With nothing chosen, nothing is changed. The layers inserted are
            copies: the candidates can be used again.
        optimizer: The one that trains `model`: the state of the old parameters is kept, new ones
            join the groups of their neighbours, with their settings and without state. None
            (default) leaves optimizers to the caller.

    Returns:
        The record, which `replay` can repeat on a fresh model.

    Raises:
        CandidateError: A site is not in the model.
        OptimizerError: The optimizer cannot take the new parameters.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> solution = cg.solve(cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate]))
        >>> before = net(data[0][0])
        >>> record = cg.insert(net, solution)
        >>> bool((net(data[0][0]) - before).abs().max() < 1e-6)
        True
        >>> sorted(net.state_dict())[2:4]
        ['1.inserted.bias', '1.inserted.weight']
    """
    chosen = _chosen(model, solution)
    if optimizer is not None:
        check_optimizer(model, optimizer, [planned.block for _, _, planned in chosen])
    before = parameter_shapes(model)
    old = {id(parameter) for parameter in model.parameters()}
    layers: list[InsertedLayer] = []
    wrappers: dict[nn.Module, Inserted] = {}
    for name, site, planned in chosen:
        place = wrappers.get(site, site)
        after = next(n for n, module in model.named_modules() if module is place)
        layer = describe(
            name, after, planned.block, overwritten=planned.overwritten, output=planned.output
        )
        wrappers[site] = _put(model, place, planned.block, layer)
        layers.append(layer)
    if optimizer is not None:
        adopt(optimizer, model, [p for p in model.parameters() if id(p) not in old])
    return GrowthRecord(tuple(layers), before)


def replay(
    model: nn.Module,
    record: GrowthRecord,
    *,
    blocks: Mapping[str, nn.Module] | None = None,
    strict: bool = True,
) -> nn.Module:
    """Repeat recorded insertions on a fresh model, so that `load_state_dict` fits.

    Args:
        model: As it was before the first insertion; changed in place.
        record: From `insert`, or `GrowthRecord.from_json`.
        blocks: Name of the inserted layer → block, for blocks and activations of your own, which
            a record that comes from JSON cannot rebuild.
        strict: Whether the parameters of `model` must have the names and shapes they had when
            the record was made (default). False asks only for the sites, say for a model with
            another head.

    Returns:
        The same model, grown. The values of the new layers are those at the pins; load a state
        dict for others.

    Raises:
        RecordError: The record does not fit the model, or a block cannot be rebuilt.

    Example:
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> cg.replay(net, cg.GrowthRecord(), strict=False) is net
        True
    """
    if not isinstance(record, GrowthRecord):
        raise RecordError(
            f"record={record!r:.80} is not a GrowthRecord; make one from JSON text by "
            "cg.GrowthRecord.from_json(text)."
        )
    if strict:
        _check_shapes(model, record)
    given = blocks or {}
    built = [_rebuilt(layer, given.get(layer.name)) for layer in record.insertions]
    wrappers: list[Inserted] = []
    for layer, block in zip(record.insertions, built, strict=True):
        site = dict(model.named_modules(remove_duplicate=False)).get(layer.after)
        if site is None or site is model:
            for wrapper in reversed(wrappers):
                _replace(model, wrapper, wrapper.base)
            raise RecordError(
                f'model={type(model).__name__} has no submodule "{layer.after}", after which the '
                f'record puts the layer "{layer.name}"; give the model as it was before it was '
                "grown."
            )
        like = next(itertools.chain(site.parameters(), model.parameters()), None)
        if like is not None:
            block = block.to(device=like.device, dtype=like.dtype)
        wrappers.append(_put(model, site, block, layer))
    return model


def _chosen(model: nn.Module, solution: Solution) -> list[tuple[str, nn.Module, Planned]]:
    """Name, site and plan (of a copied block) of the candidates chosen, in the problem's order."""
    if not isinstance(solution, Solution):
        raise CandidateError(f"solution={solution!r} is not what cg.solve returns.")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in solution.decision.chosen:
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
    shapes = parameter_shapes(model)
    if solution.decision.chosen and shapes != dict(solution.parameters):
        raise CandidateError(
            f"model={type(model).__name__} does not have the parameters, by name and shape, of the "
            "model that was solved; give that model or a copy of it. After an insertion make a "
            "new problem and solve it."
        )
    return [
        (name, modules[planned.after], replace(planned, block=copy.deepcopy(planned.block)))
        for name, planned in solution.candidates.items()
        if name in solution.decision.chosen
    ]


def _put(model: nn.Module, site: nn.Module, block: nn.Module, layer: InsertedLayer) -> Inserted:
    wrapper = Inserted(
        site, block.train(site.training), overwritten=layer.overwritten, output=layer.output
    )
    _replace(model, site, wrapper)
    return wrapper


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, under every name that it has in the model."""
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if child is old:
                owner._modules[key] = new


def _rebuilt(layer: InsertedLayer, given: nn.Module | None) -> nn.Module:
    known = layer.pristine if given is None else given
    block = build(layer) if known is None else copy.deepcopy(known)
    shapes = parameter_shapes(block)
    if shapes != dict(layer.parameters):
        raise RecordError(
            f'the block for the layer "{layer.name}" has parameters {shapes}, the record says '
            f"{dict(layer.parameters)}."
        )
    return block


def _check_shapes(model: nn.Module, record: GrowthRecord) -> None:
    have, want = parameter_shapes(model), dict(record.model)
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differing:
        first = differing[0]
        raise RecordError(
            f"model={type(model).__name__} does not fit the record: {len(differing)} parameters "
            f'differ, first "{first}" with shape {have.get(first)}, in the record '
            f"{want.get(first)}. Give the model as it was before it was grown, or strict=False."
        )
