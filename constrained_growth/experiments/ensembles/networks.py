"""Many small networks of one architecture as one program: stacked parameters, batched products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from constrained_growth.errors import CandidateError, DataError
from constrained_growth.experiments.ensembles.stages import (
    Convolution,
    Stage,
    activated,
    affine,
    stage_of,
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), both (replicas, classes, samples), to the mean loss of each (replicas,)."""


@dataclass(frozen=True)
class Stack:
    """An architecture: hidden layers, then an affine map to the outputs."""

    inputs: int
    stages: tuple[Stage, ...]
    outputs: int

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of the parameters, stage by stage, the output layer last."""
        widths = [self.inputs, *(stage.width for stage in self.stages)]
        hidden = (s.shapes(w) for s, w in zip(self.stages, widths, strict=False))
        return (*hidden, ((self.outputs, widths[-1]), (self.outputs,)))


@dataclass(frozen=True)
class Samples:
    """Inputs (replicas or 1, features, samples) and targets (replicas or 1, outputs, samples).

    Classes are unit vectors; a first dimension of 1 holds the same data for all replicas.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Ensemble:
    """Replicas of one architecture, each with its own parameters."""

    stack: Stack
    parameters: Tensor  # (replicas, parameters), in the order of `model.parameters()`
    running: Tensor  # (replicas,), which are still trained, bool
    last_loss: Tensor  # (replicas,), of the last epoch each was trained in; NaN before the first
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # the optimizer's, like parameters
    epochs: int = 0  # how long it was trained

    def take(self, index: Tensor | Sequence[int]) -> Ensemble:
        """Some of the replicas, or the same one several times."""
        rows = torch.as_tensor(index)
        return replace(
            self,
            parameters=self.parameters[rows],
            running=self.running[rows],
            last_loss=self.last_loss[rows],
            memory={key: value[rows] for key, value in self.memory.items()},
        )

    def __len__(self) -> int:
        return len(self.parameters)


def ensemble(models: Sequence[nn.Sequential]) -> Ensemble:
    """Stack plain networks of one architecture; their parameters are copied.

    Each is a sequence of `nn.Linear` followed by an elementwise activation, and of the blocks that
    `stage_of` knows, with an `nn.Linear` last; between `nn.Unflatten` and `nn.Flatten` also
    `nn.Conv2d` with an activation, padded by half of its kernel. The activations are those of the
    first network.

    Raises:
        CandidateError: A network has another form, or the architectures differ.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> ensemble([model, model]).parameters.shape
        torch.Size([2, 27])
    """
    stack = _stack_of(models[0])
    shapes = [tuple(p.shape) for p in models[0].parameters()]
    for model in models:
        if [tuple(p.shape) for p in model.parameters()] != shapes:
            raise CandidateError(
                "models are not of one architecture: their parameters have different shapes."
            )
    rows = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in models]
    parameters = torch.stack(rows)
    running = torch.ones(len(rows), dtype=torch.bool)
    return Ensemble(stack, parameters, running, parameters.new_full((len(rows),), torch.nan))


def sites_of(model: nn.Sequential) -> list[tuple[str, int]]:
    """Names and widths (of convolutions: channels) of the sites after hidden layers, in order."""
    width, found = 0, []
    for name, module in list(model.named_children())[:-1]:
        if isinstance(module, nn.Linear):
            width = module.out_features
        elif isinstance(module, nn.Conv2d):
            width = module.out_channels
        elif not isinstance(module, nn.Flatten | nn.Unflatten):
            found.append((name, width))
    return found


