"""`bench decisions --family whether`: its tests and outcomes against plain computations."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.decisions import whether
from constrained_growth.experiments.ensembles.networks import ensemble, samples
from constrained_growth.experiments.ensembles.training import SGD, train


@pytest.mark.parametrize("frozen", [False, True])
def test_the_score_test_is_a_regression_of_ones_on_the_scores(frozen: bool) -> None:
    torch.manual_seed(0)
    tail = cg.blocks.ResidualMLP(4, 4, nn.Tanh())
    nn.init.normal_(tail.outer.weight)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), tail, nn.Linear(4, 2))
    model.requires_grad_(not frozen)
    block = cg.blocks.ResidualMLP(4, 3, nn.Tanh())
    x, y = torch.randn(80, 3), torch.randn(80, 2)
    grown = nn.Sequential(*list(model)[:3], block, model[3])  # the second site is after the block
    old = [] if frozen else list(model.parameters())
    scores = []
    for a, b in zip(x, y, strict=True):
        loss = nn.functional.mse_loss(grown(a[None]), b[None])
        found = torch.autograd.grad(loss, [block.outer.weight, *old])
        scores.append(torch.cat([g.flatten() for g in found]).double().numpy())
    every, ones = np.stack(scores), np.ones(80)

    def explained(columns: np.ndarray) -> float:
        fitted = columns @ np.linalg.lstsq(columns, ones, rcond=1e-9)[0]
        return float(fitted @ fitted)

    pins = block.outer.weight.numel()
    rest = explained(every[:, pins:]) if old else 0.0
    more = np.linalg.matrix_rank(every) - (np.linalg.matrix_rank(every[:, pins:]) if old else 0)
    expected = stats.chi2.sf(explained(every) - rest, more)
    assert whether.score_test(model, 1, block, (x, y)) == pytest.approx(expected, rel=1e-4)


def test_what_does_not_learn_stays() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)) for _ in range(2)]
    begun = ensemble(models)
    data = samples([torch.randn(10, 2)] * 2, [torch.randint(2, (10,))] * 2)
    moving = torch.zeros_like(begun.parameters)
    moving[:, 3:7] = 1
    after, _ = train(begun, data, 3, SGD(0.1, 0.9), moving=moving)
    moved = after.parameters != begun.parameters
    assert torch.equal(moved, moving > 0)


def test_gains_are_those_of_really_inserted_layers() -> None:
    """A frozen student of a shifted task gains by a layer, one of the same task hardly."""
    kinds = [
        replace(kind, epochs=20, samples=150, begun=5)
        for kind in whether.FULL.tasks
        if kind.name in ("frozen-150-adam", "frozen-shifted-150-adam")
    ]
    found = whether.run(whether.Plan(kinds, networks=2, runs=2, workers=1))
    same, shifted = (np.array(found["details"][kind.name]["gain"]) for kind in kinds)
    assert same.shape == shifted.shape == (2, 5)
    assert shifted.min() > 3 * abs(same).max()
    tests = found["details"]["frozen-shifted-150-adam"]["tests"]
    assert set(tests) == set(whether.TESTS)
    assert all(pvalue < 0.05 for test in tests.values() for pvalue, _ in test)


def test_the_command_writes_its_numbers(tmp_path, monkeypatch) -> None:
    short = [replace(kind, epochs=1, begun=1) for kind in whether.QUICK.tasks]
    monkeypatch.setattr(whether, "QUICK", whether.Plan(short, networks=2, runs=2, workers=1))
    file = tmp_path / "numbers.json"
    arguments = ["bench", "decisions", "--family", "whether", "--quick", "--json", str(file)]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    numbers = json.loads(file.read_text())
    assert numbers["kinds"]["all"]["networks"] == 4
    assert set(numbers["kinds"]) == {"all", *(kind.name for kind in short)}
    assert len(list(tmp_path.glob("whether-*.joblib"))) == 2
    assert (tmp_path / "constrained-growth-bench-decisions-whether-quick-0.txt").exists()
