"""L(θ, v) of the network with every candidate in it, which the multiplier pass never builds."""

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

_MAX_VARIABLES = 2000


class ExtendedNetwork(nn.Module):
    """A copy of the model in float64 on the CPU, with every block behind its site."""

    def __init__(self, problem: GrowthProblem) -> None:
        super().__init__()
        self.model = doubled(problem.model)
        self.blocks = nn.ModuleList(doubled(candidate.block) for candidate in problem.candidates)
        sites = {name: site for site in problem.sites for name in site.blocks}
        for candidate, block in zip(problem.candidates, self.blocks, strict=True):
            site = sites[candidate.name]
            hook = functools.partial(_with_block, block, site)
            self.model.get_submodule(site.after).register_forward_hook(hook, with_kwargs=True)

    def forward(self, input: object) -> Any:
        """The output of the model for one input of the data."""
        with eagerly():
            return call(self.model, input)


def _with_block(
    block: nn.Module, site: Site, module: nn.Module, args: Any, kwargs: Any, output: object
) -> Any:
    """The output of a module with a block behind it."""

    def layer(x: Tensor, context: Context) -> Tensor:
        args, kwargs = arguments(block, x, context)
        return block(*args, **kwargs).clone()  # the model may change its input in place

    return replaced(site.after, site.output, layer, module, args, kwargs, output)


class ExtendedProblem:
    """L(θ, v) of the extended network as a function of one flat vector.

    z = (θ − θ₀, v_1, v_2, …): the deviations of the trainable parameters of the model and of each
    pin from their current values.
    """

    def __init__(self, problem: GrowthProblem) -> None:
        self.problem = problem
        self.network = ExtendedNetwork(problem)
        self.loss_fn = doubled(problem.loss_fn)
        index = {candidate.name: i for i, candidate in enumerate(problem.candidates)}
        trained = {f"model.{n}": n for n, p in problem.model.named_parameters() if p.requires_grad}
        pinned = {
            f"blocks.{index[pin.candidate]}.{pin.parameter}": f"{pin.candidate}: {pin.parameter}"
            for pin in problem.constraints
        }
        # key in the extended network → name in messages, value, and number of entries in z
        self.names = trained | pinned
        self._base = {key: self.network.get_parameter(key).detach() for key in self.names}
        self.parts = {key: value.numel() for key, value in self._base.items()}
        # lengths of the parts of z: θ as a whole, then each pin
        self.sizes = [sum(self.parts[key] for key in trained), *map(self.parts.__getitem__, pinned)]
        self.zero = torch.zeros(sum(self.sizes), dtype=torch.float64)
        # for each candidate, the keys of θ and of its pins
        self.families = [
            [*trained, *(key for key in pinned if key.startswith(f"blocks.{i}."))]
            for i in index.values()
        ]
        with untouched(problem.model, problem.loss_fn, problem.data):
            self.batches = [
                (doubled(input), doubled(target), weight)
                for input, target in batches(problem.data, torch.device("cpu"))
                if (weight := batch_weight(problem.weight, input, target)) > 0
            ]
            self.total_weight = sum(weight for _, _, weight in self.batches)
            self._refuse_large_or_random()

    def _refuse_large_or_random(self) -> None:
        model = type(self.problem.model).__name__
        if self.zero.numel() > _MAX_VARIABLES:
            raise DataError(
                f"model={model} has {self.sizes[0]} trainable and {sum(self.sizes[1:])} pinned "
                f"parameters; verification takes up to {_MAX_VARIABLES} in all. Freeze some with "
                "requires_grad_(False), or use a smaller model."
            )
        if not torch.equal(self.loss(self.zero), self.loss(self.zero)):
            raise DataError(
                f"model={model}: the loss differs between two passes over the same data; switch "
                "Dropout and the like off: model.eval()."
            )

    def outputs(self, z: Tensor) -> list[Any]:
        """The outputs of the extended network on each batch."""
        pieces = z.split(list(self.parts.values()))
        values = {
            name: base + piece.view_as(base)
            for (name, base), piece in zip(self._base.items(), pieces, strict=True)
        }
        outputs = []
        for input, _, _ in self.batches:
            buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
            outputs.append(functional_call(self.network, values | buffers, (input,)))
        return outputs

    def loss(self, z: Tensor) -> Tensor:
        """L(θ, v), the mean over all samples."""
        losses = [
            self.loss_fn(output, target) * (weight / self.total_weight)
            for output, (_, target, weight) in zip(self.outputs(z), self.batches, strict=True)
        ]
        return torch.stack(losses).sum()

    def loss_and_gradient(self, z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """L and ∇L = (∇_θ L, ∇_v L)."""
        point = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        loss = self.loss(point)
        return loss.item(), torch.autograd.grad(loss, point)[0].numpy()

    def hessian(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """∇²L, by one double backward pass per variable."""
        point = torch.tensor(z, dtype=torch.float64)
        result = torch.autograd.functional.hessian(self.loss, point)
        assert isinstance(result, Tensor)  # a tuple only for tuples of points
        return result.numpy()

    def problem_at(self, z: NDArray[np.float64]) -> GrowthProblem:
        """The original problem, without the blocks, at θ₀ + (θ part of z)."""
        model = doubled(self.problem.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = torch.tensor(z[: self.sizes[0]]).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step.view_as(parameter))
        data = [(input, target) for input, target, _ in self.batches]
        weight = self.problem.weight
        return GrowthProblem(model, self.loss_fn, data, self.problem.candidates, weight=weight)


def doubled(value: Any) -> Any:
    """A copy on the CPU with floating-point numbers in float64; functions unchanged."""
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
