"""Independent ways to the same numbers, small models, and a witness of what was changed."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import constrained_growth as cg

Loss = Callable[[Any, Any], Tensor]
CROSS_ENTROPY = nn.CrossEntropyLoss()


# --- models and data ------------------------------------------------------------------------


def feedforward(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear, activation, Linear, activation, …, Linear."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def classified(num: int, width: int = 2, classes: int = 3, batch: int | None = None) -> list[Any]:
    """Random inputs with random classes, in batches of which the last one may be smaller."""
    x, y = torch.randn(num, width), torch.randint(classes, (num,))
    return list(zip(x.split(batch or num), y.split(batch or num), strict=True))


def candidate(after: str = "1", width: int = 4, **options: Any) -> cg.Candidate:
    """A candidate for `feedforward(…, width, …)`: by default an identity layer after its ReLU."""
    block = options.pop("block", None) or cg.blocks.IdentityLinear(width, nn.ReLU())
    return cg.Candidate(after=after, block=block, **options)


def solved(
    model: nn.Module, data: Iterable[Any], *candidates: cg.Candidate, **options: Any
) -> cg.Solution:
    """`solve` with the cross-entropy and the Frobenius norm, or another `loss_fn` and `norm`."""
    options.setdefault("norm", cg.norms.Frobenius())
    problem = cg.GrowthProblem(model, options.pop("loss_fn", CROSS_ENTROPY), data, candidates)
    return cg.solve(problem, **options)


def choose(*names: str) -> Callable[[Any], cg.Decision]:
    """A rule that was made up beforehand."""
    return lambda sensitivities: cg.Decision(names)


def label(value: object) -> str:
    """The name of a test's argument, the same in every process (no addresses)."""
    return getattr(value, "__name__", None) or str(value)


class Gain(nn.Module):
    """A user's own block, without a closed form: x ⊙ (1 + g) + s tanh(x), pinned at g = s = 0."""

    pinned = ("gain", "scale")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.gain) + self.scale * x.tanh()


# --- independent numbers --------------------------------------------------------------------


def call(model: nn.Module, input: Any) -> Any:
    if isinstance(input, Mapping):
        return model(**input)
    return model(*input) if isinstance(input, tuple) else model(input)


def first_dimension(input: Any) -> int:
    while not isinstance(input, Tensor):
        input = next(iter(input.values() if isinstance(input, Mapping) else input))
    return input.shape[0]


def mean_loss(model: nn.Module, data: Iterable[Any], loss_fn: Loss = CROSS_ENTROPY) -> Tensor:
    """The mean over all samples, whatever the sizes of the batches."""
    sizes, losses = [], []
    for input, target in data:
        sizes.append(first_dimension(input))
        losses.append(loss_fn(call(model, input), target))
    return sum((n * loss for n, loss in zip(sizes, losses, strict=True)), torch.zeros(())) / sum(
        sizes
    )


def splice(model: nn.Module, after: str, block: nn.Module) -> nn.Module:
    """A copy of the model in which the block really stands after a submodule."""
    grown = copy.deepcopy(model)
    owner, _, key = after.rpartition(".")
    site = grown.get_submodule(after)
    setattr(grown.get_submodule(owner), key, nn.Sequential(site, copy.deepcopy(block)))
    return grown


def spliced_block(grown: nn.Module, after: str) -> nn.Module:
    return grown.get_submodule(f"{after}.1")


def autograd_multipliers(
    model: nn.Module, data: Iterable[Any], candidate: cg.Candidate, loss_fn: Loss = CROSS_ENTROPY
) -> dict[str, Tensor]:
    """λ = −∇_v L, from a model in which the candidate really stands."""
    grown = splice(model, candidate.after, candidate.block)
    block = spliced_block(grown, candidate.after)
    names = list(candidate.block.pinned)  # type: ignore[arg-type]
    pins = [block.get_parameter(name).requires_grad_() for name in names]
    grads = torch.autograd.grad(mean_loss(grown, data, loss_fn), pins)
    return {name: -grad for name, grad in zip(names, grads, strict=True)}


def moved_loss(
    model: nn.Module,
    data: Iterable[Any],
    candidate: cg.Candidate,
    step: Mapping[str, Tensor],
    loss_fn: Loss = CROSS_ENTROPY,
) -> float:
    """L(θ, v) with the pins moved to v = `step`."""
    grown = splice(model, candidate.after, candidate.block)
    block = spliced_block(grown, candidate.after)
    with torch.no_grad():
        for name, value in step.items():
            block.get_parameter(name).add_(value)
        return mean_loss(grown, data, loss_fn).item()


def squared_norm(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors)


def assert_multipliers(
    solution: cg.Solution, name: str, expected: Mapping[str, Tensor], atol: float = 1e-9
) -> None:
    found = solution.multipliers[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol)


# --- what a call leaves behind ----------------------------------------------------------------


def state_of(model: nn.Module, *generators: torch.Generator) -> dict[str, Any]:
    """All that a call might change, as values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {n: [len(getattr(m, hook)) for hook in hooks] for n, m in modules.items()},
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "tensor hooks": {n: len(t._backward_hooks or ()) for n, t in tensors.items()},
        "grads": {
            name: None if tensor.grad is None else tensor.grad.clone()
            for name, tensor in tensors.items()
        },
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in generators],
        "grad mode": torch.is_grad_enabled(),
    }


@contextmanager
def nothing_left_behind(model: nn.Module, *generators: torch.Generator) -> Iterator[None]:
    """Everything is the same to the last bit afterwards, also after an error."""
    before = state_of(model, *generators)
    try:
        yield
    finally:
        assert_same(state_of(model, *generators), before)


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    """Equal to the last bit, through dicts and sequences, NaN being equal to NaN."""
    assert type(found) is type(expected), where
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        both_nan = found != found and expected != expected
        assert both_nan or found == expected, where


@contextmanager
def refused(error: type[cg.GrowthError], *words: str) -> Iterator[None]:
    """A clear error: of the right class, with all the words in its message."""
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
