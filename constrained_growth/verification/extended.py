"""L(θ, v) with every candidate really standing in the network, for solvers from elsewhere.

Independent of the multiplier pass, which never builds that network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from constrained_growth._data import batch_weight, batches
from constrained_growth._sites.collector import replaced
from constrained_growth._sites.context import Context, arguments
from constrained_growth._sites.model import call
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import eagerly, untouched
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem


class ExtendedNetwork(nn.Module):
    """A copy of the model, in float64 on the CPU, every block really standing behind its site."""

    def __init__(self, problem: GrowthProblem) -> None:
        super().__init__()
        self.model = doubled(problem.model)
        self.blocks = nn.ModuleList(doubled(candidate.block) for candidate in problem.candidates)
        sites = {name: site for site in problem.sites for name in site.blocks}
        for candidate, block in zip(problem.candidates, self.blocks, strict=True):
            site = sites[candidate.name]
            hook = functools.partial(_stand, block, site)
            self.model.get_submodule(site.after).register_forward_hook(hook, with_kwargs=True)

    def forward(self, input: object) -> Any:
        """The output of the model for one input as in the data."""
        with eagerly():
            return call(self.model, input)


def _stand(
    block: nn.Module, site: Site, module: nn.Module, args: Any, kwargs: Any, output: object
) -> Any:
    """The output of a module with a block behind it."""

    def layer(x: Tensor, context: Context) -> Tensor:
        args, kwargs = arguments(block, x, context)
        return block(*args, **kwargs).clone()  # the model may go on to change what it gets

    return replaced(site.after, module, args, kwargs, output, site.output, layer)


class ExtendedProblem:
    """L(θ, v) of the network with all its blocks in it, as a function of one flat vector.

    z = (θ − θ₀, v_1, v_2, …): the deviations of the trainable parameters of the model, one after
    the other, and then of each pin, from the values they have now.

    Attributes:
        batches: (input, target, how much it counts) of each batch.
        names: Key of each variable tensor in the extended network → what to call it.
        parts: Key of each variable tensor → how many entries it has in z.
        families: The keys of θ and of the pins of one candidate, for each candidate.
        whole: How much all batches count together.
        sizes: Lengths of the parts of z: θ as a whole, then each pin.
        zero: z = 0.
        loss_fn: The problem's, in float64.
    """

    def __init__(self, problem: GrowthProblem) -> None:
        self.problem = problem
        self.network = ExtendedNetwork(problem)
        self.loss_fn = doubled(problem.loss_fn)
        index = {candidate.name: i for i, candidate in enumerate(problem.candidates)}
        trainable = {
            f"model.{n}": n for n, p in problem.model.named_parameters() if p.requires_grad
        }
        pinned = {
            f"blocks.{index[pin.candidate]}.{pin.parameter}": f"{pin.candidate}: {pin.parameter}"
            for pin in problem.constraints
        }
        self.names = trainable | pinned
        self._base = {key: self.network.get_parameter(key).detach() for key in self.names}
        self.parts = {key: value.numel() for key, value in self._base.items()}
        self.sizes = [
            sum(self.parts[key] for key in trainable),
            *(self.parts[key] for key in pinned),
        ]
        self.zero = torch.zeros(sum(self.sizes), dtype=torch.float64)
        self.families = [
            [*trainable, *(key for key in pinned if key.startswith(f"blocks.{i}."))]
            for i in index.values()
        ]
        with untouched(problem.model, problem.data):
            self.batches = [
                (doubled(input), doubled(target), weight)
                for input, target in batches(problem.data, torch.device("cpu"))
                if (weight := batch_weight(problem.weight, input, target)) > 0
            ]
            self.whole = sum(weight for _, _, weight in self.batches)
            self._refuse_large_or_random()

    def _refuse_large_or_random(self) -> None:
        model = type(self.problem.model).__name__
        if self.zero.numel() > _MAX_VARIABLES:
            raise DataError(
                f"model={model} has {self.sizes[0]} trainable and {sum(self.sizes[1:])} pinned "
                f"parameters; verification is for small instances, up to {_MAX_VARIABLES} in all. "
                "Freeze some with requires_grad_(False), or take a smaller model."
            )
        if not torch.equal(self.loss(self.zero), self.loss(self.zero)):
            raise DataError(
                f"model={model}: the loss differs between two passes over the same data, so there "
                "is no L(θ, v) to minimise; put Dropout and the like into eval mode: model.eval()."
            )

    def outputs(self, z: Tensor) -> list[Any]:
        """What the extended network gives on each batch."""
        pieces = z.split(list(self.parts.values()))
        values = {
            name: base + piece.view_as(base)
            for (name, base), piece in zip(self._base.items(), pieces, strict=True)
        }
        return [
            functional_call(self.network, values | self._buffers(), (input,))
            for input, _, _ in self.batches
        ]

    def _buffers(self) -> dict[str, Tensor]:
        """Fresh copies, for a forward pass to write to."""
        return {name: buffer.clone() for name, buffer in self.network.named_buffers()}

    def loss(self, z: Tensor) -> Tensor:
        """L(θ, v), the mean over all samples."""
        losses = [
            self.loss_fn(output, target) * (weight / self.whole)
            for output, (_, target, weight) in zip(self.outputs(z), self.batches, strict=True)
        ]
        return torch.stack(losses).sum()

    def loss_and_gradient(self, z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """L and ∇L = (∇_θ L, ∇_v L), by one backward pass."""
        point = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        loss = self.loss(point)
        return loss.item(), torch.autograd.grad(loss, point)[0].numpy()

    def hessian(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """∇²L, by one double backward pass for each variable."""
        point = torch.tensor(z, dtype=torch.float64)
        result = torch.autograd.functional.hessian(self.loss, point)
        assert isinstance(result, Tensor)  # a tuple only for tuples of points
        return result.numpy()

    def problem_at(self, z: NDArray[np.float64]) -> GrowthProblem:
        """The same problem at θ₀ + (θ part of z), v = 0, without the blocks standing in it."""
        model = doubled(self.problem.model)
        moved = torch.tensor(z[: self.sizes[0]], dtype=torch.float64)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, piece in zip(
                parameters, moved.split([p.numel() for p in parameters]), strict=True
            ):
                p.add_(piece.view_as(p))
        data = [(input, target) for input, target, _ in self.batches]
        weight = self.problem.weight
        return GrowthProblem(model, self.loss_fn, data, self.problem.candidates, weight=weight)


def doubled(value: Any) -> Any:
    """A copy on the CPU with floating-point numbers in float64; functions as they are."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to("cpu", torch.float64)
    if isinstance(value, Tensor):
        dtype = torch.float64 if value.is_floating_point() else value.dtype
        return value.detach().to("cpu", dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(doubled(item) for item in value)
    return value


_MAX_VARIABLES = 2000
