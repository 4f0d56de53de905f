"""The answer as a whole: stationarity, status, shadow prices; and that nothing is left behind."""

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    autograd_multipliers,
    candidate,
    classified,
    feedforward,
    label,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
    squared_norm,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP

# --- stationarity and status ------------------------------------------------------------------


def trained(model: nn.Module, data: list[Any]) -> nn.Module:
    """To a stationary point, by LBFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean_loss(model, data)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("2.weight", "2.bias")], ids=label)
def test_stationarity_is_the_norm_of_the_gradient(frozen: tuple[str, ...]) -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=8)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    free = [p for p in model.parameters() if p.requires_grad]
    expected = math.sqrt(squared_norm(torch.autograd.grad(mean_loss(model, data), free)))
    solution = solved(model, data, candidate())
    assert solution.stationarity == pytest.approx(expected, rel=1e-12)
    assert solution.loss == pytest.approx(mean_loss(model, data).item(), rel=1e-14)
    assert solution.status is cg.Status.LEAST_SQUARES_ESTIMATES


def test_unused_parameters_do_not_matter() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    expected = solved(model, data, candidate()).stationarity
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    assert solved(model, data, candidate()).stationarity == expected


def test_status_at_a_stationary_point() -> None:
    """Whatever the unit of the loss."""
    data = classified(60, classes=2, batch=25)
    untrained = feedforward(2, 3, 2, activation=nn.Tanh)
    model = trained(copy.deepcopy(untrained), data)
    one = cg.Candidate("1", ResidualLinear(3, torch.tanh))
    solution = solved(model, data, one)
    assert solution.stationarity is not None
    assert 0 < solution.stationarity < 1e-6
    assert solution.status is cg.Status.KKT_MULTIPLIERS
    theta = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    relative = solution.stationarity * max(1.0, theta) / solution.loss
    strict = solved(model, data, one, gtol=relative * 0.99)
    assert strict.status is cg.Status.LEAST_SQUARES_ESTIMATES
    loose = solved(model, data, one, gtol=relative * 1.01)
    assert loose.status is cg.Status.KKT_MULTIPLIERS
    for scale in (1e-30, 1e-6, 1e6):

        def loss_fn(output: Tensor, target: Tensor, scale: float = scale) -> Tensor:
            return scale * CROSS_ENTROPY(output, target)

        found = [solved(m, data, one, loss_fn=loss_fn).status for m in (untrained, model)]
        assert found == [cg.Status.LEAST_SQUARES_ESTIMATES, cg.Status.KKT_MULTIPLIERS]


def test_pins_at_a_kink_are_said_to_be_there() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=20)
    blocks = [IdentityLinear(4, nn.ReLU()), ResidualLinear(4, torch.tanh)]
    candidates = [cg.Candidate("1", b, name=type(b).__name__) for b in blocks]
    solution = cg.solve(cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates))
    inactive = float((model[:2](data[0][0]) == 0).double().mean())
    assert 0 < inactive < 1
    assert [s.kink for s in solution.sensitivities.values()] == [inactive, 0.0]
    kinked, smooth = map(repr, solution.sensitivities.values())
    assert f"{inactive:.0%} of the units at a kink" in kinked
    assert "kink" not in smooth


def test_status_without_stationarity() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=8)
    full, quick = (solved(model, data, candidate(), stationarity=s) for s in (True, False))
    assert quick.status is cg.Status.STATIONARITY_UNKNOWN
    assert quick.stationarity is None
    assert quick.sensitivities["1"].baseline is None
    assert quick.loss == full.loss
    for name, value in full.multipliers["1"].items():
        assert torch.equal(quick.multipliers["1"][name], value)


def test_sensitivity_counts_parameters() -> None:
    one = cg.Candidate("1", ResidualMLP(4, 7, torch.tanh, "inner"))
    sensitivity = solved(feedforward(2, 4, 3), classified(20), one).sensitivities["1"]
    assert sensitivity.num_parameters == 7 * 4 + 7
    assert sensitivity.num_new_parameters == 7 * 4 + 7 + 4 * 7
    assert sensitivity.site == "1"
    assert sensitivity.norm == cg.norms.Frobenius()


# --- shadow prices ------------------------------------------------------------------------------


class LeastSquares:
    """A fixed tanh layer and a linear tail, whose best parameters are known in closed form."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(40, 2), torch.randn(40, 1)
        self.model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
        self.model[0].requires_grad_(False)
        self.data = list(zip(self.x.split(15), self.y.split(15), strict=True))
        solution, _ = self.best(nn.Identity())
        with torch.no_grad():
            self.model.get_parameter("2.weight").copy_(solution[:-1].T)
            self.model.get_parameter("2.bias").copy_(solution[-1])

    def best(self, block: Any) -> tuple[Tensor, float]:
        """The tail that fits best with a block before the tanh, and its mean squared error."""
        with torch.no_grad():
            features = torch.tanh(block(self.model[:1](self.x)))
        design = torch.cat([features, torch.ones(len(features), 1)], 1)
        tail = torch.linalg.lstsq(design, self.y).solution
        return tail, (design @ tail - self.y).square().mean().item()


