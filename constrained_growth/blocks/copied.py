"""A copy of a block of the model, which starts as the identity."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import flag, instance
from constrained_growth._sites.outputs import tensor_in
from constrained_growth._sites.scripting import is_scripting, scriptable_forward
from constrained_growth._sites.snapshot import deepcopied, without_hooks
from constrained_growth.blocks.branches import branch_ends
from constrained_growth.blocks.protocol import REGISTERED, pinned_parameters
from constrained_growth.errors import BlockError


class CopiedBlock(nn.Module):
    """A copy of a residual block, with the last parameters of its branches pinned at zero.

    The block x ↦ x + f(x) is the identity where the output projections of f are zero: those of
    the attention and the MLP of a pre-norm transformer block, its layer scales if it has them, the
    last γ and β of a residual convolution block. All other parameters keep the values of the
    original. Of a product one factor is pinned, never both, so that λ does not vanish.

    A block that normalises the sum (post-norm, as in BERT) is refused. One with a ReLU after the
    sum is the identity where x ≥ 0, which is checked on the data.

    The copy is called with all arguments of the module at its site, such as masks and position
    embeddings, except a cache of keys and values, which it neither reads nor writes. Inserted
    after an element of an `nn.ModuleList` or `nn.Sequential` it becomes the next element, as a
    module of the original's class.

    Args:
        module: The block to copy, left unchanged. It may be frozen; the copy is trainable.
        pinned: Names of the parameters of `module` that make it the identity where they are zero.
            None (default) finds them in autograd's graph of one call.
        args: The positional arguments of that call, the tensor x first. None (default) tries
            tensors of the usual shapes; a module that needs more than x needs an example.
        kwargs: The keyword arguments of that call.
        share: Whether the block keeps the parameters of `module` that are not pinned, and its
            constants (buffers that are not saved), until it is copied by `copy.deepcopy` or
            inserted: it then gets their values of that moment. So candidates take no memory,
            as those of `find_candidates`. Such a block is there to be measured: do not train it.

    Weights:
        Those of `module`, as `module.…`; the pinned ones are in `pinned`.

    Raises:
        BlockError: `module` cannot be made the identity by zeros at the ends of its branches or
            cannot be called, or `pinned` names parameters it does not have.

    Example:
        >>> import torch
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
        share: bool = False,
    ) -> None:
        super().__init__()
        instance("module", module, nn.Module, BlockError, "the block to copy, an nn.Module")
        names = instance("pinned", pinned or (), Sequence, BlockError, "a tuple of names")
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            kind = "a string" if isinstance(names, str) else "no tuple of names"
            raise BlockError(f"pinned={pinned!r:.80} is {kind}; give a tuple of names.")
        instance("args", args or (), Sequence, BlockError, "the arguments of a call, (x, …)")
        instance("kwargs", kwargs or {}, Mapping, BlockError, "keyword arguments, {…}")
        flag("share", share, BlockError)
        module = getattr(module, "_orig_mod", module)  # of torch.compile
        self.original = Original(module)
        self.module = _copied(module, share)
        self._exact = False
        self._checkpointed = tuple(
            name for name, m in self.module.named_modules() if vars(m).get(_CHECKPOINTING)
        )
        for name in self._checkpointed:  # the block runs without
            setattr(self.module.get_submodule(name), _CHECKPOINTING, False)
        if pinned is None:
            scratch = copy.deepcopy(self)
            pinned, self._exact = branch_ends(scratch, scratch.module, args, kwargs or {})
        self.pinned = tuple(f"module.{name}" for name in pinned)
        with torch.no_grad():
            for parameter in pinned_parameters(self).values():
                if share and type(parameter) is nn.Parameter:  # its memory is that of the original
                    parameter.data = torch.zeros_like(parameter)
                else:
                    parameter.zero_()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first tensor in the output of the copy, of the shape of x."""
        args = tuple(_without_cache(value, x) for value in args)
        kwargs = {name: _without_cache(value, x) for name, value in kwargs.items()}
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return tensor_in(self.module(x, *args, **kwargs))

    def __prepare_scriptable__(self) -> nn.Module:
        object.__setattr__(self, "__class__", _ScriptableCopy)
        return self

    def exact_after(self, site: nn.Module) -> bool:
        """Whether the path from x to the output has nothing but sums."""
        return self._exact

    def standalone(self) -> nn.Module:
        """The copied module itself, of the class of the original, with tensors of its own."""
        self.module = copy.deepcopy(self.module)
        for name in self._checkpointed:
            setattr(self.module.get_submodule(name), _CHECKPOINTING, True)
        return self.module


class _Forward:
    """The method `forward`, or what torch.jit.script compiles: no variable arguments."""

    def __get__(self, copy: Any, owner: Any) -> Any:
        if copy is None or not is_scripting():
            return CopiedBlock.forward.__get__(copy, owner)
        return scriptable_forward(copy.module, "module", [])


class _ScriptableCopy(CopiedBlock):
    """What a copy becomes once torch.jit.script comes across it: it returns all of its output."""

    forward = _Forward()  # type: ignore[assignment]


def listed_form(block: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """What `standalone` of a block gives, and its pins, only to be looked at.

    A copy shares its tensors.
    """
    if isinstance(block, CopiedBlock):
        return block.module, pinned_parameters(block)
    block = deepcopied(block)
    return standalone_form(block), pinned_parameters(block)


def standalone_form(block: Any) -> nn.Module:
    """The module `block.standalone()`, made without drawing random numbers."""
    # a user's may build a fresh module, whose initial values would cost the run random numbers
    with torch.random.fork_rng(devices=[]):
        layer = block.standalone()
    pins = {id(p) for p in pinned_parameters(block).values()}
    if not isinstance(layer, nn.Module) or not pins <= {id(p) for p in layer.parameters()}:
        raise BlockError(
            f"block={type(block).__name__}: standalone() returned a {type(layer).__name__} that "
            "does not hold the pinned parameters of the block themselves."
        )
    return layer


REGISTERED[CopiedBlock.__qualname__] = CopiedBlock

_CHECKPOINTING = "gradient_checkpointing"


class Original:
    """The module that was copied, if it is known. It is not kept alive, nor copied or pickled."""

    def __init__(self, module: nn.Module | None) -> None:
        self._reference = None if module is None else weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        """The module, or None."""
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        module = self.module  # copied in the same call, where the whole model is
        return Original(memo.get(id(module), module))

    def __reduce__(self) -> Any:
        return Original, (None,)


def _copied(module: nn.Module, share: bool) -> nn.Module:
    """A trainable deep copy, without hooks, which belong to the original.

    With `share` its parameters and constants are other tensors with the same memory.
    """
    memo = dict[int, Any]()
    if share:  # but for what is quantised or sharded, or persistent and so changes as it runs
        memo |= {
            id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in module.parameters()
            if type(parameter) is nn.Parameter
        }
        memo |= {
            id(buffer): buffer.detach()
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if name in part._non_persistent_buffers_set and buffer is not None
        }
    copied = without_hooks(module, memo)
    for parameter in copied.parameters():
        parameter.grad = None  # deepcopy has copied the original's
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return copied


def _without_cache(value: Any, x: Tensor) -> Any:
    """None in place of a cache of keys and values; any other value unchanged."""
    if not (hasattr(value, "get_seq_length") and hasattr(value, "update")):
        return value
    length = 0
    with suppress(Exception):
        length = int(value.get_seq_length())
    if x.dim() > 1 and length > x.shape[1]:  # without its past it would compute something else
        raise BlockError(
            f"a copied block was called with a cache of {length} positions for {x.shape[1]} new "
            "ones, and has no cache: call the model with use_cache=False, or insert the block "
            "after a layer that the config counts."
        )
    return None
