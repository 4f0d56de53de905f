"""Tiny benchmarks: what is counted and compared is right; no time is asserted."""

import copy
import importlib.util
import io
import itertools
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments import timing
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.speed import device, gromo, models, monitoring, multipliers
from constrained_growth.experiments.speed.multipliers import (
    COLUMNS,
    FULL,
    QUICK,
    Case,
    Plan,
    built_in_multipliers,
    disagreement,
    run,
    tables,
)
from constrained_growth.experiments.speed.networks import (
    convolutional,
    feedforward,
    residual,
    transformer,
    vision,
    with_all_built_in,
)
from constrained_growth.experiments.speed.stock import STOCK
from constrained_growth.experiments.speed.subject import solving
from constrained_growth.experiments.statistics import Spread
from constrained_growth.experiments.tables import WIDTH
from constrained_growth.experiments.timing import Effort, compare, one_thread

MAKERS = (feedforward, residual, convolutional, transformer, vision)

TINY = Plan(
    tables={
        "feedforward": (Case(feedforward, 2, 4, 8, 20), Case(feedforward, 3, 4, 10, 20)),
        "residual": (Case(residual, 2, 4, 8, 20),),
        "others": tuple(Case(make, 1, 4, 2, 4) for make in MAKERS[2:]),
    },
    effort=Effort(fewest=2, most=2, seconds=0.0),
)

ROW = {
    *("network", "depth", "width", "batch", "samples", "plain_ms", "pairs", "lambda_error"),
    *(name + end for name in COLUMNS for end in ("", "_low", "_high")),
}


@pytest.fixture(scope="module")
def result():
    return run(TINY, seed=3, dtype=torch.float64)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("samples", [4, 5])  # the last batch of 5 is ragged
def test_the_opponent_computes_the_same_multipliers(make, samples):
    subject = Case(make, 2, 8, 2, samples).subject(0, torch.float64)
    found = solving(subject.problem())().multipliers
    other = built_in_multipliers(with_all_built_in(subject))
    assert len(found) == 2
    assert found.keys() == other.keys()
    assert disagreement(found, other) < 1e-12
    larger = solving(subject.problem(cg.rebatch(subject.data, 3)))().multipliers
    assert disagreement(larger, other) < 1e-12
    assert all(bool(t.any()) for tensors in other.values() for t in tensors.values())


@pytest.mark.parametrize("make", MAKERS)
def test_the_opponent_is_the_network_with_all_blocks_in_it(make):
    network = make(2, 8, 3)
    extended = with_all_built_in(network).model
    ((inputs, _),) = network.data
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
    subject = Case(feedforward, 2, 8, 3, 8).subject(5, torch.float64)
    subject.plain_pass()
    torch.manual_seed(5)
    network = feedforward(2, 8, 8)
    ((inputs, targets),) = network.data
    network.loss_fn(network.model(inputs[6:]), targets[6:]).backward()
    expected = [parameter.grad for parameter in network.model.parameters()]
    found = [parameter.grad for parameter in subject.model.parameters()]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


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
        rows = result["tables"][name]
        keys = "network", "depth", "width", "batch", "samples"
        sizes = [tuple(row[key] for key in keys) for row in rows]
        assert sizes == [(c.make.__name__, c.depth, c.width, c.batch, c.samples) for c in cases]
        assert all(row.keys() == ROW for row in rows)
        assert all(row["pairs"] == 2 and row["lambda_error"] < 1e-12 for row in rows)
        for row in rows:
            for column in COLUMNS:
                assert 0 < row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]


def test_the_summary_holds_means_and_worst_cells(result):
    summary = result["summary"]["tables"]
    assert summary.keys() == result["tables"].keys()
    for name, column in itertools.product(summary, COLUMNS):
        values = [row[column] for row in result["tables"][name]]
        mean = torch.tensor(values).log().mean().exp().item()
        assert summary[name][column]["geometric_mean"] == pytest.approx(mean)
        assert summary[name][column]["worst"] == max(values)


def test_the_report_shows_every_number(result):
    found = copy.deepcopy(result)
    for at, row in enumerate(itertools.chain(*found["tables"].values())):
        row |= {name + end: 10.0 + at for name in COLUMNS for end in ("", "_low", "_high")}
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(tables(found))
    text = console.export_text()
    assert "…  " not in text  # no cell is cut off
    for row in itertools.chain(*found["tables"].values()):
        for column in COLUMNS:
            low, high = row[f"{column}_low"], row[f"{column}_high"]
            assert f"{row[column]:.2f} [{low:.2f} {high:.2f}]" in text


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
    monkeypatch.setattr(timing, "timer", lambda: float(next(ticks)))
    compared = compare({"a": int, "b": int}, Effort(fewest=3, most=3, seconds=0.0))
    # a, b take 2, 4; then, backwards, b, a take 1, 10; then 8, 32
    assert compared.seconds == 8.0
    assert compared.ratios["b"] == Spread(median=2.0, low=1.05, high=3.0)


