"""A copy of a block that is in the model already, made to do nothing at first."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from constrained_growth.blocks.branches import Ends, ends_of
from constrained_growth.blocks.pins import change, pinned_parameters
from constrained_growth.errors import BlockError
from constrained_growth.observation import differentiable


class CopiedBlock(nn.Module):
    """A copy of a residual block, with the last parameters of its branches pinned at zero.

    The block x ↦ x + f(x) is the identity where the output projections of f are zero: of the
    attention and the MLP of a pre-norm transformer block, the layer scale where there is one, the
    last γ and β of a residual convolution block. The rest is what the neighbour has learnt. One
    factor of a product is pinned, never both, so that λ does not vanish.

    A block that normalises the sum (post-norm, as in BERT) cannot be the identity this way, and
    is refused. One with a ReLU after the sum is the identity where x ≥ 0, which is checked on the
    data.

    It is called with everything that the module at its site was called with: masks, position
    embeddings. A cache of keys and values is not passed on: the copy reads and writes none.
    Inserted after an element of an `nn.ModuleList` or `nn.Sequential` it becomes the next
    element, as a module of the neighbour's own class.

    Args:
        module: The block to copy; it stays as it is, and may be frozen: the copy can be trained.
        pinned: Names of parameters of `module` that make it the identity where they are zero.
            None (default) finds them in the graph that autograd keeps of a call.
        args: One call of `module`, as `module(*args, **kwargs)`, the first of them the tensor x.
            None (default) tries tensors of the usual shapes; a module that needs more than x has
            to be given an example. Not used where `pinned` says it all.
        kwargs: The keyword arguments of that call.

    Parameters:
        Those of `module`, as `module.…`; the pinned ones are in `pinned`.

    Raises:
        BlockError: `module` cannot be the identity by zeros at the ends of its branches, cannot
            be called, or `pinned` names parameters that it does not have.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
        >>> block = CopiedBlock(layer)
        >>> [name for name in block.pinned if name.endswith("weight")]
        ['module.self_attn.out_proj.weight', 'module.linear2.weight']
        >>> x = torch.randn(2, 3, 4)
        >>> torch.equal(block(x), x)
        True
    """

    takes_context = True

    def __init__(
        self,
        module: nn.Module,
        pinned: Sequence[str] | None = None,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise BlockError(f"module={module!r} is not an nn.Module; give the block to copy.")
        self.module = _copied(module)
        self._exact = False
        self._checkpointed = tuple(
            name for name, m in self.module.named_modules() if vars(m).get(_CHECKPOINTING)
        )
        self._switch_checkpointing(False)
        if pinned is None:
            pinned = self._found(args, kwargs or {})
        elif isinstance(pinned, str):
            raise BlockError(f"pinned={pinned!r} is a string; give a tuple of names: ({pinned!r},)")
        self.pinned = tuple(f"module.{name}" for name in pinned)
        with torch.no_grad():
            for parameter in pinned_parameters(self).values():
                parameter.zero_()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first tensor that the copy makes of x, shape of x."""
        args = tuple(_without_cache(value, x) for value in args)
        kwargs = {name: _without_cache(value, x) for name, value in kwargs.items()}
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return _first_tensor(self.module(x, *args, **kwargs))

    def exact_after(self, site: nn.Module) -> bool:
        """Whether nothing but sums is on the way from x to the output."""
        return self._exact

    def standalone(self) -> nn.Module:
        """The copy itself, of the class of the module that was copied; not another copy."""
        self._switch_checkpointing(True)
        return self.module

    def _switch_checkpointing(self, on: bool) -> None:
        """Activation checkpointing of submodules that had it on; alone they are run without."""
        for name in self._checkpointed:
            setattr(self.module.get_submodule(name), _CHECKPOINTING, on)

    def _found(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the parameters to pin, from the graph of one call."""
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        with differentiable(), torch.random.fork_rng(devices=[]):
            x, y, args = self._called(args, kwargs)
            ends = ends_of(x, y)
            names = {id(p): name for name, p in self.module.named_parameters()}
            pinned = dict.fromkeys(names[id(p)] for branch in ends.branches for p in branch)
            self._check_ends(ends, names)
            with torch.no_grad():
                for name in pinned:
                    self.module.get_parameter(name).zero_()
            self._check_identity(x, args, kwargs, ends, names)
        for module, training in modes:
            module.training = training
        self._exact = ends.exact
        return tuple(pinned)

    def _called(
        self, args: Sequence[Any] | None, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """A call x ↦ y that keeps the shape, and its further arguments."""
        tried = [args] if args is not None else [(x,) for x in _usual_inputs(self.module)]
        problem = "it has no parameters"
        for first, *rest in tried:
            if not isinstance(first, Tensor) or not first.is_floating_point():
                raise BlockError(f"args: the first is {first!r:.80}, not the tensor x of the call.")
            x = first.detach().clone().requires_grad_()
            rest, kwargs = tree_map_only(Tensor, Tensor.detach, (rest, kwargs))
            try:
                y = self(x.clone(), *rest, **kwargs)
            except Exception as error:
                if args is not None:
                    raise
                problem = f"{type(error).__name__}: {error}"
                continue
            if y.shape == x.shape and y.requires_grad:
                return x, y, tuple(rest)
            problem = f"it turns the shape {tuple(x.shape)} into {tuple(y.shape)}"
        raise BlockError(
            f"module={type(self.module).__name__} does not keep the shape of what it is called "
            f"with, or needs more than one tensor ({problem}). A block that changes the shape "
            "cannot be repeated; for another one give the call, args=(x, …) and kwargs={…}, or "
            "the names of its output projections, pinned=(…)."
        )

    def _check_ends(self, ends: Ends, names: Mapping[int, str]) -> None:
        if ends.branches:
            return
        acting = tuple(names[id(p)] for p in ends.on_trunk)
        reason = (
            f"its parameters {acting} act on all that leaves it, as in a post-norm block, which "
            "normalises the sum"
            if acting
            else "it has no branch with parameters"
        )
        raise BlockError(
            f"module={type(self.module).__name__} cannot be the identity by zeros at the ends of "
            f"its branches: {reason}. {_ALTERNATIVE}"
        )

    def _check_identity(
        self,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        ends: Ends,
        names: Mapping[int, str],
    ) -> None:
        """Whether the copy is the identity now, on x or |x|, and every branch can be loosened."""
        for start in (x.detach(), x.detach().abs()):  # the latter for blocks that end in a ReLU
            y = self(start.clone(), *args, **kwargs)
            if float(change(start, y.detach())) <= 1:
                break
        else:
            raise BlockError(
                f"module={type(self.module).__name__} is not the identity where "
                f"{tuple(names[id(p)] for branch in ends.branches for p in branch)} are zero. "
                f"{_ALTERNATIVE}"
            )
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        for branch in ends.branches:
            grads = torch.autograd.grad(y, branch, cotangent, retain_graph=True, allow_unused=True)
            if not any(grad is not None and bool(grad.any()) for grad in grads):
                raise BlockError(
                    f"module={type(self.module).__name__}: the multipliers of "
                    f"{tuple(names[id(p)] for p in branch)} vanish identically, as what they are "
                    "multiplied with is zero too; give that other factor a non-zero value."
                )


_CHECKPOINTING = "gradient_checkpointing"
_ALTERNATIVE = (
    "Use ResidualMLP(width, hidden, activation), which is the identity anywhere, or name the "
    "parameters to pin: pinned=(…)."
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def _copied(module: nn.Module) -> nn.Module:
    """A deep copy that can be trained, without the hooks, which are about the original."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    hooks = (getattr(m, name) for m in module.modules() for name in _HOOKS)
    memo: dict[int, Any] = {id(held): OrderedDict() for held in hooks}
    copied = copy.deepcopy(module, memo)
    for parameter in copied.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return copied


def _usual_inputs(module: nn.Module) -> Iterator[Tensor]:
    """Sequences, images and plain vectors of the widths that the parameters have."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    for width in dict.fromkeys(size for p in parameters for size in p.shape):
        for shape in ((2, 4, width), (2, width, 8, 8), (2, width), (2, width, 8)):
            yield torch.randn(shape, generator=generator).to(parameters[0])


def _without_cache(value: Any, x: Tensor) -> Any:
    """None in the place of a cache of keys and values, and every other value as it is.

    Raises:
        BlockError: The cache holds more than the call itself has put there.
    """
    if not (hasattr(value, "get_seq_length") and hasattr(value, "update")):
        return value
    length = 0
    with suppress(Exception):
        length = int(value.get_seq_length())
    if x.dim() > 1 and length > x.shape[1]:
        raise BlockError(
            f"a copied block was called with a cache of {length} positions for {x.shape[1]} new "
            "ones, and it keeps none of its own: call the model with use_cache=False, or insert "
            "by constrained_growth.integrations.transformers.insert."
        )
    return None


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
