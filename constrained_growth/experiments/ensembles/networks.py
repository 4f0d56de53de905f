"""Many small networks of one architecture as one program: stacked parameters, batched products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from constrained_growth.blocks import IdentityConv2d, IdentityLinear, ResidualMLP
from constrained_growth.errors import BlockError, CandidateError, DataError

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), both (replicas, classes, samples), to the mean loss of each (replicas,)."""


@dataclass(frozen=True)
class Samples:
    """Inputs (replicas or 1, features, samples) and targets (replicas or 1, outputs, samples).

    Classes are unit vectors; a first dimension of 1 holds the same data for all replicas.
    """

    x: Tensor
    y: Tensor

    def take(self, rows: Sequence[int]) -> Samples:
        """Those of some replicas."""
        return Samples(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Ensemble:
    """Replicas of one architecture, each with its own parameters."""

    model: nn.Sequential  # the architecture; the values of its parameters are not used
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

    def write_to(self, models: Sequence[nn.Module]) -> None:
        """Give each plain network the parameters of its replica."""
        for model, values in zip(models, self.parameters, strict=True):
            nn.utils.vector_to_parameters(values.clone(), model.parameters())

    def __len__(self) -> int:
        return len(self.parameters)


def ensemble(models: Sequence[nn.Sequential]) -> Ensemble:
    """Stack plain networks of one architecture; their parameters are copied.

    Each is a sequence of what `apply` knows, with an `nn.Linear` last. The modules without
    parameters are those of the first network.

    Raises:
        CandidateError: The parameters of the networks have different shapes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> ensemble([model, model]).parameters.shape
        torch.Size([2, 27])
    """
    if len({str([tuple(p.shape) for p in model.parameters()]) for model in models}) != 1:
        raise CandidateError(
            "models are not of one architecture: their parameters have different shapes."
        )
    rows = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in models]
    parameters = torch.stack(rows)
    running = torch.ones(len(rows), dtype=torch.bool)
    return Ensemble(models[0], parameters, running, parameters.new_full((len(rows),), torch.nan))


def is_site(module: nn.Module) -> bool:
    """Whether a layer can be inserted after this hidden module: a block or an activation."""
    return not isinstance(module, nn.Linear | nn.Conv2d | nn.Flatten | nn.Unflatten)


def sites_of(model: nn.Sequential) -> list[tuple[str, int]]:
    """Names and widths (of convolutions: channels) of the sites after hidden layers, in order."""
    width, found = 0, []
    for name, module in list(model.named_children())[:-1]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            width = len(module.weight)
        elif is_site(module):
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


def forward(model: nn.Sequential, parameters: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (replicas, outputs, samples), and the output of each site.

    Parameters have shape (replicas, parameters), inputs (replicas or 1, features, samples).
    """
    values, sites = iter(split(model, parameters)), []
    x = x.expand(len(parameters), -1, -1)
    for module in model:
        x = apply(module, [next(values) for _ in module.parameters()], x)
        if is_site(module):
            sites.append(x)
    return x, sites


def split(module: nn.Module, flat: Tensor) -> list[Tensor]:
    """Views of (replicas, parameters) as the parameters of a module, each (replicas, *shape)."""
    shapes = [p.shape for p in module.parameters()]
    pieces = flat.split([shape.numel() for shape in shapes], dim=1)
    return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def apply(module: nn.Module, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """A module on all replicas, with parameters (replicas, *shape) in place of its own.

    x has shape (replicas, features, samples), or (replicas, channels, height, width, samples)
    between `nn.Unflatten` and `nn.Flatten`, where convolutions are. A module without parameters
    has to be elementwise.

    Raises:
        BlockError: There is no stacked form of the module.
    """
    match module:
        case nn.Linear(bias=nn.Parameter()):
            return _affine(x, *parameters)
        case IdentityLinear() if not module.shift:
            return module.activation(_affine(x, *parameters))
        case ResidualMLP():
            inner, bias, outer = parameters
            return torch.baddbmm(x, outer, module.activation(_affine(x, inner, bias)))
        case nn.Conv2d(bias=nn.Parameter()) if _is_plain(module):
            return _convolution(x, module.stride, *parameters)
        case IdentityConv2d() if not module.shift:
            return module.activation(_convolution(x, (1, 1), *parameters))
        case nn.Unflatten():
            return x.unflatten(1, module.unflattened_size)
        case nn.Flatten():
            return x.flatten(1, -2)
        case _ if not parameters:
            return module(x)
    raise BlockError(
        f"{module} has no stacked form; give ResidualMLP, IdentityLinear or IdentityConv2d with "
        "ReLU, nn.Linear, or nn.Conv2d padded by half of its kernel, both with a bias."
    )


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Wx + b of every replica."""
    return torch.baddbmm(bias.unsqueeze(2), weight, x)


def _is_plain(module: nn.Conv2d) -> bool:
    size = module.kernel_size[0]
    padded = module.padding == (size // 2, size // 2) and module.padding_mode == "zeros"
    square = module.kernel_size == (size, size) and size % 2 == 1
    return padded and square and module.groups == 1 and module.dilation == (1, 1)


def _convolution(x: Tensor, stride: tuple[int, ...], kernel: Tensor, bias: Tensor) -> Tensor:
    """K ∗ x + b of every replica, K of odd size k, with zeros around the image, half of k wide.

    One product per replica, since a grouped convolution is slow on CPUs: a column of the output
    comes from k columns of the input, by a matrix banded in height.
    """
    replicas, _, height, width, samples = x.shape
    channels, size = kernel.shape[1], kernel.shape[-1]
    down, right = (-(-side // step) for side, step in zip((height, width), stride, strict=True))
    bands = _bands(height, size, stride[0], x.dtype).flatten(1)
    rows = (kernel.mT @ bands).unflatten(-1, (down, height))
    matrix = rows.permute(0, 1, 4, 3, 2, 5).reshape(replicas, channels * down, -1)
    columns = pad(x.flatten(1, 2), (0, 0, size // 2, size // 2))
    seen = [columns[:, :, j : j + width : stride[1]] for j in range(size)]
    y = torch.baddbmm(
        bias.repeat_interleave(down, 1).unsqueeze(2),
        matrix,
        torch.cat(seen, 1).reshape(replicas, -1, right * samples),
    )
    return y.reshape(replicas, channels, down, right, samples)


@cache
def _bands(height: int, kernel: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Which input row each kernel row meets, shape (k, output rows, input rows)."""
    out = stride * torch.arange(-(-height // stride)).view(1, -1, 1)
    met = out + torch.arange(kernel).view(-1, 1, 1) - kernel // 2
    return (met == torch.arange(height)).to(dtype)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of each replica, in nats; targets are unit vectors."""
    return -(output.log_softmax(1) * target).sum((1, 2)) / output.shape[2]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over samples and outputs of the squared error of each replica."""
    return (output - target).square().mean((1, 2))


def error_rate(model: nn.Sequential, parameters: Tensor, data: Samples) -> Tensor:
    """Share of samples that each replica puts into a wrong class, shape (replicas,)."""
    with torch.no_grad():
        output, _ = forward(model, parameters, data.x)
        right = (output * data.y).sum(1) >= output.amax(1)
        return 1 - right.to(output.dtype).mean(1)


def gradient(
    model: nn.Sequential, parameters: Tensor, data: Samples, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """Loss of each replica, shape (replicas,), and its gradient, shape (replicas, parameters)."""
    with torch.enable_grad():
        leaf = parameters.detach().requires_grad_()
        losses = loss(forward(model, leaf, data.x)[0], data.y)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), found