@pytest.mark.parametrize(
    "block",
    [
        lambda: ResidualLinear(5, torch.tanh),
        lambda: ResidualMLP(5, 3, nn.GELU()),
        lambda: ResidualMLP(5, 3, torch.tanh, "inner"),
        lambda: Gain(5),
    ],
    ids=["one weight", "outer", "inner", "a user's own"],
)
def test_multipliers_are_the_slope_of_the_value_function(block: Any) -> None:
    """∇p(0) = −λ, where p(ε) is the best loss with the pin at ε, θ solved for anew each time."""
    case, one = LeastSquares(), cg.Candidate("0", block())
    solution = solved(case.model, case.data, one, loss_fn=nn.functional.mse_loss)
    assert solution.status is cg.Status.KKT_MULTIPLIERS
    assert solution.loss == pytest.approx(case.best(nn.Identity())[1], rel=1e-12)
    multiplier = solution.multipliers["0"]
    step = {name: torch.randn_like(value) for name, value in multiplier.items()}

    def value_function(size: float) -> float:
        return case.best(block_at(one.block, step, size))[1]

    h = 1e-5
    slope = (value_function(h) - value_function(-h)) / (2 * h)
    predicted = -sum((multiplier[name] * step[name]).sum().item() for name in step)
    assert slope == pytest.approx(predicted, abs=1e-8)
    assert abs(predicted) > 1e-3


def test_linear_insertions_before_a_stationary_linear_layer_are_worth_nothing() -> None:
    """To first order the block adds a linear map, which the tail could have had already."""
    case = LeastSquares()
    blocks = {
        "one weight": ResidualLinear(5, torch.tanh),
        "inner": ResidualMLP(5, 3, torch.tanh, "inner"),
        "outer": ResidualMLP(5, 3, torch.tanh),
    }
    candidates = [cg.Candidate("1", block, name=name) for name, block in blocks.items()]
    solution = solved(case.model, case.data, *candidates, loss_fn=nn.functional.mse_loss)
    assert solution.sensitivities["one weight"].value < 1e-12
    assert solution.sensitivities["inner"].value < 1e-12
    assert solution.sensitivities["outer"].value > 1e-3


def block_at(block: nn.Module, step: dict[str, Tensor], size: float) -> Any:
    moved = {
        name: parameter.detach() + size * step[name] if name in step else parameter.detach()
        for name, parameter in block.named_parameters()
    }
    return lambda x: torch.func.functional_call(block, moved, (x,))


# --- nothing is left behind ---------------------------------------------------------------------


class Training(nn.Module):
    """A model in the middle of training, with all that a pass over the data may change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(2, 4), nn.BatchNorm1d(4)
        self.act, self.drop, self.last = nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.last.eval()
        self.first.weight.grad = torch.randn(4, 2)
        self.first.bias.requires_grad_(False)
        self.act.register_forward_hook(lambda *_: None)
        self.last.weight.register_hook(lambda grad: 1e6 * grad)

    def forward(self, x: Tensor) -> Tensor:
        self.last.train()
        self.first.weight.grad = None
        self.seen += 1  # type: ignore[operator]
        self.replaced = torch.full((3,), x.mean().item())
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.last(self.drop(self.act(self.norm(self.first(x)))))


class Augmented(Dataset[Any]):
    """Draws from every random source for every sample."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(20, 2), torch.randint(3, (20,))

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2) + np.random.rand() + random.random()  # noqa: NPY002
        return self.x[index] + noise, self.y[index]


