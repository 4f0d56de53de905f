"""A copy of a block that is in the model already, made to do nothing at first."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._sites.outputs import tensor_in
from constrained_growth.blocks.pins import pinned_parameters
from constrained_growth.blocks.zeros import zeros_of
from constrained_growth.errors import BlockError


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
        if isinstance(pinned, str):
            raise BlockError(f"pinned={pinned!r} is a string; give a tuple of names: ({pinned!r},)")
        if pinned is None:
            zeros = zeros_of(self, self.module, args, kwargs)
            pinned, self._exact = zeros.names, zeros.exact
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
        return tensor_in(self.module(x, *args, **kwargs))

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


_CHECKPOINTING = "gradient_checkpointing"
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
