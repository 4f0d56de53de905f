"""Several processes with a shard each against one process with all the data.

Starting processes takes seconds, so one start serves all cases: a case is a function of a
`Rank`, and runs on three processes, and on two of them as a group of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CROSS_ENTROPY, Gain, candidate, classified, feedforward, nothing_left_behind
from processes import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import constrained_growth as cg
from constrained_growth._distributed import add_up, everywhere

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

PROCESSES = 3
FROBENIUS = cg.norms.Frobenius()
SHARES = {2: (4, 2), 3: (1, 2, 3)}
EMPTY = {2: (0, 6), 3: (4, 0, 2)}


@dataclass(frozen=True)
class Rank:
    """One process among those of a group."""

    number: int
    size: int
    group: Any
    alone: Any

    def shard(self, data: list[Any], shares: tuple[int, ...]) -> list[Any]:
        """This process's part of the batches."""
        begin = sum(shares[: self.number])
        return data[begin : begin + shares[self.number]]


class Branch(nn.Module):
    """x + op(x), with zero in the place of the pinned parameters of op."""

    def __init__(self, op: nn.Module, *pinned: str) -> None:
        super().__init__()
        self.op = op
        self.pinned = tuple(f"op.{name}" for name in pinned)
        for name in pinned:
            nn.init.zeros_(op.get_parameter(name))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(x)


def several_blocks() -> list[cg.Candidate]:
    """Closed forms that are worked off together, one with a hidden layer, one without any."""
    residual = cg.blocks.ResidualMLP(4, 5, nn.Tanh())
    return [
        candidate("1"),
        candidate("3"),
        candidate("3", block=residual, name="residual"),
        candidate("2", block=Gain(4)),
    ]


def setting() -> tuple[nn.Sequential, list[Any], list[cg.Candidate]]:
    """The same on every process: six batches, of which the last one is smaller."""
    torch.manual_seed(1)
    return feedforward(2, 4, 4, 3), classified(38, batch=7), several_blocks()


