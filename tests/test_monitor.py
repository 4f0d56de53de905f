"""Multipliers gathered while a model is trained: right, unbiased, and without any trace."""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    assert_same,
    autograd_multipliers,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    state_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP
from constrained_growth.monitoring import Monitor

Loss = Callable[[Any, Any], Tensor]
KEEPS_GRAPH = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def problem_of(model: nn.Module, data: list[Any], *candidates: cg.Candidate) -> cg.GrowthProblem:
    return cg.GrowthProblem(model, token_loss, data, candidates)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return CROSS_ENTROPY(output.flatten(0, -2), target.flatten())


def train(model: nn.Module, data: Iterable[Any], lr: float = 0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9 if lr else 0.0)
    for input, target in data:
        optimizer.zero_grad()
        token_loss(model(input), target).backward()
        optimizer.step()


def backward(model: nn.Module, input: Tensor, target: Tensor) -> None:
    token_loss(model(input), target).backward()


def all_kinds(after: str, width: int) -> list[cg.Candidate]:
    blocks = {
        "identity": IdentityLinear(width, nn.ReLU()),
        "one weight": ResidualLinear(width, torch.tanh),
        "outer": ResidualMLP(width, width + 1, nn.GELU()),
        "inner": ResidualMLP(width, 2, torch.tanh, "inner"),
        "a user's own": Gain(width),
    }
    return [cg.Candidate(after, b, name=f"{kind} after {after}") for kind, b in blocks.items()]


def sequences(num: int, batch: int) -> list[Any]:
    x, y = torch.randn(num, 3, 2), torch.randint(3, (num, 3))
    return list(zip(x.split(batch), y.split(batch), strict=True))


def assert_agree(monitor: Monitor, solution: cg.Solution) -> None:
    found = monitor.multipliers()
    assert list(monitor.sensitivities()) == list(solution.sensitivities)
    for name, expected in solution.sensitivities.items():
        assert_multipliers(solution, name, found[name], atol=1e-12)
        sensitivity = monitor.sensitivities()[name]
        assert sensitivity.value == pytest.approx(expected.value, abs=1e-12)
        assert sensitivity.variance == pytest.approx(expected.variance, abs=1e-12, nan_ok=True)
        assert sensitivity.num_parameters == expected.num_parameters
        assert sensitivity.num_new_parameters == expected.num_new_parameters


# --- the average over the window ------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, cg.norms.Frobenius()], ids=str)
@pytest.mark.parametrize("data", [classified, sequences], ids=["vectors", "sequences"])
def test_with_standing_parameters_it_is_what_solve_gives(data: Any, norm: Any) -> None:
    model, batches = feedforward(2, 4, 4, 3), data(20, batch=8)
    kinds = all_kinds("1", 4) + all_kinds("3", 4)
    for candidates in (kinds, [kind for kind in kinds if "own" not in kind.name]):
        problem = problem_of(model, batches, *candidates)
        with cg.monitor(problem, norm=norm) as monitor:
            train(model, batches)
        assert (monitor.num_samples, monitor.num_batches) == (20, 3)
        assert_agree(monitor, cg.solve(problem, norm=norm))


def test_with_moving_parameters_it_is_the_average_over_the_steps() -> None:
    model, batches = feedforward(2, 4, 4, 3), classified(30, batch=8)
    candidates = all_kinds("1", 4) + all_kinds("3", 4)
    problem = problem_of(model, batches, *candidates)
    sums: dict[str, dict[str, Tensor]] = {one.name: {} for one in candidates}
    with cg.monitor(problem) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for input, target in batches:
            frozen = copy.deepcopy(feedforward(2, 4, 4, 3))
            frozen.load_state_dict(model.state_dict())
            for one in candidates:
                here = autograd_multipliers(frozen, [(input, target)], one, token_loss)
                for name, value in here.items():
                    sums[one.name][name] = sums[one.name].get(name, 0) + value * len(input) / 30
            optimizer.zero_grad()
            backward(model, input, target)
            optimizer.step()
    for name, found in monitor.multipliers().items():
        assert_same(list(found), list(sums[name]))
        for key, value in found.items():
            torch.testing.assert_close(value, sums[name][key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [cg.norms.Nuclear(), cg.norms.KroneckerFisher()], ids=str)
def test_it_measures_in_any_norm(norm: Any) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20, batch=8)
    problem = problem_of(model, data, candidate("1"), candidate("3"))
    with cg.monitor(problem, norm=norm) as monitor:
        train(model, data)
    for name, expected in cg.solve(problem, norm=norm).sensitivities.items():
        assert monitor.sensitivities()[name].value == pytest.approx(expected.value, abs=1e-12)