CANDIDATES = [
    cg.Candidate("act", IdentityLinear(4, nn.ReLU())),
    cg.Candidate("first", ResidualMLP(4, 4, torch.tanh)),
    cg.Candidate("norm", Gain(4)),
]


@pytest.mark.parametrize("stationarity", [True, False])
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_nothing_is_left_behind(outer: Any, stationarity: bool) -> None:
    model, data = Training(), classified(20, batch=6)
    with nothing_left_behind(model), outer():
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, CANDIDATES)
    with nothing_left_behind(model), outer():
        cg.solve(problem, stationarity=stationarity)


def loaders() -> dict[str, tuple[DataLoader[Any], list[torch.Generator]]]:
    own, sampler_own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    dataset = Augmented()
    sampler = torch.utils.data.RandomSampler(dataset, generator=sampler_own)
    return {
        "in order": (DataLoader(dataset, 6), []),
        "shuffled": (DataLoader(dataset, 6, shuffle=True), []),
        "own generator": (DataLoader(dataset, 6, shuffle=True, generator=own), [own]),
        "own sampler": (DataLoader(dataset, 6, sampler=sampler), [sampler_own]),
    }


@pytest.mark.parametrize("name", loaders())
def test_random_state_of_a_data_loader_is_put_back(name: str) -> None:
    model, (loader, generators) = Training(), loaders()[name]
    with nothing_left_behind(model, *generators):
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, loader, CANDIDATES)
    with nothing_left_behind(model, *generators):
        first = cg.solve(problem)
    second = cg.solve(problem)  # the same draws again
    for one in CANDIDATES:
        for key, value in first.multipliers[one.name].items():
            assert torch.equal(second.multipliers[one.name][key], value)


class Fails(Exception):
    pass


@pytest.mark.parametrize("where", ["loss", "data", "model", "rule", "backward"])
def test_nothing_is_left_behind_when_the_users_code_fails(where: str) -> None:
    model, data = Training(), classified(20, batch=6)
    calls = {"loss": 0, "data": 0, "model": 0, "backward": 0}

    def count(what: str) -> None:
        calls[what] += 1
        if what == where and calls[what] > 2:
            raise Fails(what)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        count("loss")
        output.register_hook(lambda grad: count("backward"))
        return CROSS_ENTROPY(output, target)

    def rule(sensitivities: Any) -> cg.Decision:
        raise Fails("rule")

    class Data:
        def __iter__(self) -> Iterator[Any]:
            for batch in data:
                count("data")
                yield batch

    model.drop.register_forward_hook(lambda *_: count("model"))
    problem = cg.GrowthProblem(model, loss_fn, Data(), CANDIDATES)
    with nothing_left_behind(model), pytest.raises(Fails, match=where):
        cg.solve(problem, rule if where == "rule" else cg.TopK(1))


def test_nothing_is_left_behind_when_the_first_batch_fails() -> None:
    model, data = Training(), classified(20, batch=6)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        raise Fails("loss")

    with nothing_left_behind(model), pytest.raises(Fails, match="loss"):
        cg.GrowthProblem(model, loss_fn, data, CANDIDATES)


def test_nothing_is_left_behind_after_nan_in_a_later_batch() -> None:
    model, data = Training(), classified(20, batch=6)
    data[2][0][0, 0] = float("nan")
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, CANDIDATES)
    with nothing_left_behind(model), refused(cg.DataError, "NaN or Inf"):
        cg.solve(problem)


def test_blocks_are_not_changed_either() -> None:
    model, data = Training(), classified(20, batch=6)
    for one in CANDIDATES:
        with nothing_left_behind(one.block):
            solved(model, data, one, rule=cg.Threshold(absolute=0.0))


# --- the call itself ------------------------------------------------------------------------------


def test_same_problem_same_answer_to_the_last_bit() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=8)
    candidates = [candidate("1"), candidate("3"), cg.Candidate("0", Gain(4))]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    first, second = cg.solve(problem), cg.solve(problem)
    assert first.sensitivities == second.sensitivities
    assert first.decision == second.decision
    assert (first.loss, first.stationarity) == (second.loss, second.stationarity)


def test_default_rule_inserts_the_largest() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=8)
    solution = solved(model, data, candidate("1"), candidate("3"))
    values = {name: s.value for name, s in solution.sensitivities.items()}
    assert solution.decision.chosen == (max(values, key=lambda name: values[name]),)


