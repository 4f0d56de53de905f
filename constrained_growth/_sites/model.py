"""Calling a user's model and loss, and what the model is made of."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from constrained_growth._distributed import unwrapped
from constrained_growth._structure import tensors_in
from constrained_growth.errors import CandidateError, DataError


def call(model: Callable[..., Any], input: object) -> Any:
    """`model(input)`, with a tuple spread as positional and a dict as keyword arguments.

    Any other type of batch, such as a named tuple, is one argument. So is a mapping whose keys
    `forward` does not take; and a list, but where `forward` takes its items only: PyTorch's
    loaders make lists of tuples.
    """
    model = unwrapped(model)  # a DistributedDataParallel would wait for the other processes
    args: Any = (input,)
    kwargs: Mapping[str, Any] = {}
    if type(input) is tuple:
        args = input
    elif isinstance(input, Mapping) and (_takes(model, (), input) or not _takes(model, args)):
        args, kwargs = (), input
    elif isinstance(input, list) and not _takes(model, args) and _takes(model, input):
        args = input
    try:
        return model(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        _refuse_other_dtypes(model, input, error)
        raise


def _refuse_other_dtypes(model: Any, input: object, error: Exception) -> None:
    """Where a model failed as no number of the input has the precision of a parameter, say so."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    given, own = (
        {t.dtype for t in some if t.is_floating_point()} for some in (tensors_in(input), parameters)
    )
    # a plain RuntimeError: "Input type (float) and bias type (double) should be the same"
    if given and own and not given & own and "type" in str(error):
        here, there = (" and ".join(sorted(map(str, some))) for some in (given, own))
        raise DataError(
            f"data (or example_input): it is {here}, and the parameters of the model are {there}; "
            f"convert one of them. The model fails: {error}."
        ) from error


def _takes(
    model: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether the signature of a model allows a call."""
    try:
        inspect.signature(getattr(model, "forward", model)).bind(*args, **(kwargs or {}))
    except TypeError:
        return False
    except ValueError:  # no signature
        return True
    return True


def loss_of(loss_fn: Callable[..., Any], output: object, target: object) -> Tensor:
    """The checked loss of an output; an error that says how a loss is called."""
    try:
        return checked_loss(loss_fn(output, target))
    except TypeError as error:
        if _takes(loss_fn, (output, target)):
            raise
        raise DataError(
            f"loss_fn={loss_fn!r:.80} fails ({error}); it is called as loss_fn(output, target)."
        ) from error


def checked_loss(loss: object) -> Tensor:
    """The loss, if it is a scalar tensor; a DataError if not."""
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
    if loss.is_complex():
        raise DataError(
            f"loss_fn returned a {loss.dtype} number, not a real one; return its .real."
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


def owners_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that have a module as a child, each with the name that it has there."""
    pairs = ((owner, pair) for owner in model.modules() for pair in owner._modules.items())
    return [(owner, key) for owner, (key, child) in pairs if child is module]


def list_of(model: nn.Module, module: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """The only owner of a module, if it is a list that runs its elements by their numbers."""
    owners = owners_of(model, module)
    if len(owners) != 1:
        return None
    owner, _ = owners[0]
    if list(owner._modules) != [str(i) for i in range(len(owner._modules))]:
        return None
    if isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
        return owner
    return owner if isinstance(owner, nn.ModuleList) else None


def check_has_values(model: nn.Module) -> None:
    """Refuse a model with tensors that are not there, as Accelerate's offloading leaves them."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            state = "not initialised" if is_lazy(tensor) else "on the meta device"
            raise CandidateError(
                f'model={type(model).__name__}: its "{name}" is {state} and has no values; load '
                "the whole model first (without offloading), or run a lazy one on a batch."
            )


def unchangeable(model: nn.Module) -> str:
    """A module of the model in which none can be replaced, in words; "" if there is none."""
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"ScriptModule", "FullyShardedDataParallel"}:
            return f'"{name}" is a {type(module).__name__}'
    return ""


def check_can_change(model: nn.Module) -> None:
    """Refuse a model in which no module can be replaced."""
    if why := unchangeable(model):
        raise CandidateError(
            f"model={type(model).__name__}: its module {why}, in which no module can be "
            "exchanged; insert into the model before it is wrapped."
        )


def coarsest_epsilon(tensors: Iterable[Tensor]) -> float:
    """The coarsest machine precision that numbers in these tensors go through.

    That of their dtypes, of autocast on their devices, and of float32 matrix products.
    """
    found = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    kinds = {t.dtype for t in found}
    devices = {t.device.type for t in found}
    kinds |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    # TensorFloat-32 keeps 10 bits of the mantissa of each factor, bfloat16 keeps 7
    products = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
    rough = products[torch.get_float32_matmul_precision()] if torch.float32 in kinds else 0.0
    return max([rough, *(torch.finfo(kind).eps for kind in kinds)])
