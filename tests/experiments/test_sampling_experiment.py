"""The experiment on adaptive sampling, with few seeds, and MNIST-1D."""

import dataclasses
import io
import json
import random

import numpy as np
import pytest
import torch
from constrained_growth.experiments.speed.sampling import (
    Case,
    Reading,
    SamplingBenchmark,
    run_sampling,
)
from helpers import assert_same
from rich.console import Console
from typer.testing import CliRunner

from constrained_growth.experiments.commands import app
from constrained_growth.experiments.data import digits, mnist1d, two_spirals
from constrained_growth.experiments.speed import sampling
from constrained_growth.experiments.timing import one_thread

SEEDS = 3


def _spirals():
    return two_spirals(points_per_class=2000)


def _mnist1d():
    return mnist1d(num_samples=1000)


SMALL = (
    Case("digits", digits, (8, 8), 30, 16),
    Case("spirals", _spirals, (8, 8, 8), 5, 8),
    Case("mnist1d", _mnist1d, (16, 16), 60, 8),
)


@pytest.fixture(scope="module")
def found():
    with one_thread():
        return run_sampling(SEEDS, cases=SMALL)


def test_decisions_are_those_on_all_data(found):
    assert [r.data for r in found.readings[::2]] == ["digits", "spirals", "mnist1d"]
    assert sum(r.agreed for r in found.readings) >= 0.95 * SEEDS * len(found.readings)
    assert all(len(r.fractions) == r.seeds == SEEDS for r in found.readings)


def test_some_read_little(found):
    assert min(r.quartiles[1] for r in found.readings) < 0.9


def test_same_arguments_same_result_and_random_state(found):
    states = random.getstate(), torch.get_rng_state()
    again = run_sampling(SEEDS, cases=SMALL[1:2])
    assert again.readings == found.readings[2:4]
    assert_same(random.getstate(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def reading(**changes):
    plain = Reading("digits", 5, "largest", 99, 0.1, (2.0, 1.0), ("a",), 4, 4, (0.1, 0.1, 0.2, 0.3))
    return dataclasses.replace(plain, **changes)


def test_targets():
    assert reading().is_short
    assert reading().agrees
    assert not reading(agreed=3).agrees
    assert reading(fractions=(0.2, 0.2, 0.3, 1.0)).is_short is False
    assert reading(sensitivities=(2.0, 1.9)).is_short is None
    assert reading(rule="another").is_short is None


def test_table_says_what_was_missed():
    console = Console(width=120, record=True, file=io.StringIO())
    missed = reading(fractions=(1.0,) * 4, steps=7)
    console.print(sampling.table(SamplingBenchmark(0.95, (reading(), missed))))
    text = console.export_text()
    assert "15% (10%, 22%)" in text
    assert "met in 2 of 2 rows" in text
    assert "met in 1 of 2 rows; missed in digits, 7 steps." in text


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "constrained_growth.experiments.speed.command.run_sampling",
        lambda seeds, seed: run_sampling(seeds, cases=SMALL[1:2], seed=seed),
    )
    file = tmp_path / "numbers.json"
    ran = CliRunner().invoke(app, ["bench", "sampling", "--seeds", "2", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "confidence 0.95, 2 random orders" in ran.output
    content = json.loads(file.read_text())
    assert [len(r["fractions"]) for r in content["readings"]] == [2, 2]


def test_mnist1d_is_generated_and_leaves_the_random_state_alone():
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    split = mnist1d(3, num_samples=100, dtype=torch.float64)
    assert_same(random.getstate(), states[0])
    assert_same(np.random.get_state()[1].tolist(), states[1][1].tolist())  # type: ignore[index]  # noqa: NPY002
    assert (split.x_train.shape, split.x_test.shape) == ((80, 40), (20, 40))
    assert split.num_classes == 10
    assert split.x_train.dtype == torch.float64
    assert torch.equal(split.x_train, mnist1d(3, num_samples=100, dtype=torch.float64).x_train)
    assert not torch.equal(split.x_train, mnist1d(4, num_samples=100).x_train.double())
    both = torch.cat([split.x_train, split.x_test])
    assert both.mean().item() == pytest.approx(0, abs=1e-12)
    assert both.std(correction=0).item() == pytest.approx(1)
