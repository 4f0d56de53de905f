"""L(θ, v) of the network with every candidate in it, which the multiplier pass never builds."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap

from constrained_growth._data import counted
from constrained_growth._sites.collector import replaced
from constrained_growth._sites.model import call
from constrained_growth._sites.snapshot import deepcopied, reached
from constrained_growth._sites.untouched import eagerly, untouched
from constrained_growth._structure import mapped
from constrained_growth.blocks.protocol import called_with
from constrained_growth.curvature import acting
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem

Vector = NDArray[np.float64]

_TOGETHER = 64
"""Points at which L is computed in one call: small instances, and few of them fill the memory."""


class ExtendedNetwork(nn.Module):
    """A copy of model and loss in float64 on the CPU, with every block behind its site."""

    def __init__(self, problem: GrowthProblem) -> None:
        super().__init__()
        self.model, loss_fn = copied(problem)
        self._loss_fn = (loss_fn,)  # no submodule: it may hold the model, which has one name
        self.blocks = nn.ModuleList(deepcopied(one.block) for one in problem.candidates)
        self.blocks.to("cpu", torch.float64)
        sites = {name: site for site in problem.sites for name in site.blocks}
        for candidate, block in zip(problem.candidates, self.blocks, strict=True):
            site = sites[candidate.name]
            hook = functools.partial(replaced, site.after, site.output, acting(block, block))
            self.model.get_submodule(site.after).register_forward_hook(hook, with_kwargs=True)

    @property
    def loss_fn(self) -> Any:
        """The copy of the loss."""
        return self._loss_fn[0]

    def forward(self, input: object, target: object, output: object = None) -> tuple[Any, Any]:
        """The output of the model for one input of the data, if none is given; and the loss."""
        with eagerly():
            output = call(self.model, input) if output is None else output
            return output, self.loss_fn(output, target)


class ExtendedProblem:
    """L(θ, v) of the extended network as a function of one flat vector.

    z = (θ − θ₀, v_1, v_2, …): the deviations of the trainable parameters of the model and of each
    pin from their current values.
    """

    def __init__(self, problem: GrowthProblem) -> None:
        self.problem = problem
        self.network = ExtendedNetwork(problem)
        index = {candidate.name: i for i, candidate in enumerate(problem.candidates)}
        trained = {f"model.{n}": n for n, p in problem.model.named_parameters() if p.requires_grad}
        pinned = {
            f"blocks.{index[pin.candidate]}.{pin.parameter}": f"{pin.candidate}: {pin.parameter}"
            for pin in problem.constraints
        }
        # key in the extended network → name in messages, value, and number of entries in z
        self.names = trained | pinned
        self._base = {key: self.network.get_parameter(key).detach().clone() for key in self.names}
        self.parts = {key: value.numel() for key, value in self._base.items()}
        # lengths of the parts of z: θ as a whole, then each pin
        self.sizes = [sum(self.parts[key] for key in trained), *map(self.parts.__getitem__, pinned)]
        self.zero = torch.zeros(sum(self.sizes), dtype=torch.float64)
        self._batched = True
        with untouched(problem.model, problem.loss_fn, problem.data):
            self.batches = [
                (doubled(input), doubled(target), weight)
                for input, target, weight in counted(
                    problem.data, torch.device("cpu"), problem.weight
                )
            ]
            self.total_weight = sum(weight for _, _, weight in self.batches)
            self._refuse_random_or_closures()

    def refuse_large(self, most: int) -> None:
        """Refuse what a solver of small instances cannot take."""
        if self.zero.numel() > most:
            raise DataError(
                f"model={type(self.problem.model).__name__} has {self.sizes[0]} trainable and "
                f"{sum(self.sizes[1:])} pinned parameters; verification takes up to {most} in all. "
                "Freeze some with requires_grad_(False), or use a smaller model."
            )

    def _refuse_random_or_closures(self) -> None:
        model = type(self.problem.model).__name__
        originals = {id(m) for m in self.problem.model.modules()}
        originals |= {id(p) for p in self.problem.model.parameters()}
        # deepcopy does not look into closures: such a loss would read the θ of the original
        if any(id(value) in originals for value in reached(self.network.loss_fn)):
            raise DataError(
                f"loss_fn={self.problem.loss_fn!r:.80} reads model={model} by closure, "
                "and would go on reading it where a copy is solved. Make it an "
                "nn.Module that has the model as an attribute, so that both are copied together."
            )
        if not torch.equal(self.loss(self.zero), self.loss(self.zero)):
            raise DataError(
                f"model={model}: the loss differs between two passes over the same data; switch "
                "Dropout and the like off: model.eval()."
            )

    def each(self, z: Tensor, outputs: Sequence[Any] | None = None) -> Iterator[tuple[Any, Tensor]]:
        """The output of the extended network on each batch, or a given one, and its mean loss."""
        # a loss may pick the parameters that require gradients
        return self._each(z if z.requires_grad else z.detach().requires_grad_(), outputs)

    def _each(self, z: Tensor, outputs: Sequence[Any] | None) -> Iterator[tuple[Any, Tensor]]:
        with torch.enable_grad():
            pieces = z.split(list(self.parts.values()))
            values = {
                name: base + piece.view_as(base)
                for (name, base), piece in zip(self._base.items(), pieces, strict=True)
            }
        given = [None] * len(self.batches) if outputs is None else outputs
        for (input, target, _), output in zip(self.batches, given, strict=True):
            # every batch from the same running statistics, or L would depend on their order
            yield called_with(self.network, values, (input, target, output), {})

    def outputs(self, z: Tensor) -> list[Any]:
        """The outputs of the extended network on each batch, without a graph."""
        found = [output for output, _ in self.each(z)]
        return [output.detach() if isinstance(output, Tensor) else output for output in found]

    def loss(self, z: Tensor, outputs: Sequence[Any] | None = None) -> Tensor:
        """L(θ, v), the mean over all samples; or with these outputs in place of the network's."""
        return self._mean(self.each(z, outputs))

    def _mean(self, each: Iterator[tuple[Any, Tensor]]) -> Tensor:
        losses = [
            loss * (weight / self.total_weight)
            for (_, loss), (_, _, weight) in zip(each, self.batches, strict=True)
        ]
        return torch.stack(losses).sum()

    def losses_at(self, points: Tensor) -> Tensor:
        """L at several points (points, variables)."""
        return self._at(points, self._mean)

    def outputs_at(self, points: Tensor) -> Tensor:
        """The outputs on all batches in one row, which are tensors, at several points."""
        return self._at(points, lambda each: torch.cat([output.flatten() for output, _ in each]))

    def _at(self, points: Tensor, function: Callable[[Iterator[Any]], Tensor]) -> Tensor:
        """A function of `each` at several points, in one call if the network can be batched."""
        if self._batched:
            try:
                with warnings.catch_warnings(action="ignore"):  # that an operation is not batched
                    of_each = vmap(lambda z: function(self._each(z, None)), chunk_size=_TOGETHER)
                    found = of_each(points).detach()
                alone = function(self.each(points[0])).detach()
                error, size = (found[0] - alone).abs().max(), alone.abs().max()
                self._batched = bool(error <= 1e-12 * size)
                if self._batched:
                    return found
            except (RuntimeError, ValueError, TypeError):
                self._batched = False  # it writes in place, branches on values, …
        return torch.stack([function(self.each(z)).detach() for z in points])

    def problem_at(self, z: Vector) -> GrowthProblem:
        """The original problem, without the blocks, at θ₀ + (θ part of z)."""
        model, loss_fn = copied(self.problem)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = torch.tensor(z[: self.sizes[0]]).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step.view_as(parameter))
        data = [(input, target) for input, target, _ in self.batches]
        weight = self.problem.weight
        return GrowthProblem(model, loss_fn, data, self.problem.candidates, weight=weight)


def with_gradient(loss: Callable[[Tensor], Tensor], point: Vector) -> tuple[float, Vector]:
    """A function and its gradient, by autograd."""
    z = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    value = loss(z)
    return value.item(), torch.autograd.grad(value, z)[0].numpy()


def hessian(loss: Callable[[Tensor], Tensor], point: Vector) -> Vector:
    """Its second derivatives."""
    with warnings.catch_warnings(action="ignore"):  # that some operations are not vectorized
        found = torch.autograd.functional.hessian(loss, torch.tensor(point), vectorize=True)
    assert isinstance(found, Tensor)  # a tuple only for tuples of points
    return found.numpy()


def copied(problem: GrowthProblem) -> tuple[nn.Module, Any]:
    """Model and loss, copied together, so that a loss that holds the model holds the copy."""
    model, loss_fn = deepcopied((problem.model, problem.loss_fn))
    if isinstance(loss_fn, nn.Module):
        loss_fn = loss_fn.to("cpu", torch.float64)
    return model.to("cpu", torch.float64), loss_fn


def doubled(value: Any) -> Any:
    """A copy of an input or target on the CPU, with floating-point numbers in float64."""

    def double(tensor: Tensor) -> Tensor:
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype, copy=True)

    return mapped(value, double)
