"""Tiny benchmarks: what is counted and compared is right; no time is asserted."""

import io
import itertools
import json

import pytest
import torch
from constrained_growth._multipliers.uses import block_multipliers
from rich.console import Console
from typer.testing import CliRunner

from constrained_growth.experiments.commands import app
from constrained_growth.experiments.speed import benchmarks
from constrained_growth.experiments.speed import report as benchmark_report
from constrained_growth.experiments.speed.benchmarks import (
    COLUMNS,
    FULL,
    QUICK,
    Case,
    Cell,
    MultiplierBenchmark,
    Plan,
    Subject,
    disagreement,
    run_multipliers,
)
from constrained_growth.experiments.speed.networks import (
    NewPointwiseConvolution,
    convolutional,
    feedforward,
    pointwise,
    residual,
    transformer,
    with_all_built_in,
)
from constrained_growth.experiments.timing import Effort, Machine, Spread, compare, one_thread

MAKERS = (feedforward, residual, convolutional, pointwise, transformer)

TINY = Plan(
    tables={
        "feedforward": (Case(feedforward, 2, 4, 8, 20), Case(feedforward, 3, 4, 10, 20)),
        "residual": (Case(residual, 2, 4, 8, 20),),
        "others": tuple(Case(make, 1, 4, 2, 4) for make in MAKERS[2:]),
    },
    whole=Case(feedforward, 2, 4, 8, 20),
    effort=Effort(fewest=2, most=2, seconds=0.0),
)

ROW = {
    *("network", "depth", "width", "batch", "samples", "plain_ms", "pairs", "lambda_error"),
    *(name + end for name in COLUMNS for end in ("", "_low", "_high")),
}


@pytest.fixture(scope="module")
def result():
    return run_multipliers(TINY, seed=3, dtype=torch.float64)


def cell(ratio, with_stationarity, all_built_in, error):
    values = zip(COLUMNS, (ratio, with_stationarity, all_built_in), strict=True)
    ratios = {name: Spread(value, value, value) for name, value in values}
    return Cell("x", 1, 1, 1, 1, 1.0, ratios, 5, error)


def made_up(**tables):
    """A result with these (ratio, with stationarity, all built in, error) in its tables."""
    cells = {name: tuple(cell(*row) for row in rows) for name, rows in tables.items()}
    return MultiplierBenchmark(Machine.here(), 0, cells, cell(1.0, 1.0, 1.0, None))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("samples", [4, 5])  # the last batch of 5 is ragged
def test_the_opponent_computes_the_same_multipliers(make, samples):
    subject = Subject(Case(make, 2, 8, 2, samples), 0, torch.float64)
    found, other = subject.multiplier_pass(), subject.pass_with_all_built_in()
    assert len(found) == 2
    assert found.keys() == other.keys()
    assert disagreement(found, other) < 1e-12
    assert all(bool(t.any()) for tensors in other.values() for t in tensors.values())


@pytest.mark.parametrize("make", MAKERS)
def test_the_opponent_is_the_network_with_all_blocks_in_it(make):
    network = make(2, 8)
    extended = with_all_built_in(network.model, network.candidates)
    inputs, _ = network.draw(3)
    assert torch.equal(extended(inputs), network.model(inputs))
    blocks = [candidate.block for candidate in network.candidates]
    pinned = [block.get_parameter(name) for block in blocks for name in block.pinned]
    added = [parameter for block in blocks for parameter in block.parameters()]
    kept = list(network.model.parameters())
    sizes = [p.numel() for p in extended.parameters()]
    assert sum(sizes) == sum(p.numel() for p in kept + added)
    trainable = [p.numel() for p in extended.parameters() if p.requires_grad]
    assert trainable == [p.numel() for p in pinned]
    assert all(p.requires_grad for p in kept + added)


def test_the_plain_pass_leaves_the_gradient_of_the_last_batch():
    subject = Subject(Case(feedforward, 2, 8, 3, 8), 5, torch.float64)
    subject.plain_pass()
    torch.manual_seed(5)
    network = feedforward(2, 8)
    inputs, targets = network.draw(8)
    network.loss_fn(network.model(inputs[6:]), targets[6:]).backward()
    expected = [parameter.grad for parameter in network.model.parameters()]
    found = [parameter.grad for parameter in subject.model.parameters()]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_the_closed_form_of_the_convolution_is_its_gradient():
    block = NewPointwiseConvolution(3)
    x, delta = torch.randn(2, 4, 3, 5, 6)
    (factor,) = block.factors(x, delta)
    closed = -factor.cotangent.flatten(0, 1).T @ factor.features.flatten(0, 1)
    torch.testing.assert_close(block_multipliers(block, x, delta)["outer"], closed)


def test_disagreement_is_relative_to_each_candidate():
    other = {
        "a": {"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])},
        "dead": {"w": torch.zeros(2)},
    }
    found = {
        "a": {"w": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])},
        "dead": {"w": torch.zeros(2)},
    }
    assert disagreement(found, other) == pytest.approx(0.1)
    assert disagreement(other, other) == 0.0


def test_results_are_what_was_asked_for(result):
    for name, cases in TINY.tables.items():
        cells = result.tables[name]
        sizes = [(c.network, c.depth, c.width, c.batch, c.samples) for c in cells]
        assert sizes == [(c.make.__name__, c.depth, c.width, c.batch, c.samples) for c in cases]
        assert all(cell.pairs == 2 and cell.lambda_error < 1e-12 for cell in cells)
    assert result.seed == 3
    assert result.machine.threads == 1


