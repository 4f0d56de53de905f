"""The source's experiments: their runs against plain loops, their statistics against SciPy."""

import copy
import dataclasses
import functools
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from rich.console import Console
from scipy import stats
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments import figures, statistics
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.data import two_spirals
from constrained_growth.experiments.ensembles.networks import ensemble, samples
from constrained_growth.experiments.ensembles.training import Shuffle
from constrained_growth.experiments.reproduction import protocols, report
from constrained_growth.experiments.reproduction import reproduce as reproduction
from constrained_growth.experiments.reproduction import runs as referee
from constrained_growth.experiments.reproduction.protocols import (
    EXPERIMENTS,
    FAMILIES,
    Count,
    Reference,
    on_images,
)
from constrained_growth.experiments.reproduction.recommendation import recommended
from constrained_growth.experiments.reproduction.report import account
from constrained_growth.experiments.reproduction.reproduce import reproduce
from constrained_growth.experiments.reproduction.runs import Runs
from constrained_growth.experiments.tables import to_json
from constrained_growth.training import NewLayers

LOSS = nn.CrossEntropyLoss()
NO_SITES = (nn.Linear, nn.Conv2d, nn.Flatten, nn.Unflatten)


def few_points(seed):
    return two_spirals(seed, points_per_class=24)


def tiny(name="Exp9", **changes):
    """An experiment of twelve epochs on few points."""
    settings = {"before": 5, "after": 7, "times": (), "data": few_points, "factor": 0.5}
    return dataclasses.replace(EXPERIMENTS[name], **(settings | changes))


