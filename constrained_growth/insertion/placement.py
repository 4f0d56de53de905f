"""Where an inserted layer stands: around its site, or as the next element of a list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from constrained_growth.errors import CandidateError


def check_can_change(model: nn.Module) -> None:
    """Refuse a model whose modules cannot be exchanged.

    Raises:
        CandidateError: It is compiled to TorchScript, or its parameters are kept in one flat
            tensor (FullyShardedDataParallel).
    """
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"ScriptModule", "FullyShardedDataParallel"}:
            raise CandidateError(
                f'model={type(model).__name__}: its module "{name}" is a {type(module).__name__}, '
                "in which no module can be exchanged; insert into the model as it was before it "
                "was wrapped, and wrap it again."
            )


def list_of(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """The `nn.ModuleList` or `nn.Sequential` that a module is an element of, and nothing else.

    None if it is in none, has a second owner, or the elements are not simply numbered or not
    simply run one after the other (a `Sequential` with a forward of its own).
    """
    owners = [o for o in model.modules() for child in o._modules.values() if child is module]
    if len(owners) != 1:
        return None
    (owner,) = owners
    runs = isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward
    numbered = list(owner._modules) == [str(i) for i in range(len(owner._modules))]
    return owner if numbered and (runs or isinstance(owner, nn.ModuleList)) else None


def put_next(owner: nn.Module, element: nn.Module, new: nn.Module) -> None:
    """Make a module the next element after another one; what comes later is renumbered."""
    elements = list(owner._modules.values())
    place = next(i for i, one in enumerate(elements) if one is element)
    elements.insert(place + 1, new)
    owner._modules.clear()
    owner._modules.update({str(i): one for i, one in enumerate(elements)})


def put_around(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, under every name that it has in the model."""
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if child is old and owner is not new:
                owner._modules[key] = new


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The first qualified name of a module."""
    return next(name for name, one in model.named_modules() if one is module)


@contextmanager
def structure_kept_on_error(model: nn.Module) -> Iterator[None]:
    """After an error every module has the submodules and attributes again that it had."""
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
