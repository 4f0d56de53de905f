"""What a pass over the data holds at its peak, counted at the allocator, against a plain pass."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, classified, feedforward
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import constrained_growth as cg

MIB = 2**20
SMALL_ROOM = 2.5 * MIB
"""For small tensors, beyond the bound: 2 MiB that wait, and the joined tensors of one site."""

GROUPS_ROOM = 16 * MIB
"""For the sums of λ over groups of samples, of which standard errors are made."""


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that is allocated at a time on the CPU, also inside operations."""
    work()  # whatever is made once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    assert held == 0, "something of the pass is still there"
    return peak


class Residual(nn.Module):
    """x + W₂ ReLU(W₁ x + b₁) + b₂."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


def identity_layers(width: int) -> tuple[nn.Module, list[cg.Candidate]]:
    model = feedforward(*[width] * 6, 10)
    sites = [str(2 * index + 1) for index in range(5)]
    return model, [cg.Candidate(s, cg.blocks.IdentityLinear(width, nn.ReLU())) for s in sites]


def residual_blocks(width: int) -> tuple[nn.Module, list[cg.Candidate]]:
    model = nn.Sequential(*[Residual(width) for _ in range(4)], nn.Linear(width, 10))
    blocks = [cg.blocks.ResidualMLP(width, width, nn.ReLU()) for _ in range(4)]
    return model, [cg.Candidate(str(index), block) for index, block in enumerate(blocks)]


def own_blocks(width: int) -> tuple[nn.Module, list[cg.Candidate]]:
    model = feedforward(*[width] * 6, 10)
    return model, [cg.Candidate(str(2 * index), Gain(width)) for index in range(5)]


@pytest.mark.parametrize(
    ("width", "batch", "stationarity"), [(64, 64, True), (256, 64, False), (256, 512, True)]
)
@pytest.mark.parametrize("network", [identity_layers, residual_blocks, own_blocks])
@pytest.mark.parametrize("norm", [cg.norms.Frobenius(), None], ids=["Frobenius", "recommended"])
def test_peak_is_a_plain_pass_and_the_multipliers(
    network: Callable[[int], tuple[nn.Module, list[cg.Candidate]]],
    width: int,
    batch: int,
    stationarity: bool,
    norm: Any,
) -> None:
    torch.set_default_dtype(torch.float32)
    model, candidates = network(width)
    data = classified(3 * batch, width, 10, batch)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)

    def plain() -> None:
        for input, target in data:
            model.zero_grad()
            CROSS_ENTROPY(model(input), target).backward()
        model.zero_grad()

    def multipliers() -> None:
        cg.solve(problem, norm=norm, stationarity=stationarity, progress=False)

    pinned = sum(4 * math.prod(pin.shape) for pin in problem.constraints)
    at_site = 4 * batch * width
    allowed = 1.1 * peak_bytes(plain) + pinned
    allowed += min(GROUPS_ROOM, 128 * pinned)  # 128 groups where there is room
    if norm is None:  # two second moments, and the copies of them that the norm factors
        allowed += 4 * pinned
    if stationarity:  # ∇L over all batches so far, which a pass that forgets them does not hold
        allowed += sum(parameter.nbytes for parameter in model.parameters())
    if 2 * len(candidates) * at_site <= MIB or batch < 512:
        allowed += SMALL_ROOM
    if network is own_blocks:  # without a closed form: the graph of one block, and a part of δ
        allowed += 9 * at_site
    assert peak_bytes(multipliers) <= allowed


class Token:
    """Something that can be referred to weakly, as the nodes of a graph cannot."""


class Watched(nn.Module):
    """Remembers, weakly, the tensors it has seen and the graph they belong to."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.notes = SimpleNamespace(most=0, seen=[], batches=[])  # nothing that a model keeps

    def forward(self, x: Tensor) -> Tensor:
        gc.collect()
        earlier = self.notes.seen + self.notes.batches[1:-2]  # the problem keeps the first input
        assert [ref() for ref in earlier] == [None] * len(earlier)
        self.notes.most = max(self.notes.most, len(x))
        y = x * 1.0
        self.notes.seen += [weakref.ref(x), weakref.ref(y)]
        if y.grad_fn is not None:
            token = Token()
            metadata: Any = y.grad_fn.metadata  # which lives as long as the graph
            metadata["token"] = token
            self.notes.seen.append(weakref.ref(token))
        return y


@pytest.mark.parametrize(
    ("width", "batch"),
    [(4, 128), (600, 128), (100, 1024)],  # joined, some of them, one by one
)
def test_nothing_of_an_earlier_batch_is_alive(width: int, batch: int) -> None:
    watched = Watched(batch)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), watched, nn.Linear(width, 3))

    class Data:
        def __iter__(self) -> Iterator[Any]:
            for _ in range(7):
                pair = [(torch.randn(batch, 2), torch.randint(3, (batch,)))]
                watched.notes.batches += [weakref.ref(tensor) for tensor in pair[0]]
                yield pair.pop()

    block = cg.blocks.ResidualLinear(width, torch.tanh)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, Data(), [cg.Candidate("1", block)])
    cg.solve(problem)
    assert len(watched.notes.batches) >= 7 * 2
    assert watched.notes.most == batch
