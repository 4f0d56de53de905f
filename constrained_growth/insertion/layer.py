"""The module that holds an inserted layer, and what can hold one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._sites.collector import replaced
from constrained_growth._sites.context import Context, arguments
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError, CandidateError


class WithInsertedLayer(nn.Module):
    """A module followed by an inserted layer: x ↦ inserted(base(x)).

    It takes the place of `base` in the model, under the same name, and attributes not found here
    are looked up in `base` (`model.fc.in_features` still works). Keys in the state dict change
    from `3.weight` to `3.base.weight`, and `3.inserted.…` is new. Hooks on `base` stay on it: they
    see the output that the inserted layer receives. A layer with a true attribute `takes_context`
    is called with the arguments of `base`, its own input in place of the first one. `overwritten`
    and `output` are those of `InsertedLayer`.
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
        """The output of the base, the inserted layer applied to its tensor."""
        output, kind = self.base(*args, **kwargs), type(self.base).__name__
        return replaced(kind, self.base, args, kwargs, output, self.output, self._run_inserted)

    def _run_inserted(self, x: Tensor, context: Context) -> Tensor:
        positional, named = arguments(self.inserted, x, context)
        y = self.inserted(*positional, **named)
        return y.clone() if self.overwritten else y  # its backward pass may need y

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        return self.base[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base)  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        return True  # or `if module:` would ask for __len__, which the base may not have

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)


def list_of(model: nn.Module, module: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """The only owner of a module, if it is a list that runs its elements by their numbers."""
    owners = [o for o in model.modules() for child in o._modules.values() if child is module]
    if len(owners) != 1:
        return None
    (owner,) = owners
    if list(owner._modules) != [str(i) for i in range(len(owner._modules))]:
        return None
    if isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
        return owner
    return owner if isinstance(owner, nn.ModuleList) else None


def standalone_form(block: nn.Module) -> nn.Module:
    """The module `block.standalone()`, made without drawing random numbers."""
    with torch.random.fork_rng(devices=[]):
        layer = block.standalone()  # type: ignore[operator]
    pins = {id(p) for p in pinned_parameters(block).values()}
    if not isinstance(layer, nn.Module) or not pins <= {id(p) for p in layer.parameters()}:
        raise BlockError(
            f"block={type(block).__name__}: standalone() returned a {type(layer).__name__} that "
            "does not hold the pinned parameters of the block themselves."
        )
    return layer


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)


def check_can_change(model: nn.Module) -> None:
    """Refuse a model in which no module can be replaced."""
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"ScriptModule", "FullyShardedDataParallel"}:
            raise CandidateError(
                f'model={type(model).__name__}: its module "{name}" is a {type(module).__name__}, '
                "in which no module can be exchanged; insert into the model before it is wrapped."
            )


@contextmanager
def structure_kept_on_error(model: nn.Module) -> Iterator[None]:
    """After an error, restore the submodules and attributes of every module."""
    kept = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, children in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise
