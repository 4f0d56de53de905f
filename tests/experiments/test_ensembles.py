"""Replicas trained together against the plain loop, the library, and the golden cases."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused
from torch import nn

import constrained_growth as cg
from constrained_growth.experiments.data import Split, two_spirals
from constrained_growth.experiments.ensembles.growth import (
    NewLayer,
    frobenius,
    insert_layer,
    multipliers,
)
from constrained_growth.experiments.ensembles.networks import (
    apply,
    cross_entropy,
    ensemble,
    forward,
    samples,
    squared_error,
)
from constrained_growth.experiments.ensembles.training import SGD, Adam, Shuffle, train

FOLDER = Path(__file__).parent.parent / "golden"
SPLITS = [two_spirals(seed, points_per_class=40, dtype=torch.float64) for seed in range(3)]
TRAIN = samples([s.x_train for s in SPLITS], [s.y_train for s in SPLITS])
TEST = samples([s.x_test for s in SPLITS], [s.y_test for s in SPLITS])


def block(kind, width=4):
    """A plain block with nothing at its pins."""
    made = {
        "outer": lambda: cg.blocks.ResidualMLP(width, 3, torch.tanh),
        "inner": lambda: cg.blocks.ResidualMLP(width, 3, torch.tanh, "inner"),
        "identity": lambda: cg.blocks.IdentityLinear(width, nn.ReLU()),
    }[kind]()
    return made


def plain(kind, width=4, outputs=2):
    """Two hidden layers of one kind."""
    if kind == "identity":
        hidden = [nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    else:
        hidden = [nn.Linear(2, width), nn.Tanh(), block(kind, width)]
        for parameter in hidden[-1].parameters():
            nn.init.normal_(parameter, std=0.4)
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


KINDS = ["identity", "outer", "inner"]


def mean_loss(trained, data, loss=cross_entropy):
    return loss(forward(trained.model, trained.parameters, data.x)[0], data.y)


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def plain_loop(model, optimizer, split, steps, batch, orders, loss=nn.CrossEntropyLoss()):  # noqa: B008
    losses, done = [], 0
    for epoch in range(steps):
        order = orders(epoch)
        for rows in order.split(batch):
            optimizer.zero_grad()
            value = loss(model(split.x_train[rows]), split.y_train[rows])
            value.backward()
            optimizer.step()
            losses.append(value.item())
            done += 1
            if done == steps:
                return losses
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps_are_those_of_the_plain_loop(kind):
    models = [plain(kind) for _ in SPLITS]
    together, history = train(ensemble(models), TRAIN, 200, SGD(0.1), test=TEST)
    for r, (model, split) in enumerate(zip(models, SPLITS, strict=True)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        order = torch.arange(60)
        losses = plain_loop(model, optimizer, split, 200, 60, lambda _, order=order: order)
        close(history.loss[:, r], torch.tensor(losses), 1e-13)
        close(together.parameters[r], vector(model), 1e-12)
        wrong = (model(split.x_test).argmax(1) != split.y_test).double().mean()
        assert history.test_error is not None
        close(history.test_error[-1, r], wrong, 1e-15)


@pytest.mark.parametrize(
    ("together", "alone"),
    [
        (SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
        (SGD(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
        (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    ],
)
def test_batches_in_orders_of_their_own(together, alone):
    """13 does not divide 60: the last batch of an epoch is smaller."""
    models = [plain("identity") for _ in SPLITS]
    shuffle = Shuffle((5, 6, 7))
    after, history = train(ensemble(models), TRAIN, 40, together, batch=13, order=shuffle)
    for r, (model, split) in enumerate(zip(models, SPLITS, strict=True)):
        orders = [shuffle(epoch, 60)[r] for epoch in range(40)]
        optimizer = alone(model.parameters())
        losses = plain_loop(model, optimizer, split, 200, 13, lambda e, o=orders: o[e])
        close(history.loss[:, r], torch.tensor(losses).view(40, 5).mean(1), 1e-12)
        close(after.parameters[r], vector(model), 1e-11)


def test_orders_belong_to_seed_and_epoch():
    first, again = Shuffle((1, 2))(3, 50), Shuffle((2, 9))(3, 50)
    assert torch.equal(first[1], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, Shuffle((1, 2))(4, 50))
    assert torch.equal(first.sort(1).values, torch.arange(50).expand(2, 50))


def test_regression_on_data_that_all_replicas_share():
    x = torch.linspace(-1, 1, 20).unsqueeze(1)
    y = torch.cat([torch.sin(3 * x), x**2], 1)
    models = [nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    data = samples([x], [y])
    after, history = train(ensemble(models), data, 30, SGD(0.1), loss=squared_error)
    for r, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for epoch in range(30):
            optimizer.zero_grad()
            value = nn.functional.mse_loss(model(x), y)
            close(history.loss[epoch, r], value.detach(), 1e-14)
            value.backward()
            optimizer.step()
        close(after.parameters[r], vector(model), 1e-13)
        close(mean_loss(after, data, squared_error)[r], nn.functional.mse_loss(model(x), y), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_are_those_of_solve(kind):
    models = [plain(kind) for _ in SPLITS]
    new = block(kind)
    found = multipliers(ensemble(models), TRAIN, [NewLayer.of(new)] * 2)
    for r, (model, split) in enumerate(zip(models, SPLITS, strict=True)):
        sites = ("1", "3") if kind == "identity" else ("1", "2")
        candidates = [cg.Candidate(site, copy.deepcopy(new)) for site in sites]
        data = [(split.x_train, split.y_train)]
        problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
        solution = cg.solve(problem, stationarity=False)
        for k, site in enumerate(sites):
            assert set(found[k]) == set(new.pinned)
            for name, value in solution.multipliers[site].items():
                close(found[k][name][r], value)
            name = new.pinned[0]
            alone = solution.multipliers[site][name].norm()
            close(frobenius([at[name] for at in found])[r, k], alone)


@pytest.mark.parametrize(
    ("kind", "together", "alone"),
    [
        ("identity", Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),  # new ones count from 0
        ("outer", SGD(0.1, momentum=0.5), lambda p: torch.optim.SGD(p, 0.1, momentum=0.5)),
        ("inner", SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    ],
)
@pytest.mark.parametrize("site", [0, 1])
def test_grown_replicas_are_those_that_the_library_grows(kind, together, alone, site):
    """Each with a layer of its own."""
    models, blocks = [plain(kind) for _ in SPLITS], [block(kind) for _ in SPLITS]
    name = ("1", "3" if kind == "identity" else "2")[site]
    before, _ = train(ensemble(models), TRAIN, 5, together)
    grown = insert_layer(before, site, NewLayer.of(*blocks))
    after, history = train(grown, TRAIN, 20, together)
    close(mean_loss(grown, TRAIN), mean_loss(before, TRAIN), 1e-14)
    for r, (model, split) in enumerate(zip(models, SPLITS, strict=True)):
        optimizer = alone(model.parameters())
        data = [(split.x_train, split.y_train)]
        plain_loop(model, optimizer, split, 5, 60, lambda _: torch.arange(60))
        problem = cg.GrowthProblem(
            model, nn.CrossEntropyLoss(), data, [cg.Candidate(name, blocks[r])]
        )
        cg.insert(model, cg.solve(problem, cg.Fixed(0)), optimizer=optimizer)
        close(grown.parameters[r], vector(model), 1e-12)
        losses = plain_loop(model, optimizer, split, 20, 60, lambda _: torch.arange(60))
        close(history.loss[:, r], torch.tensor(losses), 1e-12)
        close(after.parameters[r], vector(model), 1e-11)


def test_a_replica_stops_for_good_when_it_makes_no_error():
    """Replica 1 has nothing to learn on its test data; the others never come to 0."""
    easy = copy.deepcopy(TEST)
    models = [plain("identity") for _ in SPLITS]
    begun = ensemble(models)
    label = forward(begun.model, begun.parameters, easy.x)[0].detach().argmax(1)
    easy.y[:] = nn.functional.one_hot(1 - label, 2).mT
    easy.y[1] = nn.functional.one_hot(label[1], 2).mT
    after, history = train(begun, TRAIN, 6, SGD(0.01), test=easy)
    free, without = train(begun, TRAIN, 6, SGD(0.01))
    assert history.test_error is not None
    assert after.running.tolist() == [True, False, True]
    assert history.trained.tolist() == [6, 1, 6]
    assert history.loss[:, 1].tolist() == [without.loss[0, 1].item()] * 6
    assert torch.equal(history.loss[:, [0, 2]], without.loss[:, [0, 2]])
    assert torch.equal(after.parameters[[0, 2]], free.parameters[[0, 2]])
    one, _ = train(begun, TRAIN, 1, SGD(0.01), test=easy)
    assert torch.equal(after.parameters[1], one.parameters[1])
    further, later = train(after, TRAIN, 2, SGD(0.01), test=easy)
    assert later.loss[:, 1].tolist() == [without.loss[0, 1].item()] * 2
    assert torch.equal(further.parameters[1], one.parameters[1])
    alone, none = train(
        after.take([1]), samples([SPLITS[1].x_train], [SPLITS[1].y_train]), 2, SGD(1.0)
    )
    assert torch.equal(alone.parameters, after.parameters[1:2])
    assert none.trained.tolist() == [0]


def test_training_in_parts_is_training_at_once():
    begun = ensemble([plain("outer") for _ in SPLITS])
    options = {"batch": 20, "order": Shuffle((0, 1, 2))}
    at_once, history = train(begun, TRAIN, 7, Adam(0.01), **options)
    half, first = train(begun, TRAIN, 3, Adam(0.01), **options)
    parts, second = train(half, TRAIN, 4, Adam(0.01), **options)
    assert torch.equal(at_once.parameters, parts.parameters)
    assert torch.equal(history.loss, torch.cat([first.loss, second.loss]))
    assert torch.equal(begun.parameters, ensemble([plain("outer")] * 3).parameters) is False


def test_what_does_not_fit_is_refused():
    begun = ensemble([plain("identity")] * 2)
    with refused(cg.CandidateError, "site=2", "0 to 1"):
        insert_layer(begun, 2, NewLayer.of(block("identity")))
    with refused(cg.CandidateError, "different shapes"):
        ensemble([plain("identity"), plain("identity", 3)])
    with refused(cg.DataError, "one size"):
        samples([torch.zeros(3, 2), torch.zeros(4, 2)], [torch.zeros(3).long()] * 2)


@pytest.mark.parametrize(
    "module",
    [
        cg.blocks.IdentityLinear(4, cg.blocks.TanhLU()),  # it has a shift
        nn.Linear(4, 4, bias=False),
        nn.Conv1d(1, 1, 1),
        nn.Conv2d(1, 2, 3),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
    ],
)
def test_modules_without_a_stacked_form_are_refused(module):
    with refused(cg.BlockError, type(module).__name__, "no stacked form"):
        apply(module, list(module.parameters()), torch.zeros(1, 4, 2))


GOLDEN = [
    f"{kind}_{case}"
    for kind in ("fwd_relu", "res2v1_tanh", "res2v2_tanh")
    for case in ("1_spiral_full", "2_spiral_mb64")
]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    """The whole protocol from the initial parameters to the last, as the reference ran it."""
    with np.load(FOLDER / f"{case}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    widths = meta["widths"]
    pinned = "inner" if meta["v2"] else "outer"

    def parameters(prefix):
        keys = sorted(k for k in arrays if k.startswith(prefix) and k[-2:].isdigit())
        return torch.from_numpy(np.concatenate([arrays[key].ravel() for key in keys]))

    def new(width):
        if meta["type"] == "fwd":
            return cg.blocks.IdentityLinear(width, nn.ReLU())
        return cg.blocks.ResidualMLP(width, width, torch.tanh, pinned, inner_init=0.8)

    layers = [nn.Linear(2, widths[0]), nn.ReLU() if meta["type"] == "fwd" else nn.Tanh()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()] if meta["type"] == "fwd" else [new(after)]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
    nn.utils.vector_to_parameters(parameters("init_"), model.parameters())

    x, y = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"]).long()
    data, batch = samples([x], [y]), meta["batch"]
    first, second = meta["epochs"]
    before, history = train(ensemble([model]), data, first, SGD(meta["lr"]), batch=batch)
    expected = torch.from_numpy(arrays["loss_pre"]).view(first, -1).mean(1)
    close(history.loss[:, 0], expected, 1e-10)
    close(before.parameters[0], parameters("before_"), 1e-10)

    layers = [NewLayer.of(new(width)) for width in widths[: len(arrays["sens"])]]
    (name,) = {"fwd": ["weight"]}.get(meta["type"], [f"{pinned}.weight"])
    squares = frobenius([at[name] for at in multipliers(before, data, layers)])[0] ** 2
    if "full" in case:
        close(squares, torch.from_numpy(arrays["sens"]))
    chosen = squares.argmax() if meta["mode"] == "abs max" else squares.argmin()
    assert chosen == meta["argmax" if meta["mode"] == "abs max" else "argmin"]
    grown = insert_layer(before, int(chosen), layers[chosen])
    close(grown.parameters[0], parameters("after_"), 1e-10)
    optimizer = SGD(meta["lr"] * meta["factor"])
    after, history = train(grown, data, second, optimizer, batch=batch)
    expected = torch.from_numpy(arrays["loss_post"]).view(second, -1).mean(1)
    close(history.loss[:, 0], expected, 1e-8)
    close(after.parameters[0], parameters("final_"), 1e-8)


def images(channels=3):
    return nn.Sequential(
        nn.Unflatten(1, (1, 5, 4)),
        nn.Conv2d(1, channels, 3, stride=(1, 2), padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 10, 3),
    )


def test_convolutions_are_trained_and_grow_as_plain_ones_do():
    """Images of 5 × 4 pixels; the first convolution goes to 5 × 2."""
    x, y = torch.randn(3, 12, 20), torch.randint(3, (3, 12))
    models, data, optimizer = (
        [images() for _ in range(3)],
        samples(x.unbind(), y.unbind()),
        SGD(0.1),
    )
    before, _ = train(ensemble(models), data, 10, optimizer, batch=5, order=Shuffle((1, 2, 3)))
    new = cg.blocks.IdentityConv2d(3, nn.ReLU())
    layer = NewLayer.of(new)
    found = multipliers(before, data, [layer] * 2)
    grown = insert_layer(before, 1, layer)
    after, history = train(grown, data, 10, optimizer, batch=5, order=Shuffle((1, 2, 3)))
    for r, model in enumerate(models):
        alone, split = torch.optim.SGD(model.parameters(), 0.1), Split(x[r], y[r], x[r], y[r])
        orders = [Shuffle((r + 1,))(epoch, 12)[0] for epoch in range(20)]
        plain_loop(model, alone, split, 30, 5, lambda e, o=orders: o[e])
        candidates = [cg.Candidate(site, copy.deepcopy(new)) for site in ("2", "4")]
        problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), [(x[r], y[r])], candidates)
        solution = cg.solve(problem, cg.Fixed(1))
        for k, site in enumerate(("2", "4")):
            for name, value in solution.multipliers[site].items():
                close(found[k][name][r], value)
        cg.insert(model, solution, optimizer=alone)
        losses = plain_loop(model, alone, split, 30, 5, lambda e, o=orders: o[10 + e])
        close(history.loss[:, r], torch.tensor(losses).view(10, 3).mean(1), 1e-12)
        close(after.parameters[r], vector(model), 1e-11)


@pytest.mark.parametrize(
    ("size", "stride", "kernel"),
    [((5, 4), (1, 1), 3), ((5, 8), (2, 2), 3), ((6, 5), (2, 1), 5), ((1, 9), (1, 2), 3)],
)
def test_convolutions_are_those_of_torch(size, stride, kernel):
    layer = nn.Conv2d(2, 3, kernel, stride, kernel // 2)
    x = torch.randn(2, 2, *size, 7, requires_grad=True)
    weight = torch.randn(2, 3, 2, kernel, kernel, requires_grad=True)
    bias = torch.randn(2, 3, requires_grad=True)
    alone = [
        nn.functional.conv2d(images.movedim(-1, 0), w, b, stride, kernel // 2)
        for images, w, b in zip(x, weight, bias, strict=True)
    ]
    expected = torch.stack([y.movedim(0, -1) for y in alone])
    found = apply(layer, (weight, bias), x)
    close(found, expected, 1e-13)
    toward, leaves = torch.randn_like(found), (x, weight, bias)
    slopes, others = (torch.autograd.grad((y * toward).sum(), leaves) for y in (found, expected))
    for slope, other in zip(slopes, others, strict=True):
        close(slope, other, 1e-12)
