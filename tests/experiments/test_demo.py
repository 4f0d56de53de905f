import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments import demo_report as report
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.data import two_spirals
from constrained_growth.experiments.demo import DATA, SETTINGS, on_plateau, run_demo
from constrained_growth.experiments.tables import to_json


def tiny(seed=0, data="spirals", **kwargs):
    options = {
        "rule": cg.TopK(1),
        "max_epochs": 12,
        "epochs_after": 7,
        "dtype": torch.float64,
    } | kwargs
    return run_demo(data, seed, **options)


@pytest.fixture(scope="module")
def result():
    return tiny()


def test_the_network_that_is_kept_is_trained_by_plain_gradient_descent(result):
    """The same 19 steps written out by hand, without interruption."""
    split, setting = two_spirals(0, dtype=torch.float64), SETTINGS["spirals"]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # PyTorch's own initialisation, in the default float64
        model = nn.Sequential(
            nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        )
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(split.x_train), split.y_train)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= setting.learning_rate * gradient
    assert result["losses_before"] == pytest.approx(losses[:13], rel=1e-12)
    assert result["losses_kept"] == pytest.approx(losses[12:], rel=1e-12)
    assert result["kept_at_end"]["train_loss"] == pytest.approx(losses[-1], rel=1e-12)


@pytest.mark.parametrize("data", list(DATA))
def test_the_insertion_does_not_move_the_loss(data):
    found = tiny(data=data)
    assert found["chosen"]
    before, after = found["kept_at_insertion"], found["grown_at_insertion"]
    assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-12)
    assert after["test_accuracy"] == before["test_accuracy"]
    assert found["losses_grown"][0] == pytest.approx(found["losses_before"][-1], rel=1e-12)
    added = sum(row["added"] for row in found["candidates"] if row["name"] in found["chosen"])
    assert after["parameters"] == before["parameters"] + added
    assert found["grown_at_end"]["train_loss"] != found["kept_at_end"]["train_loss"]


def test_the_largest_sensitivity_is_chosen(result):
    largest = max(result["candidates"], key=lambda row: row["sensitivity"])
    assert result["chosen"] == (largest["name"],)
    assert [row["site"] for row in result["candidates"]] == ["1", "1", "3", "3"]


@pytest.mark.parametrize("data", list(DATA))
def test_without_an_insertion_both_networks_go_the_same_way(data):
    """Also with momentum: the copy of the optimizer has the memory of the first."""
    found = tiny(data=data, rule=cg.Threshold(absolute=1e3))
    assert found["chosen"] == ()
    assert found["losses_grown"] == found["losses_kept"]
    assert found["losses_kept"] == tiny(data=data)["losses_kept"]


def test_same_seed_same_result(result):
    assert tiny() == result
    assert tiny(seed=1)["losses_before"] != result["losses_before"]


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    tiny()
    assert torch.equal(torch.get_rng_state(), before)


def test_training_stops_on_a_plateau():
    assert on_plateau([1.0, 0.5, 0.49, 0.48], window=2, tolerance=0.05)
    assert not on_plateau([1.0, 0.5, 0.4, 0.3], window=2, tolerance=0.05)
    assert not on_plateau([1.0, 1.0], window=2, tolerance=0.05)
    assert on_plateau([1.0, 0.5, 5.0, 5.0], window=2, tolerance=0.05)


def test_unknown_data_are_refused():
    with pytest.raises(cg.DataError, match="data='moons' is none of digits, spirals"):
        run_demo("moons")


def test_json_holds_the_result_and_no_nan(result):
    content = json.loads(to_json(result | {"stationarity": math.nan}), parse_constant=pytest.fail)
    assert content["stationarity"] is None
    assert content["losses_grown"] == result["losses_grown"]
    assert content["candidates"][0]["name"] == "identity 1"


@pytest.mark.parametrize(
    ("grown", "kept", "words"),
    [
        (0.05, 0.1, "50% lower"),
        (0.12, 0.1, "20% higher"),
        (0.4, 0.1, "4 times as high"),
        (0.1, 0.1, "next to no difference"),
        (0.0, 0.0, "next to no difference"),
        (0.1, 0.0, "higher"),
        (math.nan, 0.1, "training diverged"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(result, grown, kept, words):
    changed = result | {
        "grown_at_end": result["grown_at_end"] | {"train_loss": grown},
        "kept_at_end": result["kept_at_end"] | {"train_loss": kept},
    }
    assert f"without: {words}." in report.verdict(changed)
    assert "one run with one seed" in report.verdict(changed)


def test_the_verdict_when_nothing_is_inserted(result):
    nothing = result | {"chosen": ()}
    assert report.verdict(nothing).startswith("Nothing was inserted")
    assert report.picture(nothing).texts[0].get_text().startswith("Nothing was inserted")


def test_the_verdict_mentions_a_jump(result):
    jumped = result | {"losses_grown": [0.5, 3.0, 0.4]}
    assert "jumped to 3:" in report.verdict(jumped)
    assert "jumped" not in report.verdict(result)


def test_the_command_writes_picture_and_numbers(tmp_path):
    out, file = tmp_path / "new" / "folder", tmp_path / "numbers.json"
    arguments = ["demo", "--data", "spirals", "--epochs", "15", "--seed", "3"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text())
    expected = run_demo("spirals", 3, max_epochs=15, epochs_after=15)
    assert content == json.loads(to_json(expected))
    decision = ", ".join(content["chosen"]) or "nothing"
    assert f"Decision: insert {decision}" in ran.output
    assert "This is one run with one seed" in " ".join(ran.output.split())
    assert f"The picture is {out / 'constrained-growth-demo.png'}" in ran.output
    image = imread(out / "constrained-growth-demo.png")
    assert image.shape[:2] == (864, 1760)
    assert image[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "moons"], "moons"),
        (["--out", "{file}/folder"], "cannot write into"),
        (["--json", "{folder}"], "is a folder; give the name of a file"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(tmp_path, arguments, message):
    file = tmp_path / "file"
    file.touch()
    given = [argument.format(file=file, folder=tmp_path) for argument in arguments]
    ran = CliRunner().invoke(app, ["demo", *given])
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert ran.stdout == ""


def test_every_data_set_has_a_setting():
    assert list(DATA) == list(SETTINGS)