def compared(
    rank: Rank, model: nn.Module, shard: list[Any], data: list[Any], **options: Any
) -> Any:
    """The solution by all processes and the one by this process from all the data."""
    candidates = options.pop("candidates")
    options.setdefault("norm", FROBENIUS)
    together = cg.GrowthProblem(model, CROSS_ENTROPY, shard, candidates, group=rank.group)
    single = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates, group=rank.alone)
    with nothing_left_behind(model):
        found = cg.solve(together, **options)
    return found, cg.solve(single, **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def assert_same_answer(found: cg.Solution, expected: cg.Solution) -> None:
    for name, multiplier in expected.multipliers.items():
        for key, value in multiplier.items():
            assert_close(found.multipliers[name][key], value)
        one, other = found.sensitivities[name], expected.sensitivities[name]
        assert one.value == pytest.approx(other.value, rel=1e-11)
        assert one.variance**0.5 == pytest.approx(other.variance**0.5, rel=1e-9)
        assert one.baseline == pytest.approx(other.baseline, rel=1e-11)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.stationarity == pytest.approx(expected.stationarity, rel=1e-11)
    assert (found.num_samples, found.num_batches) == (expected.num_samples, expected.num_batches)
    assert (found.decision, found.status) == (expected.decision, expected.status)


# --- the cases --------------------------------------------------------------------------------


def unequal_shards(rank: Rank) -> None:
    model, data, candidates = setting()
    shard = rank.shard(data, SHARES[rank.size])
    assert_same_answer(*compared(rank, model, shard, data, candidates=candidates))


def process_without_data(rank: Rank) -> None:
    model, data, candidates = setting()
    shard = rank.shard(data, EMPTY[rank.size])
    assert_same_answer(*compared(rank, model, shard, data, candidates=candidates))


def second_moments(rank: Rank) -> None:
    model, data, _ = setting()
    shard, candidates = rank.shard(data, EMPTY[rank.size]), [candidate("1"), candidate("3")]
    options = {"norm": cg.norms.KroneckerFisher(), "stationarity": False}
    found, expected = compared(rank, model, shard, data, candidates=candidates, **options)
    for name, sensitivity in expected.sensitivities.items():
        assert found.sensitivities[name].value == pytest.approx(sensitivity.value, rel=1e-10)


def recommended_decision(rank: Rank) -> None:
    """Of copied layers and pins in no affine map too; the same on all processes."""
    model, data, candidates = setting()
    branch = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    candidates += [candidate("3", block=Branch(branch, "1.weight", "1.bias"), name="branch")]
    for shares in (SHARES, EMPTY):
        shard = rank.shard(data, shares[rank.size])
        found, expected = compared(rank, model, shard, data, candidates=candidates, norm=None)
        for name, sensitivity in expected.sensitivities.items():
            one = found.sensitivities[name]
            if name != "2":  # without an affine map each process has groups of its own
                assert one.value == pytest.approx(sensitivity.value, rel=1e-10)
            assert one.value > 0
            assert one.standard_error > 0
        mine = (
            found.decision.chosen,
            [(s.value, s.replicates) for s in found.sensitivities.values()],
            found.agreement,
        )
        others = everywhere(lambda mine=mine: mine, rank.group)
        assert all(other == mine for other in others)


def held_out_data(rank: Rank) -> None:
    """The slope is that of all held-out data; a process may have none of them."""
    model, data, candidates = setting()
    for shares in (SHARES, EMPTY):
        answers = []
        for group, some in ((rank.group, rank.shard(data, shares[rank.size])), (rank.alone, data)):
            problem = cg.GrowthProblem(model, CROSS_ENTROPY, some, candidates, group=group)
            answers.append(cg.solve(problem, validation=some))
        found, expected = answers
        for name, sensitivity in expected.sensitivities.items():
            one, other = found.sensitivities[name].held_out, sensitivity.held_out
            assert one is not None
            assert other is not None
            assert one.slope == pytest.approx(other.slope, rel=1e-10)
            # of other groups of the same samples
            assert one.standard_error == pytest.approx(other.standard_error, rel=0.5)
            assert 0 <= one.pvalue < 0.5
        assert found.decision.chosen in ((), expected.decision.chosen)
        said = [(s.held_out, found.decision.chosen) for s in found.sensitivities.values()]
        everyone = everywhere(lambda said=said: said, rank.group)
        assert all(other == said for other in everyone)


def weighted_batches(rank: Rank) -> None:
    """The weights are added up too; a process may have batches that count for nothing only."""
    model, data, candidates = setting()
    shard = rank.shard(data, SHARES[rank.size])
    options: dict[str, Any] = {"weight": lambda x, y: (y != 0).sum() if len(x) > 4 else 0}
    together = cg.GrowthProblem(
        model, CROSS_ENTROPY, shard, candidates, group=rank.group, **options
    )
    single = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates, group=rank.alone, **options)
    assert_same_answer(cg.solve(together, norm=FROBENIUS), cg.solve(single, norm=FROBENIUS))


def module_that_is_used_several_times(rank: Rank) -> None:
    model, data, _ = setting()
    model[3] = model[1]
    shard, candidates = (
        rank.shard(data, EMPTY[rank.size]),
        [candidate("1"), candidate("2", block=Gain(4))],
    )
    assert_same_answer(*compared(rank, model, shard, data, candidates=candidates))


def batch_norms_that_wait(rank: Rank) -> None:
    model, data, _ = setting()
    norm = nn.SyncBatchNorm(4)
    norm.running_mean = torch.full((4,), 0.1)  # it has seen data
    model[4] = nn.Sequential(norm, model[4])
    with pytest.raises(cg.CandidateError, match=r'"4\.0" is a SyncBatchNorm in train mode'):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1")], group=rank.group)
    cg.GrowthProblem(model.eval(), CROSS_ENTROPY, data, [candidate("1")], group=rank.group)