def plain(experiment, seed, widths, inputs=2, outputs=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[experiment.family].build(inputs, widths, outputs).double()


def plain_loop(experiment, model, seed, epochs, rate):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    return loop_with(optimizer, experiment, model, seed, epochs)


def loop_with(optimizer, experiment, model, seed, epochs):
    split = experiment.data(seed)
    x, y = split.x_train.double(), split.y_train
    losses = []
    for epoch in epochs:
        order = Shuffle((seed,))(epoch, len(x))[0] if experiment.batch else torch.arange(len(x))
        found = []
        for rows in order.split(experiment.batch or len(x)):
            optimizer.zero_grad()
            loss = LOSS(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(sum(found) / len(found))
    return losses


def changed(experiment, seed, widths):
    """Nothing inserted, but the learning rate changed."""
    model = plain(experiment, seed, widths)
    losses = plain_loop(experiment, model, seed, range(experiment.before), experiment.lr)
    after = range(experiment.before, experiment.epochs)
    return losses + plain_loop(experiment, model, seed, after, experiment.lr * experiment.factor)


def grown(experiment, seed, best):
    """The losses of a plain loop that inserts where ‖λ_W‖ is largest, or smallest."""
    model, family = plain(experiment, seed, experiment.widths), FAMILIES[experiment.family]
    losses = plain_loop(experiment, model, seed, range(experiment.before), experiment.lr)
    split = experiment.data(seed)
    sites = [name for name, m in model.named_children() if not isinstance(m, NO_SITES)]
    candidates = [cg.Candidate(s, family.block(experiment.widths[0]).double()) for s in sites]
    data = [(split.x_train.double(), split.y_train)]
    problem = cg.GrowthProblem(model, LOSS, data, candidates)

    def rule(sensitivities):
        return cg.Decision((best(sensitivities, key=lambda name: sensitivities[name].value),))

    norm = lambda multiplier: multiplier[family.selected].norm()  # noqa: E731
    cg.insert(model, cg.solve(problem, rule, norm=norm))
    after = range(experiment.before, experiment.epochs)
    return losses + plain_loop(experiment, model, seed, after, experiment.lr * experiment.factor)


@pytest.mark.parametrize(
    ("family", "batch"),
    [*((family, None) for family in FAMILIES), ("relu", 10), ("residual-outer", 10)],
)
def test_every_arm_is_what_a_plain_loop_gives(family, batch):
    experiment = tiny(family=family, batch=batch, widths=(4, 4), lr=0.1)
    found, seeds = reproduce(experiment, (3, 4, 5)), (3, 4, 5)
    assert found.samples == 36
    for row, seed in enumerate(seeds):
        expected = {
            "LImax": grown(experiment, seed, max),
            "LImin": grown(experiment, seed, min),
            "N1lr": changed(experiment, seed, (4, 4)),
            "N2lr": changed(experiment, seed, (4, 4, 4)),
        }
        for name, widths in {"N1": (4, 4), "N2": (4, 4, 4, 4), "N2fix": (4, 4, 4)}.items():
            model = plain(experiment, seed, widths)
            epochs = range(experiment.epochs)
            expected[name] = plain_loop(experiment, model, seed, epochs, experiment.lr)
        for name, losses in expected.items():
            np.testing.assert_allclose(found.arms[name].loss[:, row], losses, rtol=0, atol=1e-12)
    chosen = found.sensitivities.argmax(1)
    assert found.arms["LImax"].site.tolist() == chosen.tolist()
    assert found.arms["LImin"].site.tolist() == (1 - chosen).tolist()


def test_the_library_is_asked_as_a_user_would_ask_it():
    """Three batches in each of nine epochs: the warm-up over 20 steps comes to its end."""
    experiment = tiny(batch=13, before=5, after=9)
    found = reproduce(experiment, range(4))
    runs = found.arms["recommended"]
    for seed in range(4):
        model = plain(experiment, seed, (4, 4))
        optimizer = torch.optim.SGD(model.parameters(), experiment.lr)
        loop_with(optimizer, experiment, model, seed, range(5))
        split = experiment.data(seed)
        candidates = [
            cg.Candidate(s, cg.blocks.IdentityLinear(4, nn.ReLU()).double()) for s in ("1", "3")
        ]
        data = [(split.x_train.double(), split.y_train)]
        problem = cg.GrowthProblem(model, LOSS, data, candidates)
        solution = cg.solve(problem)
        before = {id(parameter) for parameter in model.parameters()}
        cg.insert(model, solution, optimizer=optimizer)
        new = [name for name, p in model.named_parameters() if id(p) not in before]
        assert [name.rpartition(".")[2] for name in new] == ["weight", "bias"]
        NewLayers().attach(model, optimizer, new)
        assert solution.decision.chosen == (("1", "3")[runs.site[seed]],)
        losses = loop_with(optimizer, experiment, model, seed, range(5, 14))
        np.testing.assert_allclose(runs.loss[5:, seed], losses, rtol=0, atol=1e-12)


def test_the_library_may_say_that_nothing_is_to_be_inserted():
    """One says no, the others name different sites."""
    seeds, experiment = range(3), tiny()
    models = [plain(experiment, seed, (4, 4)) for seed in seeds]
    splits = [few_points(seed) for seed in seeds]
    data = samples([s.x_train.double() for s in splits], [s.y_train for s in splits])
    answers = iter(((), ("3",), ("1",)))
    begun = ensemble(models)
    block = FAMILIES["relu"].block
    sites, starts = recommended(
        begun,
        data,
        copy.deepcopy(models),
        block,
        lambda problem: cg.solve(problem, lambda _: cg.Decision(next(answers))),
    )
    assert sites.tolist() == [-1, 1, 0]
    assert torch.equal(starts[0], begun.parameters[0])
    assert [len(start) - len(starts[0]) for start in starts] == [0, 20, 20]


def test_later_insertions_start_from_the_kept_network():
    experiment = tiny(times=(2, 5, 9))
    found = reproduce(experiment, range(3))
    for epoch, runs in found.inserted_at.items():
        assert np.array_equal(runs.loss[:epoch], found.arms["N1"].loss[:epoch])
        moved = runs.loss[epoch + 1 :] != found.arms["N1"].loss[epoch + 1 :]
        assert moved.any(axis=0).all()
        for seed in range(3):
            alone = dataclasses.replace(experiment, before=epoch, after=12 - epoch, times=())
            losses = grown(alone, seed, max)
            np.testing.assert_allclose(runs.loss[:, seed], losses, rtol=0, atol=1e-12)
    assert found.inserted_at[5] is not found.arms["N1"]
    assert np.array_equal(found.inserted_at[5].loss, found.arms["LImax"].loss)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "TRACE", 4)
    run = functools.partial(reproduce, workers=1)
    experiment = tiny(times=(3,), chunk=2)
    at_once = run(experiment, range(5))
    honest = reproduction._run

    def interrupted(experiment, seeds, *rest):
        if 2 in seeds:
            raise KeyboardInterrupt
        return honest(experiment, seeds, *rest)

    monkeypatch.setattr(reproduction, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, range(5), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    seen = []
    monkeypatch.setattr(
        reproduction, "_run", lambda e, s, *r: (seen.append(s), honest(e, s, *r))[1]
    )
    resumed = run(experiment, range(5), cache=tmp_path)
    assert seen == [(2, 3), (4,)]
    assert len(list(tmp_path.iterdir())) == 3
    reproduction.forget(experiment, range(5), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert resumed.seeds == at_once.seeds == tuple(range(5))
    assert resumed.samples == at_once.samples
    ours, theirs = (
        [*found.arms.items(), *found.inserted_at.items()] for found in (resumed, at_once)
    )
    for (name, runs), (expected, others) in zip(ours, theirs, strict=True):
        assert name == expected
        for part in dataclasses.fields(Runs):
            assert np.array_equal(getattr(runs, part.name), getattr(others, part.name))
    for name in ("sensitivities", "trace", "trace_epochs"):
        assert np.array_equal(getattr(resumed, name), getattr(at_once, name))


def test_a_run_does_not_depend_on_its_company():
    experiment = tiny(batch=10)
    together, alone = reproduce(experiment, range(4)), reproduce(experiment, (2, 9))
    for name, runs in alone.arms.items():
        expected = together.arms[name].loss[:, 2]
        np.testing.assert_allclose(runs.loss[:, 0], expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def found():
    """Three seeds of a tiny experiment."""
    return reproduce(tiny(), range(3))


def test_single_precision_is_single_precision_and_random_state_is_left_alone():
    before = torch.get_rng_state()
    found = reproduce(tiny(), range(2), dtype=torch.float32)
    losses = found.arms["LImax"].loss
    assert np.array_equal(losses.astype(np.float32), losses)
    exact = reproduce(tiny(), range(2)).arms["LImax"].loss
    np.testing.assert_allclose(losses, exact, rtol=0, atol=1e-5)
    assert (losses != exact).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_protocols_are_those_of_the_source():
    table = {
        "Exp6": ("relu", (5,), 0.2, 1.0, 450, 1400, None),
        "Exp8": ("relu", (5,), 0.2, 0.8, 450, 1400, None),
        "Exp9": ("relu", (4, 4), 0.2, 1.0, 450, 1400, None),
        "Exp10": ("relu", (4, 4), 0.2, 0.8, 150, 3850, None),
        "Exp11": ("residual-outer", (3, 3), 0.1, 1.0, 450, 1400, None),
        "Exp14": ("residual-outer", (3, 3, 3), 0.1, 0.7, 450, 1400, None),
        "Exp151": ("relu", (5,), 0.01, 1.0, 450, 1400, 45),
        "Exp25": ("relu", (10, 10), 0.01, 2.0, 250, 300, 45),
    }
    assert list(table) == list(EXPERIMENTS)
    for name, settings in table.items():
        e = EXPERIMENTS[name]
        assert (e.family, e.widths, e.lr, e.factor, e.before, e.after, e.batch) == settings
        split = e.data(0)
        assert (len(split.x_train), len(split.x_test)) == (450, 150)
    assert EXPERIMENTS["Exp8"].times == EXPERIMENTS["Exp10"].times
    assert EXPERIMENTS["Exp8"].times == (150, 250, 350, 450, 550, 650, 750, 850)


def test_residual_networks_have_one_layer_and_then_blocks():
    model = plain(EXPERIMENTS["Exp14"], 0, (3, 3, 3))
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Linear", "Tanh", "ResidualMLP", "ResidualMLP", "Linear"]
    assert all(p.abs().max() > 0 for p in model.parameters())
    block = FAMILIES["residual-outer"].block(3)
    assert torch.equal(block.get_parameter("inner.weight"), 0.8 * torch.eye(3))
    assert not block.get_parameter("inner.bias").any()
    assert not block.get_parameter("outer.weight").any()


def made(loss, *, site=0, trained=None, operations=(20, 45, 90)):
    loss = np.array(loss, dtype=float)
    seeds = loss.shape[1]
    return Runs(
        loss,
        np.ones_like(loss),
        np.full(seeds, len(loss)) if trained is None else np.array(trained),
        np.full(seeds, site),
        np.array(operations),
    )


def test_savings_are_those_that_the_source_names():
    assert referee.saved(EXPERIMENTS["Exp6"], 20, 45) == pytest.approx(0.135, abs=5e-4)
    assert referee.saved(EXPERIMENTS["Exp9"], 32, 48) == pytest.approx(0.081, abs=5e-4)


def test_work_is_counted():
    """By hand: 3 passes a step, 20 products before and 45 after the insertion at epoch 1."""
    experiment = dataclasses.replace(EXPERIMENTS["Exp6"], before=1, after=2)
    runs = made([[1.0, 1.0]] * 3, trained=[3, 2])
    choice = 7 * 90
    expected = [[0, 0], [420, 420], [420 + 945 + choice] * 2, [2310 + choice, 1365 + choice]]
    assert referee.work(runs, experiment, 7).tolist() == expected
    kept = made([[1.0]] * 3, site=-1, operations=(20, 20, 0))
    assert referee.work(kept, experiment, 7).ravel().tolist() == [0, 420, 840, 1260]
    early = made([[1.0]] * 3, trained=[1])
    assert referee.work(early, experiment, 7).ravel().tolist() == [0, 420, 420, 420]
    none = made([[1.0]] * 3, site=-1, operations=(20, 45, 90))
    assert referee.work(none, experiment, 7).ravel().tolist() == [0, 420, 840, 1260]


def test_the_choice_of_a_site_is_counted_by_hand(found):
    """Exp9: 32 products forward and as many backward, two of 4 × 4 at each of the two sites."""
    arms = found.arms
    assert arms["LImax"].operations.tolist() == [32, 48, 64 + 64]
    assert arms["N1"].operations.tolist() == [32, 32, 0]
    assert arms["N2"].operations.tolist() == [64, 64, 0]
    assert arms["N2fix"].operations.tolist() == [48, 48, 0]


def test_levels_are_reached_where_the_loss_first_is_there():
    runs = made([[0.9, 0.9, 0.3], [0.5, 0.8, 0.9], [0.6, 0.7, 0.2]])
    assert referee.reached(runs, 0.5).tolist() == [1, math.inf, 0]
    spent = np.array([[0.0, 0, 0], [10, 20, 30], [11, 21, 31], [12, 22, 32]])
    assert referee.reached(runs, 0.5, spent).tolist() == [10, math.inf, 0]


def test_final_losses_and_drops():
    loss = np.arange(24.0).reshape(12, 2)[::-1]
    runs = made(loss)
    assert referee.final_loss(runs).tolist() == loss[2:].mean(0).tolist()
    assert referee.drop(runs, 3, 2).tolist() == [4, 4]
    assert referee.drop(runs, 0, 11).tolist() == [22, 22]


def test_pairs_are_tested_as_scipy_tests_them():
    draw = np.random.default_rng(3)
    first, second = draw.normal(0.3, 1, 40), draw.normal(0, 1, 40)
    first[:3] = second[:3]
    found, difference = statistics.paired(first, second), first - second
    assert found.mean == pytest.approx(difference.mean())
    assert found.median == pytest.approx(np.median(difference))
    expected: Any = stats.wilcoxon(first, second)
    assert found.p == expected.pvalue
    assert (found.smaller, found.equal, found.runs) == ((difference < 0).sum(), 3, 40)
    normal = difference.mean() + np.array([-1.96, 1.96]) * difference.std() / math.sqrt(40)
    assert found.interval == pytest.approx(normal, abs=0.06)
    low, high = found.median_interval
    assert low < found.median < high
    same = statistics.paired(first, first)
    assert (same.mean, same.interval, same.p, same.equal) == (0, (0, 0), 1, 40)
    shifted = statistics.paired(np.full(5, 2.0), np.full(5, 1.5))
    assert (shifted.interval, shifted.p) == ((0.5, 0.5), 0.0625)


def test_agreement_is_the_normal_test_where_that_is_right():
    """Means of normal samples: p is that of the z-test with both sampling errors."""
    ours = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    for known in (0.1, 0.4):
        found = statistics.agreement(ours, 30, known, None)
        z = known / math.sqrt(1 / 30 + 1 / 200)
        assert found["mean"] == pytest.approx(2 * stats.norm.sf(z), abs=0.02)
        assert found["median"] is None
    shifted = statistics.agreement(ours, 30, 2.0, 2.0)
    assert shifted["mean"] is not None
    assert shifted["median"] is not None
    assert max(shifted["mean"], shifted["median"]) < 1e-3


def test_counts_are_compared_by_fishers_exact_test():
    """9 of 10 against 2 of 10: hypergeometric probabilities of what is as rare or rarer."""
    weights = [math.comb(10, k) * math.comb(10, 11 - k) for k in range(1, 11)]
    tail = sum(w for w in weights if w <= math.comb(10, 9) * math.comb(10, 2))
    assert statistics.same_share(9, 10, 2, 10) == pytest.approx(tail / sum(weights))
    assert statistics.same_share(5, 10, 10, 20) == 1


@pytest.fixture
def small_protocols(monkeypatch):
    """Twelve epochs in place of thousands."""
    reference = {"LImax": Reference(30, 0.6, 0.6, (0.5, 0.7)), "N2": Reference(20, 0.5)}
    counts = (Count(("LImax", "LImin"), 1, 74, 90),)
    small = {
        name: tiny(name, times=(3, 5), reference=reference, counts=counts)
        for name in ("Exp9", "Exp10")
    }
    monkeypatch.setattr(protocols, "EXPERIMENTS", small)
    return small


def test_a_command_of_several_experiments_repeats_none_of_them_and_writes_one_file(
    tmp_path, monkeypatch, small_protocols
):
    honest, ran = reproduction._run, []

    def interrupted(experiment, seeds, *rest):
        ran.append(experiment.name)
        if ran == ["Exp9", "Exp10"]:
            raise KeyboardInterrupt
        return honest(experiment, seeds, *rest)

    monkeypatch.setattr(reproduction, "_run", interrupted)
    file = tmp_path / "numbers.json"
    arguments = ["reproduce", "all", "--seeds", "3", "--out", str(tmp_path), "--json", str(file)]
    arguments.append("--float32")
    assert CliRunner().invoke(app, arguments).exit_code != 0
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert ran == ["Exp9", "Exp10", "Exp10"]
    assert not list(tmp_path.glob("*.joblib"))
    assert set(json.loads(file.read_text())) == {"Exp9", "Exp10"}
    assert "Exp10 recommended" in (tmp_path / "all-3-seeds-from-0-float32.txt").read_text()


def test_the_command_writes_numbers_tables_and_pictures(tmp_path, monkeypatch, small_protocols):
    monkeypatch.setattr("sys.argv", ["constrained-growth", "reproduce", "Exp9", "--seeds", "6"])
    file, out = tmp_path / "numbers.json", tmp_path / "out"
    options = ["--seeds", "6", "--seed", "2", "--json", str(file), "--out", str(out)]
    ran = CliRunner().invoke(app, ["reproduce", "eXP9", *options])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text(), parse_constant=pytest.fail)
    found = reproduce(small_protocols["Exp9"], range(2, 8))
    assert (content["experiment"], content["seeds"], content["first_seed"]) == ("Exp9", 6, 2)
    assert content["command"] == "constrained-growth reproduce Exp9 --seeds 6"
    assert set(content["arms"]) >= {"LImax", "LImin", "N1", "N2", "N2fix", "recommended"}
    for name, runs in found.arms.items():
        assert content["arms"][name]["final_loss"] == pytest.approx(
            referee.final_loss(runs), abs=1e-6
        )
        assert content["arms"][name]["test_error"] == pytest.approx(runs.test_error[-1], abs=1e-6)
    assert set(content["inserted_at"]) == {"3", "5"}
    name = "Exp9-6-seeds-from-2"
    assert {path.name for path in out.iterdir()} == {f"{name}.{e}" for e in ("json", "png", "txt")}
    assert json.loads((out / f"{name}.json").read_text()) == content
    written = (out / f"{name}.txt").read_text()
    assert "constrained-growth reproduce Exp9 --seeds 6" in written
    assert "74/90" in written
    for mean in (np.mean(content["arms"][name]["final_loss"]) for name in ("N1", "LImax")):
        assert f"{mean:.3f}" in ran.output


def written(account, width=150):
    console = Console(file=io.StringIO(), width=width)
    console.print(account)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_account_of_all_experiments_adjusts_for_their_number():
    """Five p-values, one of them small: Benjamini and Hochberg multiply the smallest by five."""
    contents = [
        {
            "experiment": name,
            "arms": {arm: {"final_loss": [0.1, 0.2, 0.6]} for arm in ("LImax", "recommended")},
            "reference": {"LImax": {"runs": 30, "mean": 0.25, "median": median}},
            "agreement": {"LImax": {"mean": p, "median": None if median is None else 0.7}},
            "counts": [{"p": 0.5}] * 2,
        }
        for name, p, median in (("A", 0.006, 0.3), ("B", 0.8, 0.3), ("C", 0.9, None))
    ]
    text = written(account(contents))
    assert "Of 5 comparisons of means and medians 1 have p < 0.05" in text
    assert "the smallest adjusted p is 0.03." in text
    assert "Of 6 comparisons of counts 0 have p < 0.05" in text
    assert "C recommended" in text
    assert text.count("0.300") == 6 + 2  # our means, and two of their medians
    assert text.count("0.200") == 6  # our medians
    assert "No counts to compare." in written(account([contents[0] | {"counts": []}]))


@pytest.mark.parametrize("end", [60, 100, 130])
def test_the_heat_map_is_of_the_run_and_ends_where_it_ends(end, found):
    content = report.numbers(found)
    traced = {"epochs": [0, 50, 100], "median": [[1.0, 10.0], [100.0, 1e3], [1e4, 1e5]]}
    times = {"before": 20, "after": end - 20}
    content |= {"trace": traced, "protocol": content["protocol"] | times}
    drawn = figures.reproduction(json.loads(to_json(content)))
    (ax,) = (ax for ax in drawn.axes if ax.get_title("left") == "the small network, kept")
    (mesh,) = ax.collections
    columns = [epoch for epoch in (0, 50, 100) if epoch < end]
    assert isinstance(mesh, QuadMesh)
    edges, colours = np.array(mesh.get_coordinates()), np.array(mesh.get_array())
    assert edges[0, :, 0].tolist() == [*columns, end]
    assert colours.T.tolist() == [[2.0 * i, 2.0 * i + 1] for i in range(len(columns))]
    assert ax.get_xlim() == (0, end)


def test_the_list_names_every_experiment():
    ran = CliRunner().invoke(app, ["reproduce", "--list"])
    assert ran.exit_code == 0
    assert all(name in ran.output for name in (*EXPERIMENTS, "images"))
    assert CliRunner().invoke(app, ["reproduce"]).output == ran.output


def test_unknown_names_are_refused():
    ran = CliRunner().invoke(app, ["reproduce", "Exp7"])
    assert ran.exit_code == 2
    assert "Exp7 is none of Exp6" in ran.stderr.replace("\n", " ")


def test_arms_are_compared_no_later_than_the_end(found):
    """Seven epochs after the insertion: after one, and at the end."""
    content = report.numbers(found)
    moments = [pair["after"] for pair in content["pairs"] if pair["arms"] == ["LImax", "N1"]]
    assert moments == [1, None]


def test_the_effort_has_no_number_where_the_median_run_never_gets_there(found):
    content = json.loads(to_json(report.numbers(found)), parse_constant=pytest.fail)
    level = content["effort"]["N1"]["levels"]["0.1"]
    assert level == {"reached": 0.0, "epochs": None, "multiply_adds": None}


def test_images_of_every_kind_have_networks_that_fit():
    for inputs, sizes in ((64, (8, 8)), (784, (14, 14)), (40, (1, 20))):
        model = plain(tiny(family="convolution"), 0, (4, 4), inputs, 10)
        assert model(torch.zeros(2, inputs)).shape == (2, 10)
        assert model[:5](torch.zeros(2, inputs)).shape == (2, 4, *sizes)


def test_images_are_reproduced_too(tmp_path, monkeypatch):
    def small(data, split):
        return [
            dataclasses.replace(e, before=1, after=2, data=lambda seed: _some(split(seed)))
            for e in on_images(data, split)
        ]

    monkeypatch.setattr(protocols, "on_images", small)
    file = tmp_path / "numbers.json"
    ran = CliRunner().invoke(app, ["reproduce", "images", "--seeds", "2", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    content = json.loads(file.read_text())
    assert set(content) == {"digits-relu", "digits-residual-outer", "digits-convolution"}
    for found in content.values():
        assert all(len(arm["final_loss"]) == 2 for arm in found["arms"].values())


def _some(split):
    return dataclasses.replace(split, x_train=split.x_train[:99], y_train=split.y_train[:99])