def test_a_window_ends_with_reset_and_may_be_read_at_any_time() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=8)
    problem = problem_of(model, data, candidate("1"))
    with cg.monitor(problem) as monitor:
        with refused(cg.DataError, "'1'", "backward()"):
            monitor.sensitivities()
        train(model, data[:1])
        with torch.inference_mode():
            first = monitor.multipliers()["1"]["weight"]
        torch.testing.assert_close(first, monitor.multipliers()["1"]["weight"])
        train(model, data[1:])
        assert monitor.num_batches == 3
        assert_agree(monitor, cg.solve(problem))
        monitor.reset()
        assert monitor.num_batches == 0
        train(model, data[2:])
    assert_agree(monitor, cg.solve(problem_of(model, data[2:], candidate("1"))))


def test_a_backward_pass_counts_for_the_window_in_which_forward_ran() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    with cg.monitor(problem_of(model, data, candidate("1"))) as monitor:
        loss = token_loss(model(data[0][0]), data[0][1])
        monitor.reset()
        loss.backward()
        assert monitor.num_samples == 0


def test_every_so_manieth_forward_pass() -> None:
    model, data = feedforward(2, 4, 3), classified(28, batch=4)
    with cg.monitor(problem_of(model, data, candidate("1")), every=3) as monitor:
        train(model, data)
    assert monitor.num_batches == 3
    assert_agree(monitor, cg.solve(problem_of(model, data[::3], candidate("1"))))


def test_the_solution_decides_and_can_be_inserted() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20, batch=8)
    problem = problem_of(model, data, candidate("1"), candidate("3"))
    with cg.monitor(problem) as monitor:
        train(model, data)
    solution = monitor.solution(choose("3"))
    assert solution.decision.chosen == ("3",)
    assert solution.status is cg.Status.STATIONARITY_UNKNOWN
    assert math.isnan(solution.loss)
    assert (solution.num_samples, solution.num_batches) == (20, 3)
    assert set(solution.multipliers) == {"1", "3"}
    grown = copy.deepcopy(model)
    cg.insert(grown, solution)
    torch.testing.assert_close(grown(data[0][0]), model(data[0][0]))


def test_not_finite_is_said() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    with cg.monitor(problem_of(model, data, candidate("1"))) as monitor:
        backward(model, data[0][0] * math.nan, data[0][1])
    solution = monitor.solution()
    assert solution.status is cg.Status.NOT_FINITE
    assert solution.decision.chosen == ()


# --- what is done to the loss ---------------------------------------------------------------------


def test_gradient_accumulation_is_undone_by_scale() -> None:
    model, data = feedforward(2, 4, 3), classified(16, batch=4)
    problem = problem_of(model, data, candidate("1"))
    with cg.monitor(problem, scale=1 / 4) as monitor:
        for input, target in data:
            (token_loss(model(input), target) / 4).backward()
    assert_agree(monitor, cg.solve(problem))