def blocks_drawn_differently(rank: Rank) -> None:
    """As every process may have a seed of its own, the first one's blocks count."""
    model, data, _ = setting()
    torch.manual_seed(100 + rank.number)
    drawn = candidate("3", block=cg.blocks.ResidualMLP(4, 5, nn.Tanh()))
    before = drawn.block.get_parameter("inner.weight").clone()
    shard = rank.shard(data, EMPTY[rank.size])
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, shard, [drawn], group=rank.group)
    assert torch.equal(drawn.block.get_parameter("inner.weight"), before)
    found = cg.solve(problem, norm=FROBENIUS)
    torch.manual_seed(100)
    first = candidate("3", block=cg.blocks.ResidualMLP(4, 5, nn.Tanh()))
    single = cg.GrowthProblem(model, CROSS_ENTROPY, data, [first], group=rank.alone)
    assert_same_answer(found, cg.solve(single, norm=FROBENIUS))
    for one, other in zip(
        found.candidates["3"].block.parameters(), first.block.parameters(), strict=True
    ):
        assert torch.equal(one, other)


class Overwriting(nn.Module):
    """Changes the tensor at the site in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)).mul_(2.0))


def site_that_is_overwritten(rank: Rank) -> None:
    """A process without data hears from the others what the site is like."""
    _, data, _ = setting()
    model, shard = Overwriting(), rank.shard(data, EMPTY[rank.size])
    model.load_state_dict({k: torch.full_like(v, 0.3) for k, v in model.state_dict().items()})
    block = cg.blocks.ResidualLinear(4, torch.tanh)
    found, expected = compared(rank, model, shard, data, candidates=[cg.Candidate("act", block)])
    assert_same_answer(found, expected)
    assert found.candidates["act"].overwritten


def wrapped_model(rank: Rank) -> None:
    """DistributedDataParallel: its reducer neither waits nor is upset, and training goes on."""
    model, data, _ = setting()
    model[0] = nn.Sequential(model[0], nn.BatchNorm1d(4))  # buffers, which the wrapper sends round
    one = candidate("module.1")
    plain = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1")], group=rank.alone)
    expected = cg.solve(plain)
    ddp = DistributedDataParallel(model, process_group=rank.group)
    shard = rank.shard(data, EMPTY[rank.size])
    problem = cg.GrowthProblem(ddp, CROSS_ENTROPY, shard, [one], group=rank.group)
    with nothing_left_behind(ddp):
        found = cg.solve(problem)
    for key, value in expected.multipliers["1"].items():
        assert_close(found.multipliers["module.1"][key], value)
    assert found.stationarity == pytest.approx(expected.stationarity, rel=1e-11)
    step(rank, ddp, data)
    with pytest.warns(UserWarning, match="cg.rewrap"):
        cg.insert(ddp, found)
    cg.rewrap(ddp)
    step(rank, ddp, data)


def step(rank: Rank, ddp: nn.Module, data: list[Any]) -> None:
    """A training step, after which the gradients are the same everywhere."""
    ddp.zero_grad()
    input, target = data[rank.number]
    CROSS_ENTROPY(ddp(input), target).backward()
    grads = [p.grad.clone() for p in ddp.parameters() if p.grad is not None]
    assert len(grads) == len(list(ddp.parameters()))
    sums = [grad.clone() for grad in grads]
    add_up(sums, rank.group)
    for grad, total in zip(grads, sums, strict=True):
        torch.testing.assert_close(grad * rank.size, total)


def candidates_found_in_a_wrapped_model(rank: Rank) -> None:
    model, data, _ = setting()
    ddp = DistributedDataParallel(model, process_group=rank.group)
    found = [c.after for c in cg.find_candidates(ddp, data[0][0])]
    assert found == [f"module.{c.after}" for c in cg.find_candidates(model, data[0][0])]


def failure_on_one_process(rank: Rank) -> None:
    """The others do not wait for it."""
    model, data, candidates = setting()
    shard = rank.shard(data, (2,) * rank.size)
    if rank.number == 1:
        shard = [shard[0], (torch.zeros(0, 2), torch.zeros(0).long())]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, shard, candidates, group=rank.group)
    with nothing_left_behind(model), refused_by(rank, cg.DataError, "no samples"):
        cg.solve(problem)


def failure_of_the_users_own(rank: Rank) -> None:
    model, data, candidates = setting()
    shard = rank.shard(data, (2,) * rank.size)

    class Shard(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            if broken and rank.number == 1:
                raise OSError("disk full")

    broken = False
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, Shard(shard), candidates, group=rank.group)
    broken = True
    error = OSError if rank.number == 1 else cg.GrowthError
    with refused_by(rank, error, "disk full"):
        cg.solve(problem)


def failure_at_the_first_batch(rank: Rank) -> None:
    model, data, candidates = setting()
    shard: Any = rank.shard(data, (2,) * rank.size)
    if rank.number == 1:
        shard[0][0].fill_(torch.nan)
    with refused_by(rank, cg.DataError, "NaN"):
        cg.GrowthProblem(model, CROSS_ENTROPY, shard, candidates, group=rank.group)
    with refused_by(rank, cg.DataError, "one-shot"):
        shard = iter(data) if rank.number == 1 else data
        cg.GrowthProblem(model, CROSS_ENTROPY, shard, candidates, group=rank.group)


def no_data_at_all(rank: Rank) -> None:
    model, _, candidates = setting()
    with pytest.raises(cg.DataError, match="no batches"):
        cg.GrowthProblem(model, CROSS_ENTROPY, [], candidates, group=rank.group)


def models_that_differ(rank: Rank) -> None:
    model, data, candidates = setting()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.0 + 0.1 * rank.number)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates, group=rank.group)
    with pytest.raises(cg.DataError, match="same state dict"):
        cg.solve(problem)


def candidates_that_differ(rank: Rank) -> None:
    model, data, candidates = setting()
    mine = candidates[: 1 + rank.number]
    with pytest.raises(cg.CandidateError, match="same candidates"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, mine, group=rank.group)


def sums_of_tensors(rank: Rank) -> None:
    """Large and small ones, of several dtypes, also views of others."""
    whole = torch.zeros(4, 3)
    tensors = [
        torch.ones(()),
        torch.ones(600, 600),
        torch.ones(5, dtype=torch.float32),
        whole[:, 1],
        torch.ones(300, 300).T,
        torch.ones(2, 0),
    ]
    for tensor in tensors:
        tensor.fill_(1.0 + rank.number)
    add_up(tensors, rank.group)
    expected = sum(1.0 + number for number in range(rank.size))
    assert all(bool((tensor == expected).all()) for tensor in tensors)
    assert whole.sum() == 4 * expected
    assert everywhere(lambda: rank.number, rank.group) == list(range(rank.size))


CASES: list[Callable[[Rank], None]] = [
    unequal_shards,
    process_without_data,
    second_moments,
    recommended_decision,
    held_out_data,
    weighted_batches,
    module_that_is_used_several_times,
    batch_norms_that_wait,
    blocks_drawn_differently,
    site_that_is_overwritten,
    wrapped_model,
    candidates_found_in_a_wrapped_model,
    failure_on_one_process,
    failure_of_the_users_own,
    failure_at_the_first_batch,
    no_data_at_all,
    models_that_differ,
    candidates_that_differ,
    sums_of_tensors,
]


@contextmanager
def refused_by(rank: Rank, error: type[Exception], word: str) -> Iterator[None]:
    """An error on all processes, which says on the others where it comes from."""
    with pytest.raises(error, match=word) as caught:
        yield
    assert ("process 1 of the group" in str(caught.value)) == (rank.number != 1)


# --- the processes ----------------------------------------------------------------------------


def run_cases(number: int) -> None:
    alone = [dist.new_group([each]) for each in range(PROCESSES)][number]
    last_two = dist.new_group([1, 2])
    for case in CASES:
        case(Rank(number, PROCESSES, None, alone))
    if number > 0:  # a group of some processes, with numbers of its own
        for case in (
            unequal_shards,
            recommended_decision,
            weighted_batches,
            failure_on_one_process,
        ):
            case(Rank(number - 1, 2, last_two, alone))


def test_processes_agree(tmp_path: Path) -> None:
    together(run_cases, tmp_path, processes=PROCESSES)


def test_one_process_needs_no_group() -> None:
    tensor = torch.ones(3)
    add_up([tensor], None)
    assert torch.equal(tensor, torch.ones(3))
    assert everywhere(lambda: 5, None) == [5]