def test_graph_and_gradients_are_not_kept() -> None:
    solution = solved(feedforward(2, 4, 3), classified(20), candidate())
    for value in solution.multipliers["1"].values():
        assert not value.requires_grad
        assert value.grad_fn is None


def test_multipliers_of_one_solution_outlive_the_next() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    first = cg.solve(problem)
    kept = first.multipliers["1"]["weight"].clone()
    with torch.no_grad():
        model.get_parameter("0.weight").neg_()
    cg.solve(problem)
    assert torch.equal(first.multipliers["1"]["weight"], kept)
    assert_multipliers(cg.solve(problem), "1", autograd_multipliers(model, data, candidate()))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"rule": "top"}, cg.RuleError, "rule='top'"),
        ({"norm": "nuclear"}, cg.RuleError, "norm='nuclear'"),
        ({"gtol": -1.0}, cg.RuleError, "gtol=-1.0"),
        ({"gtol": float("nan")}, cg.RuleError, "gtol=nan"),
    ],
)
def test_arguments_that_make_no_sense(
    options: dict[str, Any], error: type[cg.GrowthError], word: str
) -> None:
    model = feedforward(2, 4, 3)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, classified(10), [candidate()])
    with nothing_left_behind(model), refused(error, word):
        cg.solve(problem, **options)


def test_problem_that_is_none() -> None:
    with refused(cg.GrowthError, "problem=", "cg.GrowthProblem"):
        cg.solve(feedforward(2, 4, 3))  # type: ignore[arg-type]


def test_ordinary_data_loader() -> None:
    model, ((x, y),) = feedforward(2, 4, 3), classified(20)
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    solution = solved(model, loader, candidate())
    assert_multipliers(solution, "1", autograd_multipliers(model, [(x, y)], candidate()))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_large_and_small_losses_in_single_precision(scale: float) -> None:
    model, data = feedforward(2, 4, 3).float(), [(x.float(), y) for x, y in classified(10)]
    plain = solved(model, data, candidate())
    scaled = solved(
        model, data, candidate(), loss_fn=lambda output, y: scale * CROSS_ENTROPY(output, y)
    )
    assert plain.stationarity is not None
    assert scaled.stationarity == pytest.approx(scale * plain.stationarity, rel=1e-5)
    value = scaled.sensitivities["1"].value
    assert value == pytest.approx(scale * plain.sensitivities["1"].value, rel=1e-5)


def test_dual_values_are_those_of_constraints() -> None:
    problem = cg.GrowthProblem(feedforward(2, 4, 3), CROSS_ENTROPY, classified(5), [candidate()])
    solution, constraint = cg.solve(problem), problem.constraints[0]
    assert solution.dual_value(constraint) is solution.multipliers["1"]["weight"]
    for other in ("1", ("1", "weight"), None, replace(constraint, candidate="2")):
        with refused(cg.CandidateError, "constraint=", "problem.constraints"):
            solution.dual_value(other)  # type: ignore[arg-type]


# --- evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.arange(3), [0, 1, 2]),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (torch.tensor([[1.0, float("nan")]]), [[1.0, None]]),
        (torch.tensor(3), 3),
        (float("inf"), None),
        ((1, {"a": np.int64(2), 3: "text"}), [1, {"a": 2, "3": "text"}]),
    ],
)
def test_evidence_is_kept_as_json_gives_it_back(given: Any, kept: Any) -> None:
    model = feedforward(2, 4, 3)
    decision = cg.Decision(("1",), evidence={"here": given})
    assert decision.evidence == {"here": kept}
    solution = solved(model, classified(9), candidate(), rule=lambda _: decision)
    record = cg.insert(model, solution)
    assert cg.GrowthRecord.from_json(record.to_json()).evidence == ({"here": kept},)


@pytest.mark.parametrize(
    "evidence",
    [{"a": [1, {"b": 1j}]}, {"a": {1, 2}}, {"a": np.array([1j])}, {"a": object()}, 3, ["a"]],
)
def test_evidence_that_json_cannot_hold_is_refused_at_once(evidence: Any) -> None:
    model, data, one = feedforward(2, 4, 3), classified(9), candidate()

    def rule(sensitivities: Any) -> cg.Decision:
        return cg.Decision(("1",), evidence=evidence)

    with nothing_left_behind(model), refused(cg.RuleError, "evidence", "JSON"):
        solved(model, data, one, rule=rule)