def test_a_grad_scaler_is_asked_and_its_overflows_are_left_out() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=4)
    problem = problem_of(model, data, candidate("1"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scales = set()
    with cg.monitor(problem, scale=scaler.get_scale) as monitor:
        for index, (input, target) in enumerate(data):
            optimizer.zero_grad()
            scales.add(scaler.get_scale())
            factor = math.inf if index == 3 else 1.0
            scaler.scale(token_loss(model(input), target) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert len(scales) > 1
    assert monitor.num_batches == 4
    assert_agree(monitor, cg.solve(problem_of(model, data[:3] + data[4:], candidate("1"))))


@KEEPS_GRAPH
def test_several_backward_passes_through_one_graph_add_up() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"))
    with cg.monitor(problem) as monitor:
        loss = token_loss(model(data[0][0]), data[0][1])
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward(create_graph=True)
        model.zero_grad()
    assert monitor.num_samples == 8
    expected = cg.solve(problem).multipliers["1"]
    for name, value in monitor.multipliers()["1"].items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    with refused(cg.DataError, "several backward passes went through one forward pass"):
        monitor.sensitivities()


@KEEPS_GRAPH
def test_parts_of_a_loss_have_a_size_in_norms_of_the_multiplier_alone() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    problem, norm = problem_of(model, data, candidate("1")), cg.norms.Frobenius()
    with cg.monitor(problem, norm=norm) as monitor:
        loss = token_loss(model(data[0][0]), data[0][1])
        for _ in range(4):
            (loss / 4).backward(retain_graph=True)
    found, expected = monitor.sensitivities()["1"], cg.solve(problem, norm=norm).sensitivities["1"]
    assert found.value == pytest.approx(expected.value)
    assert found.replicates == pytest.approx(expected.replicates)
    assert math.isnan(found.variance)


@pytest.mark.parametrize("norm", [None, cg.norms.Frobenius()])
def test_what_is_read_later_is_of_the_moment_it_was_asked(norm: Any) -> None:
    model, data = feedforward(2, 4, 3), classified(60, batch=10)
    with cg.monitor(problem_of(model, data, candidate("1")), norm=norm) as monitor:
        token_loss(model(data[0][0]), data[0][1]).backward()
        token_loss(model(data[1][0]), data[1][1]).backward()
        now, later = (monitor.sensitivities()["1"] for _ in range(2))
        read = now.replicates, now.cross_fitted
        for input, target in data[2:]:
            (9 * token_loss(model(input), target)).backward()
    assert (later.replicates, later.cross_fitted) == read


def test_two_forward_passes_before_one_backward_pass() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(12, batch=8)
    problem = problem_of(model, data, candidate("1"), candidate("3"))
    with cg.monitor(problem) as monitor:
        sum(token_loss(model(input), target) for input, target in data).backward()  # type: ignore[union-attr]
    assert_agree(monitor, cg.solve(problem))


def test_autocast() -> None:
    model, data = feedforward(2, 8, 8, 3).float(), classified(64, batch=16)
    data = [(x.float(), y) for x, y in data]
    problem = problem_of(model, data, candidate("1", 8), candidate("3", 8))
    expected = cg.solve(problem).multipliers["1"]["weight"]
    with cg.monitor(problem) as monitor:
        for input, target in data:
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_loss(model(input), target)
            loss.backward()
    found = monitor.multipliers()["1"]["weight"]
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


# --- nothing else counts, nothing else stays ------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen prefix"])
def test_training_is_the_same_to_the_last_bit(
    options: dict[str, Any], dtype: torch.dtype, frozen: bool
) -> None:
    def trained(watch: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Dropout(0.3)),
            *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        ).to(dtype)
        if frozen:
            model[:6].requires_grad_(False)
        data = [(x.to(dtype), y) for x, y in classified(64, batch=16)]
        sites = {"0": ResidualLinear(8, torch.tanh), "1": IdentityLinear(8, nn.ReLU())}
        sites |= {"5": IdentityLinear(8, nn.ReLU()), "6": ResidualLinear(8, torch.tanh)}
        problem = problem_of(model, data, *(cg.Candidate(a, b) for a, b in sites.items()))
        if watch:
            with cg.monitor(problem, **options) as monitor:
                train(model, data * 3, lr=0.1)
            assert monitor.num_batches == 12 // options.get("every", 1)
            assert all(s.value > 0 for s in monitor.sensitivities().values())
        else:
            train(model, data * 3, lr=0.1)
        return {**state_of(model), "identities": None, "modules": None}

    assert_same(trained(True), trained(False))


def test_frozen_and_overwritten_sites_are_measured() -> None:
    layers = (nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model, data = nn.Sequential(nn.Identity(), *layers), classified(20, batch=8)
    model[:3].requires_grad_(False)
    candidates = [
        cg.Candidate("0", ResidualLinear(2, torch.tanh)),
        *(cg.Candidate(after, ResidualLinear(4, torch.tanh)) for after in "123"),
    ]
    problem = problem_of(model, data, *candidates)
    reused = [torch.empty(8, 2), torch.empty(4, 2)]  # a user's buffers, written over and over
    with cg.monitor(problem) as monitor:
        for input, target in data:
            buffer = reused[0] if len(input) == 8 else reused[1]
            backward(model, buffer.copy_(input), target)
            buffer.fill_(math.nan)
    assert_agree(monitor, cg.solve(problem))


def test_forward_passes_without_backward_count_for_nothing() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=8)
    problem = problem_of(model, data, candidate("1"))
    with cg.monitor(problem) as monitor:
        for batch in data:
            model(batch[0])
            with torch.no_grad():
                model(batch[0])
            with torch.inference_mode():
                model.eval()(batch[0])
            model.train()
            train(model, [batch])
            with torch.inference_mode():
                model(batch[0])
    assert_agree(monitor, cg.solve(problem))


@KEEPS_GRAPH
def test_nothing_is_kept_alive() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"))
    watched: list[weakref.ref[Any]] = []

    class Witness:
        """Dies with the graph that it hangs on."""

        def __call__(self, grad: Tensor) -> None:
            pass

    def loss() -> Tensor:
        output, witness = model(data[0][0]), Witness()
        output.register_hook(witness)
        watched.append(weakref.ref(witness))
        return token_loss(output, data[0][1])

    def alive() -> bool:
        return watched[-1]() is not None

    with cg.monitor(problem) as monitor:
        value = loss()
        assert alive()
        del value
        assert not alive()  # no backward pass: gone at once, without the collector
        loss().backward()
        assert not alive()
        loss().backward(create_graph=True)
        model.zero_grad()
        gc.collect()
        assert not alive()
    assert monitor.num_batches == 2


def test_nothing_is_left_on_the_model() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"), candidate("3"))
    with nothing_left_behind(model), cg.monitor(problem) as monitor:
        train(model, data)
        monitor.reset()
        train(model, data)
        monitor.sensitivities()
        model.zero_grad()
    with pytest.raises(ZeroDivisionError), nothing_left_behind(model), cg.monitor(problem):
        raise ZeroDivisionError


def test_an_exception_on_the_way_harms_no_sum() -> None:
    model, data = feedforward(2, 4, 4, 4, 3), classified(24, batch=8)
    sites = [candidate("1"), candidate("3"), candidate("5")]
    problem = problem_of(model, data, *sites)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with cg.monitor(problem) as monitor:
        train(model, data[:1])
        with model[4].register_forward_hook(fail), pytest.raises(ZeroDivisionError):
            train(model, data[1:2])
        handle = model[2].register_full_backward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            train(model, data[1:2])
        handle.remove()
        train(model, data[2:])
    found = monitor.multipliers()
    for one, batches in zip(sites, ([0, 2], [0, 1, 2], [0, 1, 2]), strict=True):
        expected = cg.solve(problem_of(model, [data[i] for i in batches], one)).multipliers
        for key, value in found[one.name].items():
            torch.testing.assert_close(value, expected[one.name][key], rtol=0, atol=1e-12)


class Branching(nn.Module):
    """A layer that is left out at times, and one that is checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant, self.skip = feedforward(2, 4, 4, 4, 3), reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[:2](x)
        if not self.skip:
            x = self.layers[2:4](x)
        x = checkpoint(self.layers[4:6], x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.layers[6](x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_counts_once(reentrant: bool) -> None:
    model, data = Branching(reentrant), classified(24, batch=8)
    model.reentrant = False  # for the first look; see torch.utils.checkpoint
    problem = problem_of(model, data, *(candidate(f"layers.{i}") for i in (1, 3, 5)))
    model.reentrant = reentrant
    with cg.monitor(problem) as monitor:
        train(model, data)
    expected = cg.solve(problem_of(model.layers, data, *(candidate(i) for i in "135"))).multipliers
    for name, found in monitor.multipliers().items():
        for key, value in found.items():
            reference = expected[name.removeprefix("layers.")][key]
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)


def test_a_layer_that_is_left_out_at_times_adds_zero_there() -> None:
    model, data = Branching(False), classified(24, batch=8)
    problem = problem_of(model, data, *(candidate(f"layers.{i}") for i in (1, 3, 5)))
    with cg.monitor(problem) as monitor:
        for index, batch in enumerate(data):
            model.skip = index == 1
            train(model, [batch])
    model.skip = False
    once = cg.solve(problem_of(model, data[::2], candidate("layers.3"))).multipliers["layers.3"]
    for key, value in monitor.multipliers()["layers.3"].items():
        torch.testing.assert_close(value, once[key] * (2 / 3), rtol=0, atol=1e-12)
    assert monitor.num_batches == 3


def test_an_idle_expert_counts_as_in_solve() -> None:
    model, data = Branching(False), classified(24, batch=8)
    model.register_forward_pre_hook(lambda m, args: setattr(m, "skip", bool(args[0][0, 0] > 0)))
    x = torch.cat([x for x, _ in data])
    x[:16, 0] = x[:16, 0].abs()
    x[8:16, 0] *= -1
    data = list(zip(x.split(8), [y for _, y in data], strict=True))
    problem = problem_of(model, data, *(candidate(f"layers.{i}") for i in (1, 3, 5)))
    with cg.monitor(problem) as monitor:
        train(model, data)
    assert_agree(monitor, cg.solve(problem))


# --- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "l2"}, ("norm='l2'", "cg.norms")),
        ({"every": 0}, ("every=0", "positive")),
        ({"every": 1.5}, ("every=1.5",)),
        ({"scale": 0.0}, ("scale=0.0", "(0, inf)")),
        ({"scale": math.nan}, ("scale=nan",)),
    ],
    ids=str,
)
def test_arguments_are_checked(options: dict[str, Any], words: tuple[str, ...]) -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"))
    with (
        nothing_left_behind(model),
        refused(cg.RuleError, *words),
        cg.monitor(problem, **options),
    ):
        pass


def test_other_refusals() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    with refused(cg.DataError, "problem=Seq", "give a cg.GrowthProblem"), cg.monitor(model):  # type: ignore[arg-type]
        pass
    with cg.monitor(problem_of(model, data, candidate("1"))) as monitor:
        train(model, data)
    with refused(cg.RuleError, "rule=1"):
        monitor.solution(1)  # type: ignore[arg-type]


def test_a_model_that_has_grown_since_is_refused() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"), candidate("3"))
    cg.insert(model, cg.solve(problem))
    words = ["not the one it was made with", "new cg.GrowthProblem"]
    with refused(cg.CandidateError, *words), cg.monitor(problem):
        pass


def test_a_site_that_becomes_no_tensor_is_refused() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    problem = problem_of(model, data, candidate("1"))
    as_tuple = model[1].register_forward_hook(lambda module, args, output: (None,))
    with as_tuple, cg.monitor(problem), refused(cg.CandidateError, 'after="1"', "tuple"):
        model(data[0][0])