def test_json_has_a_row_for_each_cell(result):
    content = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert content.keys() == {"machine", "seed", "tables", "solve", "summary"}
    assert {"processor", "cores", "threads", "torch", "allocator"} <= content["machine"].keys()
    for name, cells in result.tables.items():
        rows = content["tables"][name]
        assert all(row.keys() == ROW for row in rows)
        assert [row["ratio"] for row in rows] == [cell.ratios["ratio"].median for cell in cells]
        for row, column in itertools.product(rows, COLUMNS):
            assert 0 < row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
    assert {"ratio", "solve", "solve_without_stationarity", "problem_and_solve"} <= content[
        "solve"
    ].keys()
    assert content["summary"]["tables"].keys() == result.tables.keys()


def test_the_summary_holds_means_and_worst_cells():
    found = made_up(feedforward=[(0.5, 1.0, 2.0, 0.0), (2.0, 4.0, 2.0, 0.0)])
    assert found.summary()["tables"]["feedforward"] == {
        "ratio": {"geometric_mean": pytest.approx(1.0), "worst": 2.0},
        "with_stationarity": {"geometric_mean": pytest.approx(2.0), "worst": 4.0},
        "all_built_in": {"geometric_mean": pytest.approx(2.0), "worst": 2.0},
    }


def test_targets_are_met_or_missed_cell_by_cell():
    found = made_up(
        feedforward=[(0.8, 1.45, 2.0, 1e-7), (1.25, 1.4, 2.0, 9e-7)],
        residual=[(1.1, 1.2, 2.0, 0.0), (1.3, 1.5, 2.0, 2e-6)],
        others=[(1.2, 9.0, 2.0, 0.0)],
    )
    assert [(t.what, t.value, t.limit, t.met) for t in found.targets()] == [
        ("feedforward: geometric mean", pytest.approx(1.0), 1.0, True),
        ("feedforward: worst cell", 1.25, 1.25, True),
        ("feedforward: worst cell with stationarity", 1.45, 1.45, True),
        ("residual: geometric mean", pytest.approx(1.196, abs=1e-3), 1.0, False),
        ("residual: worst cell", 1.3, 1.25, False),
        ("residual: worst cell with stationarity", 1.5, 1.45, False),
        ("others: worst cell", 1.2, 1.25, True),
        ("λ: worst relative difference", 2e-6, 1e-6, False),
    ]


def test_the_report_shows_every_number():
    result = made_up(
        feedforward=[(0.8, 1.45, 2.0, 1e-7), (1.25, 1.4, 2.0, 9e-7)],
        residual=[(1.1, 1.2, 2.0, 0.0), (1.3, 1.5, 2.0, 2e-6)],
        others=[(1.2, 9.0, 2.0, 0.0)],
    )
    console = Console(width=benchmark_report.WIDTH, record=True, file=io.StringIO())
    console.print(benchmark_report.multipliers(result))
    text = console.export_text()
    assert "…  " not in text  # no cell is cut off
    for cell in itertools.chain(*result.tables.values()):
        for spread in cell.ratios.values():
            assert f"{spread.median:.2f} [{spread.low:.2f} {spread.high:.2f}]" in text
    assert all(target.what in text for target in result.targets())


def test_the_full_plan_is_the_grid():
    sizes = set(itertools.product((4, 16, 32), (4, 64, 256, 1024), (64, 512)))
    for table in ("feedforward", "residual"):
        cases = FULL.tables[table]
        assert {(c.depth, c.width, c.batch) for c in cases} == sizes
        assert len(cases) == len(sizes)
        assert {c.samples for c in cases if c.width < 1024} == {4096}
        assert all(c.samples >= 4 * c.batch for c in cases)
    assert QUICK.tables.keys() == FULL.tables.keys()


def test_runs_are_compared_in_turn_and_back():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    compared = compare(runs, Effort(fewest=3, most=9, seconds=0.0))
    assert "".join(order) == "abc" + "cba" + "abc"
    assert compared.rounds == 3
    assert compared.ratios.keys() == {"b", "c"}
    order.clear()
    assert compare(runs, Effort(fewest=2, most=5, seconds=float("inf"))).rounds == 5


def test_ratios_are_paired(monkeypatch):
    ticks = iter([0, *(0, 2), *(2, 6), *(10, 11), *(11, 21), *(30, 38), *(38, 70)])
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    compared = compare({"a": int, "b": int}, Effort(fewest=3, most=3, seconds=0.0))
    # a, b take 2, 4; then, backwards, b, a take 1, 10; then 8, 32
    assert compared.seconds == 8.0
    assert compared.ratios["b"] == Spread(median=2.0, low=1.05, high=3.0)


def test_one_thread_is_put_back():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_allocator_of_another_kind_is_named(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert Machine.here().allocator.endswith("with MALLOC_ARENA_MAX=2, libjemalloc.so.2 preloaded")


def test_random_state_and_threads_are_left_alone(result):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_multipliers(TINY, seed=3, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "QUICK", TINY)
    file, folder = tmp_path / "numbers.json", tmp_path / "new"
    arguments = ["bench", "multipliers", "--quick", "--json", str(file), "--out", str(folder)]
    ran = CliRunner().invoke(app, [*arguments, "--seed", "4"])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["seed"] == 4
    errors = [row["lambda_error"] for rows in content["tables"].values() for row in rows]
    assert max(errors) < 1e-5  # float32
    written = (folder / "constrained-growth-bench-multipliers.txt").read_text(encoding="utf-8")
    assert written.strip()
    command, _, *lines = written.splitlines()
    assert command.startswith("$ constrained-growth")
    shown = [line.rstrip() for line in ran.output.splitlines()]
    assert lines == shown[: len(lines)]
