"""Reading no more data than the decision needs."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import constrained_growth as cg
from constrained_growth._multipliers.one_pass import MultiplierPass
from constrained_growth.norms import Entrywise1, KroneckerFisher
from constrained_growth.sampling import Reach
from constrained_growth.statistics import SquaredSizes


def learnable(num: int = 1200, batch: int = 4) -> list[Any]:
    """Two clouds in batches, in which a fresh network has clear multipliers."""
    y = torch.randint(2, (num,))
    x = torch.randn(num, 2) + 2.0 * y[:, None]
    return list(zip(x.split(batch), y.split(batch), strict=True))


def setting() -> tuple[nn.Module, list[Any], list[cg.Candidate]]:
    """A large identity layer against a small residual block."""
    model = feedforward(2, 4, 4, 2)
    small = cg.blocks.ResidualMLP(4, 2, torch.tanh, inner_init=0.1 * torch.randn(2, 4))
    return model, learnable(), [candidate("1"), candidate("3", block=small)]


def smallest(sensitivities: Any) -> cg.Decision:
    return cg.Decision((min(sensitivities, key=lambda name: sensitivities[name].value),))


@pytest.mark.parametrize(
    "rule",
    [
        cg.TopK(1),
        cg.TopK(1, cost=lambda s: 1 / s.num_parameters),
        cg.TopK(2),
        cg.Threshold(absolute=100.0),
        cg.Threshold(absolute=1e-6),
        cg.Threshold(relative=30.0),
        smallest,
    ],
    ids=["top 1", "per cost", "top 2", "nothing", "all", "relative", "smallest"],
)
def test_a_clear_decision_is_settled_by_a_part_of_the_data(rule: Any) -> None:
    """Also to insert nothing, and everything."""
    model, data, candidates = setting()
    whole = solved(model, data, *candidates, rule=rule)
    part = solved(model, data, *candidates, rule=rule, sampling=cg.AdaptiveSampling())
    assert part.decision.chosen == whole.decision.chosen
    assert part.data_fraction is not None
    assert part.data_fraction == part.num_batches / len(data) < 0.9
    assert part.num_samples == 4 * part.num_batches
    for name, sensitivity in part.sensitivities.items():
        assert sensitivity.interval is not None
        low, high = sensitivity.interval
        assert low <= whole.sensitivities[name].value <= high


def test_a_norm_of_another_kind() -> None:
    model, data, candidates = setting()
    options: dict[str, Any] = {"norm": Entrywise1(), "stationarity": False}
    whole = solved(model, data, *candidates, **options)
    part = solved(model, data, *candidates, **options, sampling=cg.AdaptiveSampling())
    assert part.decision == whole.decision
    assert part.data_fraction != 1.0


def on_the_edge(model: nn.Module, data: list[Any]) -> cg.Threshold:
    """Just below the sensitivity on all data."""
    return cg.Threshold(
        absolute=(1 - 1e-9) * solved(model, data, candidate()).sensitivities["1"].value
    )


def test_a_tie_takes_all_data_and_gives_what_a_plain_solve_gives() -> None:
    model, data = feedforward(2, 4, 3), classified(202, batch=4)
    rule = on_the_edge(model, data)
    whole = solved(model, data, candidate(), rule=rule)
    found = solved(model, data, candidate(), rule=rule, sampling=cg.AdaptiveSampling())
    assert found.data_fraction == whole.data_fraction == 1.0
    assert (found.num_samples, found.num_batches) == (202, 51)
    assert found.decision == whole.decision
    for name, sensitivity in found.sensitivities.items():
        assert sensitivity.interval is None
        assert sensitivity.value == pytest.approx(whole.sensitivities[name].value, rel=1e-12)
        assert sensitivity.variance == pytest.approx(whole.sensitivities[name].variance, rel=1e-12)
    assert found.stationarity == pytest.approx(whole.stationarity, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_few_batches_are_all_read(count: int) -> None:
    model, data = feedforward(2, 4, 3), classified(3 * count, batch=3)
    assert solved(model, data, candidate(), sampling=cg.AdaptiveSampling()).data_fraction == 1.0


def test_same_seed_same_part_and_another_seed_another() -> None:
    model, data, candidates = setting()
    first, again, other = (
        solved(model, data, *candidates, sampling=cg.AdaptiveSampling(seed=seed))
        for seed in (3, 3, 4)
    )
    weight = first.multipliers["1"]["weight"]
    assert torch.equal(again.multipliers["1"]["weight"], weight)
    assert not torch.equal(other.multipliers["1"]["weight"], weight)


def test_batches_that_are_alike_inside() -> None:
    """Sorted data: samples of a batch depend on each other, which only batches show."""
    torch.manual_seed(3)
    model = feedforward(2, 4, 4, 3)
    x = torch.linspace(-3, 3, 900)[:, None] * torch.tensor([[1.0, -0.5]])
    y = (x[:, 0] * 1.5).round().long() % 3
    data = list(zip(x.split(9), y.split(9), strict=True))
    candidates = [candidate("1"), candidate("3")]
    whole = solved(model, data, *candidates)
    found = [
        solved(model, data, *candidates, sampling=cg.AdaptiveSampling(seed=seed))
        for seed in range(20)
    ]
    assert sum(f.decision == whole.decision for f in found) >= 19
    shortest = min(f.data_fraction or 0.0 for f in found)
    assert shortest < 1.0


def test_a_layer_that_is_dead_does_not_hold_up_the_others() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = feedforward(2, 4, 2), feedforward(2, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.live(x) + 0 * self.dead(x)

    candidates = [candidate("live.1"), candidate("dead.1")]
    found = solved(Dead(), learnable(), *candidates, sampling=cg.AdaptiveSampling())
    assert found.decision.chosen == ("live.1",)
    assert found.sensitivities["dead.1"].interval == (0.0, 0.0)
    assert found.data_fraction != 1.0


def test_a_block_without_closed_form() -> None:
    model, data, candidates = setting()
    both = [candidates[1], candidate("1", block=Gain(4))]
    rule = cg.Threshold(absolute=10.0)
    found = solved(model, data, *both, rule=rule, sampling=cg.AdaptiveSampling())
    assert found.decision.chosen == ()
    assert found.data_fraction != 1.0


def test_what_is_not_finite_stays_so() -> None:
    model, data, candidates = setting()
    data = [(x * math.nan, y) if i % 2 else (x, y) for i, (x, y) in enumerate(data)]
    sampling = cg.AdaptiveSampling()
    found = solved(model, data, *candidates, sampling=sampling, throw=False)
    assert found.status is cg.Status.NOT_FINITE
    with refused(cg.DataError, "NaN or Inf"):
        solved(model, data, *candidates, sampling=sampling)


def test_nothing_is_left_behind() -> None:
    model, data, candidates = setting()
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator)
    with nothing_left_behind(model, generator):
        solution = solved(model, loader, *candidates, sampling=cg.AdaptiveSampling())
    assert solution.data_fraction == solution.num_batches / 300 < 1


@pytest.mark.parametrize(
    "options",
    [
        lambda samples: {},
        lambda samples: {"sampler": DistributedSampler(samples, 1, 0, shuffle=False)},
        lambda samples: {
            "sampler": BatchSampler(SequentialSampler(samples), 4, False),
            "batch_size": None,
        },
    ],
    ids=["in order", "distributed", "nested"],
)
def test_a_data_loader_that_does_not_shuffle_is_refused(options: Any) -> None:
    model, data, candidates = setting()
    samples = TensorDataset(torch.cat([x for x, _ in data]), torch.zeros(1200).long())
    loader = DataLoader(samples, **options(samples))
    with refused(cg.DataError, "fixed order", "shuffle=True"):
        solved(model, loader, *candidates, sampling=cg.AdaptiveSampling())


@pytest.mark.parametrize("nested", [False, True])
def test_a_data_loader_whose_innermost_sampler_shuffles_is_read(nested: bool) -> None:
    model, data, candidates = setting()
    samples = TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
    batches = BatchSampler(RandomSampler(samples), 4, False)
    options: Any = (
        {"sampler": batches, "batch_size": None} if nested else {"batch_sampler": batches}
    )
    loader = DataLoader(samples, **options)
    found = solved(model, loader, *candidates, sampling=cg.AdaptiveSampling())
    assert found.data_fraction == found.num_batches / 300 < 1


def test_data_of_unknown_length() -> None:
    model, data, candidates = setting()

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            yield from data

    found = solved(model, Stream(), *candidates, sampling=cg.AdaptiveSampling())
    assert found.data_fraction is None
    assert 0 < found.num_batches < len(data)
    rule = on_the_edge(model, data)
    tied = solved(model, Stream(), candidate(), rule=rule, sampling=cg.AdaptiveSampling())
    assert (tied.data_fraction, tied.num_batches) == (1.0, len(data))


def test_a_data_loader_over_a_stream() -> None:
    model, data, candidates = setting()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from data

    loader = DataLoader(Stream(), batch_size=None)
    found = solved(model, loader, *candidates, sampling=cg.AdaptiveSampling())
    assert found.data_fraction is None
    assert found.decision.chosen == solved(model, data, *candidates).decision.chosen


def test_sampling_asks_for_what_it_can_use() -> None:
    model, data = feedforward(2, 4, 3), classified(200, batch=4)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    sampling = cg.AdaptiveSampling()
    with refused(cg.RuleError, "KroneckerFisher", "changes with the sample", "without sampling"):
        cg.solve(problem, norm=KroneckerFisher(), sampling=sampling)
    with refused(cg.RuleError, "autograd cannot differentiate"):
        cg.solve(problem, norm=lambda m: float(m["weight"].detach().norm()), sampling=sampling)
    with refused(cg.DataError, "sampling=0.1", "cg.AdaptiveSampling"):
        cg.solve(problem, sampling=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_confidence_out_of_range(confidence: float) -> None:
    with refused(cg.RuleError, f"confidence={confidence}", "between 0 and 1"):
        cg.AdaptiveSampling(confidence=confidence)


@pytest.mark.parametrize("growth", [1.0, math.inf, math.nan])
def test_growth_out_of_range(growth: float) -> None:
    with refused(cg.RuleError, f"growth={growth}", "above 1"):
        cg.AdaptiveSampling(growth=growth)


@pytest.mark.parametrize("total", [500, None])
def test_no_more_is_spent_than_there_is(total: int | None) -> None:
    sampling = cg.AdaptiveSampling(confidence=0.9)
    looks = itertools.takewhile(lambda n: n < 500, sampling.looks())
    spent = [sampling.spent(k, total and n / total) for k, n in enumerate(looks, start=1)]
    assert all(before < after for before, after in itertools.pairwise([0.0, *spent]))
    assert spent[-1] < 0.1


def test_scenarios_are_the_comparisons_that_could_go_wrong() -> None:
    sizes = SquaredSizes([4.0, 1.0, 0.25, 1.0], 1e-4 * torch.eye(4).numpy(), 20)  # type: ignore[arg-type]
    found = {
        name: cg.Sensitivity(v, baseline=1.0) for name, v in zip("abc", (2, 1, 0.5), strict=True)
    }
    with_bar = list(Reach(sizes, ("a", "b", "c"), True, 0.05, None).scenarios(found, ["a"]))
    assert len(with_bar) == 16 * (2 + 3)
    assert min(s["b"].value for s in with_bar) < 1 < max(s["b"].value for s in with_bar)
    assert min(s["a"].baseline or 0 for s in with_bar) < 1
    alone = list(Reach(sizes, ("a", "b", "c"), False, 0.05, None).scenarios(found, []))
    assert len(alone) == 2 * 3
    assert {s["a"].baseline for s in alone} == {1.0}


def test_a_measurement_may_be_taken_on_the_way() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(40, batch=8)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1"), candidate("3")])

    def read(stops: bool) -> Any:
        running = MultiplierPass(model, CROSS_ENTROPY, problem.sites, gradients=True, moments=True)
        with running.watching():
            for input, target in data:
                running.add(input, target)
                if stops:
                    running.totals()
                    running.measurement()
        return running.measurement()

    one, other = read(False), read(True)
    assert one.loss == other.loss
    for name, estimate in one.estimates.items():
        torch.testing.assert_close(other.estimates[name].multiplier, estimate.multiplier)
        assert other.estimates[name].variance == pytest.approx(estimate.variance)
    torch.testing.assert_close(one.gradients, other.gradients)