def samples(x: Sequence[Tensor], y: Sequence[Tensor], classes: int | None = None) -> Samples:
    """The data of each replica, or one data set for all, in the layout of an ensemble.

    `x` has tensors (samples, features), `y` integer labels (samples,) or targets (samples,
    outputs), one for each replica or a single one; by default the labels give the classes.
    """
    if len(x) != len(y) or len({v.shape for v in x}) != 1 or len({v.shape for v in y}) != 1:
        raise DataError("x and y must hold data sets of one size, as many of x as of y.")
    inputs, targets = torch.stack(tuple(x)), torch.stack(tuple(y))
    if not targets.is_floating_point():
        classes = 1 + int(targets.max()) if classes is None else classes
        targets = nn.functional.one_hot(targets, classes).to(inputs.dtype)
    return Samples(inputs.mT.contiguous(), targets.mT.contiguous())


def forward(stack: Stack, parameters: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (replicas, outputs, samples), and the output of each hidden stage, their sites.

    Parameters have shape (replicas, parameters), inputs (replicas or 1, features, samples).
    """
    *hidden, (weight, bias) = parts(parameters, stack.shapes)
    x = x.expand(len(parameters), -1, -1)
    sites = []
    for stage, mine in zip(stack.stages, hidden, strict=True):
        x = stage(mine, x)
        sites.append(x)
    return affine(weight, bias, x), sites


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of each replica, in nats; targets are unit vectors."""
    return -(output.log_softmax(1) * target).sum((1, 2)) / output.shape[2]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over samples and outputs of the squared error of each replica."""
    return (output - target).square().mean((1, 2))


def error_rate(stack: Stack, parameters: Tensor, data: Samples) -> Tensor:
    """Share of samples that each replica puts into a wrong class, shape (replicas,)."""
    with torch.no_grad():
        output, _ = forward(stack, parameters, data.x)
        right = (output * data.y).sum(1) >= output.amax(1)
        return 1 - right.to(output.dtype).mean(1)


def gradient(
    stack: Stack, parameters: Tensor, data: Samples, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """Loss of each replica, shape (replicas,), and its gradient, shape (replicas, parameters)."""
    with torch.enable_grad():
        leaf = parameters.detach().requires_grad_()
        losses = loss(forward(stack, leaf, data.x)[0], data.y)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), found


def multiply_adds(stack: Stack) -> int:
    """Multiply-adds of one forward pass of one sample, without biases and activations."""
    *hidden, (last, _) = stack.shapes
    each = [operations(*pair) for pair in zip(stack.stages, hidden, strict=True)]
    return sum(each) + math.prod(last)


def operations(stage: Stage, shapes: Sequence[tuple[int, ...]]) -> int:
    """Multiply-adds of one stage; each weight is used once, that of a kernel at each position."""
    positions = math.prod(stage.out_size) if isinstance(stage, Convolution) else 1
    return positions * sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def parts(flat: Tensor, shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[list[Tensor]]:
    """The parameters stage by stage, each (replicas, *shape), as views."""
    sizes = [math.prod(shape) for stage in shapes for shape in stage]
    pieces = iter(flat.split(sizes, dim=1))
    return [[next(pieces).unflatten(1, shape) for shape in stage] for stage in shapes]


def _stack_of(model: nn.Sequential) -> Stack:
    modules = list(model)
    last, stages = modules.pop(), list[Stage]()
    if not isinstance(last, nn.Linear):
        raise CandidateError("model must end with an nn.Linear.")
    inputs, size = 0, (1, 1)
    while modules:
        module = modules.pop(0)
        if isinstance(module, nn.Unflatten):
            _, height, width = (int(n) for n in module.unflattened_size)
            inputs, size = math.prod(module.unflattened_size), (height, width)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if not modules:
                raise CandidateError(f"{module} of model has no activation.")
            inputs = inputs or int(module.weight.shape[1])
            stages.append(activated(module, modules.pop(0), size))
        elif not isinstance(module, nn.Flatten):
            stages.append(stage_of(module, stages[-1] if stages else None))
        if stages and isinstance(stages[-1], Convolution):
            size = stages[-1].out_size
    if not inputs:
        raise CandidateError("model must begin with an nn.Linear, or an nn.Unflatten for images.")
    return Stack(inputs, tuple(stages), last.out_features)