def test_one_thread_is_put_back():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    monkeypatch.setattr(multipliers, "QUICK", TINY)
    file, folder = tmp_path / "numbers.json", tmp_path / "new"
    arguments = ["bench", "multipliers", "--quick", "--json", str(file), "--out", str(folder)]
    ran = CliRunner().invoke(app, [*arguments, "--seed", "4"])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text(encoding="utf-8"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    assert content["seed"] == 4
    assert content["machine"]["threads"] == 1
    assert {"processor", "cores", "torch"} <= content["machine"].keys()
    errors = [row["lambda_error"] for rows in content["tables"].values() for row in rows]
    assert max(errors) < 1e-5  # float32
    written = (folder / "constrained-growth-bench-multipliers-quick-4.txt").read_text(
        encoding="utf-8"
    )
    assert written.strip()
    command, _, *lines = written.splitlines()
    assert command.startswith("$ constrained-growth")
    shown = [line.rstrip() for line in ran.output.splitlines()]
    assert lines == shown[: len(lines)]


def test_monitoring_is_timed_and_its_operations_are_counted(monkeypatch, tmp_path):
    plan = monitoring.Plan((4,), (3,), Effort(fewest=2, most=2, seconds=0.0), 0.0, 1)
    monkeypatch.setattr(monitoring, "QUICK", plan)
    file = tmp_path / "cost.json"
    ran = CliRunner().invoke(app, ["bench", "monitoring", "--quick", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "1 step in 10" in ran.output
    content = json.loads(file.read_text())
    (cell,) = content["cells"]
    assert list(cell["overheads"]) == list(monitoring.MODES)
    weights = 16 * 4 + 7 * 16 + 4 * 10
    assert cell["operations"]["step"] == 3 * (6 * weights - 2 * 16 * 4)
    assert cell["operations"]["exact"] == 3 * 8 * 2 * 16
    assert (cell["width"], content["seed"]) == (4, 0)


# --- stock models -------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.name)
def test_stock_models_are_those_of_their_names(stock):
    """Their sizes, counted without memory for them; the small ones run in test_stock_models."""
    millions = {
        "GPT-2 124M": 124.4,
        "Llama-like 100M": 104.7,
        "OPT-125M": 125.2,
        "BERT-base": 109.5,
        "T5-small": 60.5,
        "ViT-B/16": 85.9,
        "DINOv2-S/14": 22.1,
        "ResNet-50": 23.7,
        "ConvNeXt-T": 27.9,
        "VGG-11": 9.3,
    }
    with torch.device("meta"):
        model = stock.model(small=False)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert size == pytest.approx(millions[stock.name], rel=0.02)


def test_models_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "QUICK", replace(models.QUICK, tasks=(STOCK[0], STOCK[-1])))
    file, state = tmp_path / "numbers.json", torch.get_rng_state()
    arguments = ["bench", "multipliers", "--family", "models", "--quick", "--json", str(file)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert torch.equal(torch.get_rng_state(), state)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["candidates"], row["block"]) for row in rows] == [
        ("GPT-2 124M", 2, "CopiedBlock"),
        ("VGG-11", 3, "IdentityConv2d"),
    ]
    # the output projections, and the three convolutions after a ReLU
    assert rows[0]["pinned"] == 2 * (16 * 16 + 16 + 64 * 16 + 16)
    assert rows[1]["pinned"] == 2 * (4 * 4 * 9 + 4) + 8 * 8 * 9 + 8
    for row in rows:
        for column in models.COLUMNS:
            assert f"{row[column]:.2f} [" in ran.output
        assert row["memory"] > 0


# of PyTorch's own, as torch.compile is imported
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_device_is_checked(tmp_path, monkeypatch):
    plan = replace(device.QUICK, tasks=device.QUICK.tasks[:1])
    monkeypatch.setattr(device, "QUICK", plan)
    file = tmp_path / "numbers.json"
    arguments = ["bench", "device", "--device", "cpu", "--quick", "--json", str(file)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [row["dtype"] for row in found["rows"]] == ["float32", "bfloat16"]
    checks = found["checks"]
    assert checks["torch.compile"].startswith("holds")
    assert checks["AMP with a GradScaler"].startswith("holds")


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = CliRunner().invoke(app, ["bench", "device"])
    assert ran.exit_code == 2
    assert "--device cpu --quick" in " ".join(ran.output.replace("│", " ").split())


def test_gromo_is_not_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gromo.gromo_decision(2, 4, [], torch.nn.CrossEntropyLoss()) is None
