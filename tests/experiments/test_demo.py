import copy
import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments import demo, demo_report
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.data import digits
from constrained_growth.experiments.demo import CHANGES, KEPT, Setting, gain, run_demo
from constrained_growth.experiments.tables import to_json

TINY = Setting(channels=2, blocks=2, batch=32, steps_before=6, steps_after=6, every=3)


@pytest.fixture(scope="module")
def result():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the tests' own, which a module's fixture precedes
    try:
        return run_demo(runs=2, setting=TINY, workers=1)
    finally:
        torch.set_default_dtype(before)


def test_the_network_without_a_layer_trains_its_last_layer_alone(result):
    """The same steps written out by hand: training, freezing, Adam on inverted images."""
    split = digits(0, dtype=torch.float64)
    known, fresh = len(split.x_train) // 2, len(split.x_train) * 5 // 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = demo.network(TINY)

    def steps(x, y, parameters):
        optimizer = torch.optim.Adam(parameters, lr=TINY.learning_rate)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = TINY.learning_rate * min(1.0, (6 - step) / 2)
            rows = order[32 * step : 32 * step + 32]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    steps(split.x_train[:known], split.y_train[:known], model.parameters())
    body = copy.deepcopy(model[:-1].state_dict())

    def loss():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(-split.x_test), split.y_test).item()

    begin = loss()
    steps(-split.x_train[known:fresh], split.y_train[known:fresh], model[-1].parameters())
    found = result["runs"][0]["losses"][KEPT]
    assert (found[0], found[-1]) == pytest.approx((begin, loss()), rel=1e-12)
    assert all(torch.equal(value, body[name]) for name, value in model[:-1].state_dict().items())


def test_a_layer_is_trained_at_every_place_and_inserting_moves_nothing(result):
    for run in result["runs"]:
        places = [place["name"] for place in run["places"]]
        assert places == ["after the stem", "after block 1", "after block 2"]
        assert list(run["losses"]) == [KEPT, *places]
        assert all(len(losses) == 3 for losses in run["losses"].values())
        begins = [losses[0] for losses in run["losses"].values()]
        assert begins == pytest.approx([begins[0]] * 4, rel=1e-12)
        assert len({losses[-1] for losses in run["losses"].values()}) == 4
        assert run["chosen"] in (None, run["best"])
        sizes = {place["name"]: place["sensitivity"] for place in run["places"]}
        assert sizes[run["best"]] == max(sizes.values())
        assert list(run["known_images"]["losses"]) == [KEPT, run["known_images"]["best"]]


def test_the_run_with_the_median_gain_is_shown(result):
    gains = [gain(run) for run in result["runs"]]
    assert gains[result["median"]] == min(gains)


def test_changes_keep_the_pixels_and_differ():
    image = torch.arange(64.0).view(1, 8, 8)
    changed = {name: change(image) for name, change in CHANGES.items()}
    assert torch.equal(changed["inverted"], -image)
    assert changed["rotated"][0, 0].tolist() == list(range(7, 64, 8))
    assert changed["mirrored"][0, 0].tolist() == list(range(7, -1, -1))
    with pytest.raises(cg.DataError, match="change='faded' is none of inverted, rotated"):
        run_demo("faded")


def described(chosen, ends, known=None):
    """A run with these losses at the end, as far as the account reads it."""
    losses = {name: [9.0, end] for name, end in ends.items()}
    again = {"chosen": known, "best": "a", "losses": {KEPT: [1.0, 0.5], "a": [1.0, 0.4]}}
    return {"seed": 0, "chosen": chosen, "best": "a", "losses": losses, "known_images": again}


def test_the_account_counts_what_happened():
    runs = [
        described("a", {KEPT: 1.0, "a": 0.2, "b": 0.1, "c": 0.5}),  # below the mean of the others
        described("a", {KEPT: 1.0, "a": 0.4, "b": 0.1, "c": 0.5}),  # below the worst alone
        described("a", {KEPT: 1.0, "a": 2.0, "b": 0.1, "c": 0.5}, known="a"),  # it did not help
        described(None, {KEPT: 1.0, "a": 0.2, "b": 0.1, "c": 0.5}),
    ]
    text = demo_report.account({"runs": runs})
    assert "Of 4 networks (seeds 0 to 0" in text
    assert "3 got a layer, which helped 2" in text
    assert "mean of the other places in 1, than the worst of them in 2" in text
    assert "3 got none, where one would have gained 0.100 nats" in text
    assert gain(runs[2]) == -1.0
    assert gain(runs[3]) == 0.0
    assert demo_report.verdict(runs[3]) == "Nothing was inserted: 1.000 nats on test images."
    assert "0.200 with one a, 0.100 to 0.500" in demo_report.verdict(runs[0])


def test_json_holds_the_result_and_no_nan(result):
    run = result["runs"][0] | {"agreement": math.nan}
    content = json.loads(to_json(result | {"runs": [run]}), parse_constant=pytest.fail)
    assert content["runs"][0]["agreement"] is None
    assert content["runs"][0]["losses"] == result["runs"][0]["losses"]


def test_the_command_writes_the_same_numbers_and_a_picture(result, tmp_path, monkeypatch):
    before = torch.get_rng_state()
    monkeypatch.setattr(demo, "Setting", lambda: TINY)
    out, file = tmp_path / "new" / "folder", tmp_path / "numbers.json"
    arguments = ["demo", "--change", "inverted", "--runs", "1"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text())
    assert content["runs"] == json.loads(to_json(result["runs"][:1]))
    assert torch.equal(torch.get_rng_state(), before)
    shown = " ".join(ran.output.split())
    assert demo_report.account(content) in shown
    assert demo_report.verdict(content["runs"][content["median"]]) in shown
    assert f"The picture is {out / 'constrained-growth-demo-inverted-0.png'}" in ran.output
    image = imread(out / "constrained-growth-demo-inverted-0.png")
    assert image.shape[:2] == (864, 1760)
    assert image[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--change", "faded"], "faded"),
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
