"""Families of adaptations: plain loops, shifts and texts with known properties, the command."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.blocks import ResidualMLP
from constrained_growth.experiments import data
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.decisions import adaptation, expansions, shifts
from constrained_growth.experiments.decisions.adaptation import (
    Adaptation,
    Moment,
    Origin,
    at_the_moment,
    key,
    outcomes,
    trained_on_first,
)
from constrained_growth.experiments.decisions.study import Plan, run
from constrained_growth.experiments.statistics import Yardstick, estimate, resampled_regret
from constrained_growth.experiments.training import Data, Training


def blobs(seed: int, turned: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    centres, y = torch.randn(3, 2, generator=generator), torch.arange(48) % 3
    x = centres[y] + 0.5 * torch.randn(48, 2, generator=generator)
    return x.double(), (y + turned) % 3


def begin(seed: int) -> tuple[nn.Sequential, Data, Data]:
    layers = [nn.Sequential(nn.Linear(2, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 3)).double(), blobs(seed), blobs(seed + 100)


def layers(model: nn.Sequential) -> list[nn.Module]:
    return [ResidualMLP(4, 4, nn.Tanh(), dtype=torch.float64) for _ in range(2)]


ORIGIN = Origin("tiny", "blobs", begin, layers, Training(steps=30, batch=16, lr=0.01))


def tiny(**changes: Any) -> Adaptation:
    def turned(seed: int) -> tuple[Data, Data]:
        return blobs(seed, 1), blobs(seed + 1, 1)

    task = Adaptation("tiny", "turned", ORIGIN, turned, Training(steps=7, batch=16, lr=0.02))
    return replace(task, **changes)


def moment_of(task: Adaptation, seed: int, cache: Path | None = None) -> Moment:
    return at_the_moment(task, *trained_on_first(task.origin, seed, cache), seed)


def plan(*tasks: Adaptation, networks: int = 2) -> Plan:
    return replace(adaptation.plan(tasks, networks, 2), workers=1)


def plainly(task: Adaptation, moment: Moment, seed: int, site: int, order: int) -> list[float]:
    """Insert with the library and train as a user would; the three losses."""
    model = copy.deepcopy(moment.model)
    new = list(model.parameters()) if not task.frozen else []
    if site >= 0:
        blocks = copy.deepcopy(moment.blocks)
        named = [cg.Candidate(str(k), block) for k, block in enumerate(blocks)]
        problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), [moment.data], named)
        record = cg.insert(model, cg.solve(problem, cg.Fixed(site)))
        new += [parameter for _, parameter in record.new_parameters(model)]
    if new:
        optimizer, generator = torch.optim.Adam(new, 0.02), torch.Generator().manual_seed(order)
        rows: list[torch.Tensor] = []
        for _ in range(7):
            rows = rows or list(torch.randperm(48, generator=generator).split(16))
            x, y = (part[rows[0]] for part in moment.data)
            rows = rows[1:]
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        parts = (moment.data, moment.held_out, moment.old)
        return [nn.CrossEntropyLoss()(model(x), y).item() for x, y in parts]


@pytest.mark.parametrize("frozen", [True, False])
def test_outcomes_are_those_of_networks_that_were_really_grown(frozen: bool) -> None:
    task = tiny(frozen=frozen)
    moment = moment_of(task, 3)
    found = outcomes(task, moment, seed=3, runs=2)
    assert found.shape == (3, 2, 3)
    for site in (-1, 0, 1):
        for order in range(2):
            expected = plainly(task, moment, 3, site, 4_000 + order)
            assert found[site, order] == pytest.approx(expected, rel=1e-9)
    assert (found[-1, 0] == found[-1, 1]).all() == frozen


def test_the_moment_is_that_of_a_network_trained_on_its_first_task(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    moment = moment_of(tiny(), 3, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    model, (x, y), _ = begin(3)
    before = nn.CrossEntropyLoss()(model(x), y)
    assert nn.CrossEntropyLoss()(moment.model(x), y) < 0.9 * before
    assert not any(p.requires_grad for p in moment.model.parameters())
    assert all(p.requires_grad for block in moment.blocks for p in block.parameters())
    again = moment_of(tiny(), 3, tmp_path)
    torch.testing.assert_close(again.model.state_dict(), moment.model.state_dict())
    assert len(list(tmp_path.iterdir())) == 1


def test_another_setting_has_another_file() -> None:
    moment = moment_of(tiny(), 3)
    keys = {
        key(tiny(), moment, 3, 2),
        key(tiny(), moment, 3, 3),
        key(tiny(frozen=False), moment, 3, 2),
        key(tiny(training=Training(8, 16, 0.02)), moment, 3, 2),
        key(tiny(), replace(moment, blocks=layers(moment.model)), 3, 2),
        key(tiny(), replace(moment, held_out=moment.data), 3, 2),
    }
    assert len(keys) == 6
    assert key(tiny(), moment_of(tiny(), 3), 3, 2) in keys


def test_regrets_are_those_of_the_losses() -> None:
    arms = [arm for arm in adaptation.ARMS if arm.name in ("Frobenius", "first site", "nothing")]
    found = run(replace(plan(tiny(), tiny(name="all", frozen=False)), arms=arms))
    assert list(found["means"])[:3] == ["all", "old weights frozen", "all weights trained"]
    for name, group in (("tiny", "old weights frozen"), ("all", "all weights trained")):
        losses = np.array(found["details"][name]["losses"])
        assert losses.shape == (3, 2, 2, 3)
        row = found["tasks"][name]["first site"]
        for measure, of in ((0, ""), (1, "held_out_")):
            against = Yardstick.of(losses[:-1, ..., measure])
            chosen = losses[0, :, :, measure].mean(1)
            expected = estimate(resampled_regret(chosen, against, 1_000))
            for content in (row, found["means"][group]["first site"]):
                assert content[f"{of}regret"] == pytest.approx(expected.value)
                interval = content[f"{of}interval"]
                assert interval == pytest.approx([expected.low, expected.high])
        assert found["tasks"][name]["nothing"]["old"] == pytest.approx(losses[-1, ..., 2].mean())
    moment = moment_of(tiny(), 1)
    problem = cg.GrowthProblem(
        moment.model,
        nn.CrossEntropyLoss(),
        [moment.data],
        [cg.Candidate(str(k), block) for k, block in enumerate(moment.blocks)],
    )
    asked = cg.solve(problem, cg.TopK(1), norm=cg.norms.Frobenius()).decision.chosen
    assert asked == (str(found["details"]["tiny"]["rules"]["Frobenius"]["sites"][1]),)


def test_the_command_writes_numbers_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shifts, "QUICK", plan(tiny()))
    file = tmp_path / "shifts.json"
    arguments = ["bench", "decisions", "--family", "Shifts", "--quick"]
    arguments += ["--json", str(file), "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    first = json.loads(file.read_text())
    assert list(first["tasks"]["tiny"]) == [arm.name for arm in adaptation.ARMS]
    table = (tmp_path / "constrained-growth-bench-decisions-shifts-quick-0.txt").read_text()
    assert "old weights frozen (1), held out" in table
    monkeypatch.setattr(adaptation, "outcomes", None)  # everything is there already
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert json.loads(file.read_text()) == first
    with refused(cg.GrowthError, "networks=1"):
        run(plan(tiny(), networks=1))


# --- shifts -----------------------------------------------------------------------------------


def test_shifts_change_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_FASHION", tmp_path / "absent")
    shifts._parts.cache_clear()
    _, learnt, held_out = shifts._parts(0)
    flat = [{tuple(row) for row in part[0].flatten(1).tolist()} for part in shifts._parts(0)]
    assert not flat[0] & flat[1]
    assert not flat[1] & flat[2]
    assert learnt[0].shape[1:] == (1, 8, 8)
    for name, (_, shift) in shifts.SHIFTS.items():
        (x, y), (other, labels) = shifts._shifted(shift, 0)
        changed = not torch.equal(x, learnt[0]) and not torch.equal(other, held_out[0])
        assert changed == (name not in ("permuted", "merged"))
        assert x.shape == learnt[0].shape
        classes = [{int(v) for v in y[learnt[1] == c]} for c in range(10)]
        assert all(len(found) == 1 for found in classes)
        of = [found.pop() for found in classes]
        assert labels.tolist() == [of[c] for c in held_out[1].tolist()]
        assert len(set(of)) == (5 if name == "merged" else 10)
        assert (of == list(range(10))) == (name not in ("permuted", "merged"))
    shifts._parts.cache_clear()


def test_fashion_mnist_is_read_from_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pixels = torch.randint(256, (60, 28, 28), dtype=torch.uint8)
    labels = (torch.arange(60) % 10).to(torch.uint8)
    for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        content = bytes(header) + values.numpy().tobytes()
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data, "_FASHION", tmp_path)
    data._fashion.cache_clear()
    split = data.images(1)
    data._fashion.cache_clear()
    assert split.x_train.shape == (30, 196)
    x = torch.cat([split.x_train, split.x_test])
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-5)
    means = pixels.float().unflatten(1, (14, 2)).unflatten(3, (14, 2)).mean((2, 4)).flatten(1)
    for label in range(10):
        ours = x[torch.cat([split.y_train, split.y_test]) == label]
        expected = (means[labels == label] - means.mean()) / means.std()
        torch.testing.assert_close(ours[ours[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize("task", shifts.ORIGINS, ids=lambda origin: origin.name)
def test_layers_of_the_image_networks_start_as_the_identity(task: Origin) -> None:
    torch.manual_seed(0)
    model, (x, _), _ = task.begin(0)
    old, new = list(model), task.blocks(model)
    assert len(new) == len(old) - 1
    for site, block in enumerate(new):
        grown = nn.Sequential(*old[: site + 1], block, *old[site + 1 :])
        assert torch.equal(grown(x[:5]), model(x[:5]))
        assert grown(x[:5]).shape == (5, 10)


# --- expansions -------------------------------------------------------------------------------


def test_copies_of_blocks_start_as_the_identity_and_keep_the_rest() -> None:
    torch.manual_seed(0)
    model, (x, y), _ = expansions.ORIGINS[0].begin(0)
    old = list(model)
    for site, block in enumerate(expansions.ORIGINS[0].blocks(model)):
        grown = nn.Sequential(*old[: site + 1], block, *old[site + 1 :])
        assert torch.equal(grown(x[:2]), model(x[:2]))
        kept = old[max(1, site)].get_parameter("qkv.weight")
        torch.testing.assert_close(block.get_parameter("qkv.weight"), kept)
    assert torch.equal(x[0, 1:], y[0, :-1])


def test_texts_are_what_they_say() -> None:
    (x, _), _ = expansions._adapted("alphabet", 4)
    (plain, _), _ = expansions._pieces(data.text("english"), 4, len(x))
    pairs = set(zip(plain.flatten().tolist(), x.flatten().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 50
    shown = {
        name: "".join(chr(32 + n) for n in data.text(name).tolist()) for name in expansions.TEXTS
    }
    assert "def __init__(self" in shown["program"]
    assert "Tensor" in shown["register"]
