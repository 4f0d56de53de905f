"""A candidate: a site in a model and a block that could stand there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from constrained_growth.blocks import IdentityLinear, ResidualMLP, TanhLU
from constrained_growth.errors import BlockError, CandidateError
from constrained_growth.observation import untouched, visits


@dataclass(frozen=True)
class Candidate:
    """A layer that could be inserted.

    Attributes:
        after: Qualified name (as in `model.named_modules()`) of the submodule whose output is
            the site.
        block: A layer that is the identity at its pins; see `constrained_growth.blocks`. It is
            never changed: what is measured and inserted is a copy where it has to be moved.
        name: How the candidate is called; `after` by default. Unique in a problem.
        output: Which tensor of the module's output is the site, where that is a tuple, a dict or
            a dataclass: an index, a key or the name of an attribute. None (default): the output
            itself, or the first floating-point tensor in it.
    """

    after: str
    block: nn.Module
    name: str = ""
    output: int | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.after, str):
            raise CandidateError(
                f"after={self.after!r} is not a string; give the qualified name of a submodule, "
                'such as "3" or "encoder.layers.0".'
            )
        if not isinstance(self.block, nn.Module):
            raise BlockError(
                f"block={self.block!r} of the candidate after {self.after!r} is not an nn.Module; "
                "give an instance of one, such as cg.blocks.IdentityLinear(64, nn.ReLU())."
            )
        if isinstance(self.output, bool) or not isinstance(self.output, int | str | None):
            raise CandidateError(
                f"output={self.output!r} of the candidate after {self.after!r} is neither an "
                "index, nor a key or the name of an attribute, nor None for the first tensor."
            )
        if not self.name:
            object.__setattr__(self, "name", self.after)


def find_candidates(model: nn.Module, example_input: object) -> tuple[Candidate, ...]:
    """A sensible set of candidates for a feedforward or residual model, by watching it run.

    Looks at the leaf modules and residual blocks in the order in which they run. After an
    activation that allows an exact identity layer (ReLU, TanhLU) it proposes `IdentityLinear`;
    after any other activation module, and after every module that keeps the shape of its input
    and has parameters and children of its own (a residual block), `ResidualMLP` with the outer
    factor pinned. Only sites that are reached once and carry floating-point tensors of at least
    two dimensions count, each tensor once; the output of the model does not, nor what is inside
    a layer inserted earlier.

    Args:
        model: The model, left as it was.
        example_input: One input as in the data: a tensor, a tuple, or a dict of keyword arguments.

    Returns:
        The candidates, in the order of the forward pass, named after their sites.

    Raises:
        CandidateError: Nothing was found.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> [candidate.after for candidate in find_candidates(net, torch.randn(5, 2))]
        ['1']
    """
    modules = dict(model.named_modules())
    found = []
    with untouched(model):  # which also puts the random state back that the blocks draw from
        seen = visits(model, example_input, modules)
        last = next(reversed(seen.values())).output  # of the model itself
        places: dict[tuple[int, int], list[str]] = {}  # modules with one and the same output
        for name, visit in seen.items():
            if visit.count == 1 and visit.output is not last:
                places.setdefault((id(visit.output), visit.version), []).append(name)
        for names in places.values():
            sites = [name for name in names if not _is_inside_inserted(name, modules)]
            for name in names:
                block = _proposal(modules[name], seen[name].input, seen[name].output)
                if sites and block is not None:
                    found.append(Candidate(name if name in sites else sites[0], block))
                    break
    if not found:
        raise CandidateError(
            f"model={type(model).__name__} has no activation module and no module that keeps the "
            "shape of its input; write the candidates by hand: "
            "cg.Candidate(after='name of a submodule', block=...)."
        )
    return tuple(found)


def _is_inside_inserted(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is a layer inserted earlier, or a part of one."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i, part in enumerate(parts) if part == "inserted")
    return any(hasattr(modules.get(owner), "base") for owner in owners)


def _proposal(module: nn.Module, input: object, output: object) -> nn.Module | None:
    """The block to propose after one module, or None."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        return None
    width = output.shape[-1]
    keeps_shape = isinstance(input, Tensor) and input.shape == output.shape
    is_activation = keeps_shape and type(module).__module__ in _ACTIVATION_HOMES
    if is_activation:
        for block in (IdentityLinear, functools.partial(ResidualMLP, width)):
            try:
                return block(width, module)
            except BlockError:  # not the identity after itself; or, like Softmax, not elementwise
                continue
        return None
    is_block = keeps_shape and any(True for _ in module.children())
    if is_block and any(True for _ in module.parameters()):
        return ResidualMLP(width, width, nn.ReLU())
    return None


_ACTIVATION_HOMES = (nn.ReLU.__module__, TanhLU.__module__)
