"""The steps after an insertion, against parameter groups, penalties and loops made by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import constrained_growth as cg
from constrained_growth.training import LineSearch, NewLayers, Round

LOSS = nn.CrossEntropyLoss()
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.02)
ADAM = functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.05)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
NO_DECAY = [functools.partial(factory, weight_decay=0.0) for factory in (SGD, ADAM, ADAMW)]
KINDS = pytest.mark.parametrize("factory", [SGD, ADAM, ADAMW], ids=["SGD", "Adam", "AdamW"])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def batches(number: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(16, 2, generator=generator, dtype=torch.float64),
            torch.randint(3, (16,), generator=generator),
        )
        for _ in range(number)
    ]


DATA = batches()


def candidates(model: nn.Module) -> list[cg.Candidate]:
    return [cg.Candidate("3", cg.blocks.IdentityLinear(5, nn.ReLU()))]


def grown(
    factory: Callable[[Any], torch.optim.Optimizer], policy: Any = None, before: int = 4
) -> cg.Grower:
    """Trained for a while, then grown by one layer after module 3."""
    torch.manual_seed(0)
    model = network()
    optimizer = factory(model.parameters())
    grower = cg.Grower(model, optimizer, LOSS, DATA, candidates=candidates, after_insertion=policy)
    train(grower, before)
    assert grower.maybe_grow() is not None
    return grower


def train(grower: cg.Grower, number: int, begin: int = 0) -> None:
    for x, y in DATA[begin : begin + number]:
        grower.optimizer.zero_grad()
        loss = LOSS(grower.model(x), y)
        loss.backward()
        grower.optimizer.step()
        grower.step(loss)


def new_parameters(grower: cg.Grower) -> dict[str, nn.Parameter]:
    named = dict(grower.model.named_parameters())
    return {name: named[name] for name in grower.history.rounds[-1].new_parameters}


def apart(grower: cg.Grower, **settings: Any) -> None:
    """Give the new parameters a group of their own, by hand."""
    new = list(new_parameters(grower).values())
    (group,) = grower.optimizer.param_groups
    group["params"] = [p for p in group["params"] if all(p is not other for other in new)]
    shared = {key: value for key, value in group.items() if key != "params"}
    grower.optimizer.add_param_group({**shared, "params": new, **settings})


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("factory", NO_DECAY, ids=["SGD", "Adam", "AdamW"])
def test_a_share_of_the_step_is_a_smaller_learning_rate(factory: Any) -> None:
    ours = grown(factory, NewLayers(scale=0.3, warmup=0))
    theirs = grown(factory)
    apart(theirs, lr=0.3 * theirs.optimizer.param_groups[0]["lr"])
    train(ours, 8, 4)
    train(theirs, 8, 4)
    same(ours.model, theirs.model)


@pytest.mark.parametrize("factory", NO_DECAY, ids=["SGD", "Adam", "AdamW"])
def test_a_warm_up_is_a_learning_rate_that_grows_linearly(factory: Any) -> None:
    ours = grown(factory, NewLayers(warmup=3))
    theirs = grown(factory)
    lr = theirs.optimizer.param_groups[0]["lr"]
    apart(theirs)
    for step in range(8):
        theirs.optimizer.param_groups[1]["lr"] = lr * min(1.0, (step + 1) / 4)
        train(theirs, 1, 4 + step)
    train(ours, 8, 4)
    same(ours.model, theirs.model)


@pytest.mark.parametrize("factory", [SGD, ADAM], ids=["SGD", "Adam"])
def test_anchored_decay_is_a_penalty_on_the_deviation_from_the_identity(factory: Any) -> None:
    ours, theirs = grown(factory, NewLayers(warmup=0)), grown(factory)
    decay = theirs.optimizer.param_groups[0]["weight_decay"]
    apart(theirs, weight_decay=0.0)
    new = list(new_parameters(theirs).values())
    origins = [p.detach().clone() for p in new]
    torch.testing.assert_close(origins[0], torch.eye(5))
    for x, y in DATA[4:]:
        theirs.optimizer.zero_grad()
        penalty = sum(((p - o) ** 2).sum() for p, o in zip(new, origins, strict=True))
        (LOSS(theirs.model(x), y) + decay / 2 * penalty).backward()
        theirs.optimizer.step()
    train(ours, 8, 4)
    same(ours.model, theirs.model)


def test_anchored_decoupled_decay_is_a_pull_towards_the_identity() -> None:
    ours, theirs = grown(ADAMW, NewLayers(scale=0.5, warmup=0)), grown(ADAMW)
    group = theirs.optimizer.param_groups[0]
    lr = 0.5 * group["lr"]
    apart(theirs, weight_decay=0.0, lr=lr)
    new = list(new_parameters(theirs).values())
    origins = [p.detach().clone() for p in new]
    for step in range(8):
        with torch.no_grad():
            pulls = [p - origin for p, origin in zip(new, origins, strict=True)]
        train(theirs, 1, 4 + step)
        with torch.no_grad():
            for p, pull in zip(new, pulls, strict=True):
                p.sub_(lr * group["weight_decay"] * pull)
    train(ours, 8, 4)
    same(ours.model, theirs.model)


@KINDS
def test_without_gradients_decay_leaves_the_identity_where_it_is(factory: Any) -> None:
    shrunk, kept = grown(factory), grown(factory, NewLayers())
    for grower in (shrunk, kept):
        for _ in range(20):
            for p in grower.model.parameters():
                p.grad = torch.zeros_like(p)
            grower.optimizer.step()
    weights = [new_parameters(grower)["3.inserted.weight"].detach() for grower in (shrunk, kept)]
    assert float(weights[0].trace()) < 4.95
    torch.testing.assert_close(weights[1], torch.eye(5))


def test_without_a_warm_up_nothing_changes_where_there_is_no_decay() -> None:
    plain = functools.partial(torch.optim.Adam, lr=0.01)
    ours, theirs = grown(plain, NewLayers(warmup=0)), grown(plain)
    train(ours, 8, 4)
    train(theirs, 8, 4)
    same(ours.model, theirs.model)


@pytest.mark.parametrize(
    ("factory", "policy"),
    [
        (SGD, functools.partial(NewLayers, 0.5, warmup=30)),
        (ADAM, functools.partial(LineSearch, 1)),
        (ADAMW, functools.partial(NewLayers, 0.5, warmup=30)),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_taken_up_from_a_checkpoint_it_goes_on_the_same(
    factory: Any, policy: Callable[[], Any], tmp_path: Path
) -> None:
    def stop(grower: cg.Grower) -> None:
        if len(grower.history.losses) == 2:
            raise KeyboardInterrupt

    def run(path: Path | None, *callbacks: Callable[[cg.Grower], object]) -> nn.Module:
        torch.manual_seed(0)
        model = network()
        cg.grow(
            model,
            factory,
            LOSS,
            DATA,
            epochs=5,
            max_insertions=2,
            candidates=lambda now: [
                cg.Candidate(at, cg.blocks.IdentityLinear(5, nn.ReLU())) for at in ("1", "3")
            ],
            after_insertion=policy(),
            checkpoint=path,
            checkpoint_every=1,
            callbacks=callbacks,
            progress=False,
        )
        return model

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop)
    taken_up = run(tmp_path / "run")
    for (name, p), q in zip(whole.named_parameters(), taken_up.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_step_that_the_scaler_skips_moves_nothing_and_does_not_count() -> None:
    policy = NewLayers(warmup=1)
    grower = grown(ADAMW, policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(grower.model.state_dict())
    grower.optimizer.zero_grad()
    scaler.scale(LOSS(grower.model(DATA[0][0]), DATA[0][1])).backward()
    new_parameters(grower)["3.inserted.weight"].grad[0, 0] = math.inf  # type: ignore[index]
    scaler.step(grower.optimizer)
    scaler.update()
    for name, value in grower.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert scaler.get_scale() == 2.0
    assert {age for age, _ in policy.state_dict().values()} == {0}


@KINDS
def test_with_the_scaler_and_clipping_the_steps_are_those_of_a_loop_by_hand(factory: Any) -> None:
    ours, theirs = (grown(factory, NewLayers(0.5, warmup=2)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in DATA[4:]:
        ours.optimizer.zero_grad()
        scaler.scale(LOSS(ours.model(x), y)).backward()
        scaler.unscale_(ours.optimizer)
        nn.utils.clip_grad_norm_(ours.model.parameters(), 0.1)
        scaler.step(ours.optimizer)
        scaler.update()
        theirs.optimizer.zero_grad()
        LOSS(theirs.model(x), y).backward()
        gradients = [p.grad for p in theirs.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        for g in gradients:
            g.mul_(min(1.0, 0.1 / (norm + 1e-6)))
        theirs.optimizer.step()
    same(ours.model, theirs.model)


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    functools.partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12, cycle_momentum=False),
    lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.7)],
        [2],
    ),
]


@pytest.mark.parametrize("make", SCHEDULERS, ids=["Lambda", "Step", "Cosine", "OneCycle", "Seq"])
def test_schedulers_go_on_and_the_share_is_one_of_theirs(make: Any) -> None:
    """SGD without momentum: each step is minus the learning rate times the gradient."""
    factory = functools.partial(torch.optim.SGD, lr=0.1)
    torch.manual_seed(0)
    model = network()
    optimizer = factory(model.parameters())
    scheduler, shadow = make(optimizer), make(factory([nn.Parameter(torch.zeros(1))]))
    grower = cg.Grower(
        model,
        optimizer,
        LOSS,
        DATA,
        candidates=candidates,
        max_insertions=1,
        after_insertion=NewLayers(scale=0.25, warmup=0),
    )
    for epoch in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(grower, 1, epoch)
        shadow.optimizer.step()
        for name, p in model.named_parameters():
            assert p.grad is not None
            lr = shadow.get_last_lr()[0] * (0.25 if "inserted" in name else 1.0)
            torch.testing.assert_close(p.detach(), before[name] - lr * p.grad)
        grower.maybe_grow()
        scheduler.step()
        shadow.step()
    assert any("inserted" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("foreach", [False, True])
def test_moments_of_old_parameters_go_on_and_new_ones_begin_anew(kind: Any, foreach: bool) -> None:
    """The same steps as two optimizers make, an old one and one made for the new layer."""
    factory = functools.partial(kind, lr=0.01, foreach=foreach)
    ours, theirs = grown(factory), grown(factory)
    new = list(new_parameters(theirs).values())
    (group,) = theirs.optimizer.param_groups
    group["params"] = [p for p in group["params"] if all(p is not other for other in new)]
    other = factory(new)
    train(ours, 8, 4)
    for x, y in DATA[4:]:
        theirs.optimizer.zero_grad()
        other.zero_grad()
        LOSS(theirs.model(x), y).backward()
        theirs.optimizer.step()
        other.step()
    same(ours.model, theirs.model)


def test_the_first_step_of_adam_in_a_new_parameter_is_the_learning_rate() -> None:
    grower = grown(functools.partial(torch.optim.Adam, lr=0.01, eps=1e-30), before=12)
    train(grower, 1)
    moved = new_parameters(grower)["3.inserted.weight"].detach() - torch.eye(5)
    moved = moved[moved != 0]  # nothing arrives at units that are never active
    assert len(moved) > 4
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01))


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(LOSS(model(torch.cat([x for x, _ in DATA])), torch.cat([y for _, y in DATA])))


def test_a_line_search_shortens_steps_until_the_loss_falls() -> None:
    """With a learning rate far too large; the same step by hand at every length it tried."""
    factory = functools.partial(torch.optim.SGD, lr=30.0)
    shares: list[list[float]] = []
    search = LineSearch(1)

    def policy(grower: cg.Grower, one: Round) -> None:
        begin, model = mean_loss(grower.model), copy.deepcopy(grower.model)
        shares.append(search(grower, one))
        LOSS(model(torch.cat([x for x, _ in DATA])), torch.cat([y for _, y in DATA])).backward()
        slope = -30.0 * sum(float((p.grad**2).sum()) for p in model.parameters())  # type: ignore[operator]
        share, tried = 1.0, []
        while True:
            there = copy.deepcopy(model)
            with torch.no_grad():
                for p, q in zip(there.parameters(), model.parameters(), strict=True):
                    p.sub_(share * 30.0 * q.grad)  # type: ignore[operator]
            tried.append(mean_loss(there))
            if tried[-1] <= begin + 1e-4 * share * slope:
                break
            share /= 2
        assert shares[-1] == [share]
        assert len(tried) > 1
        assert tried[0] > begin
        same(grower.model, there)

    torch.manual_seed(0)
    model = network()
    optimizer = factory(model.parameters())
    grower = cg.Grower(model, optimizer, LOSS, DATA, candidates=candidates, after_insertion=policy)
    grower.step(1.0)
    grower.maybe_grow()
    assert shares


def test_a_line_search_takes_whole_steps_where_they_help() -> None:
    taken: list[list[float]] = []
    search = LineSearch(3)
    factory = functools.partial(torch.optim.SGD, lr=0.01)
    grown(factory, lambda grower, one: taken.append(search(grower, one)))
    assert taken == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(torch.optim.SGD, lr=0.05, maximize=True),
        functools.partial(torch.optim.SGD, lr=1e308),
    ],
    ids=["every step is uphill", "every loss is NaN"],
)
def test_a_line_search_that_finds_nothing_stays_where_it_is(factory: Any) -> None:
    grower = grown(functools.partial(torch.optim.SGD, lr=0.05))
    grower.optimizer = factory(grower.model.parameters())
    before = copy.deepcopy(grower.model.state_dict())
    assert LineSearch(2)(grower) == [0.0, 0.0]
    for name, value in grower.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_hooks_for_a_second_insertion_are_made_once() -> None:
    policy = NewLayers(scale=0.5)
    grower = grown(SGD, policy)
    train(grower, 2)
    grower.maybe_grow()
    train(grower, 1)
    ages = [age for age, _ in policy.state_dict().values()]
    assert sorted(ages) == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: NewLayers(0.0), "scale"),
        (lambda: NewLayers(warmup=-1), "warmup"),
        (lambda: LineSearch(0), "steps"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[], object], word: str) -> None:
    with pytest.raises(cg.TrainingError, match=word):
        make()


def test_names_that_are_not_in_the_model_are_refused() -> None:
    policy, grower = NewLayers(), grown(SGD)
    with pytest.raises(cg.TrainingError, match="no parameters"):
        policy.attach(grower.model, grower.optimizer, ["9.weight"])


@KINDS
def test_a_closure_finds_the_parameters_where_they_are(factory: Any) -> None:
    ours, theirs = (grown(factory, NewLayers(0.5, warmup=2)) for _ in range(2))
    train(theirs, 8, 4)
    for x, y in DATA[4:]:

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            ours.optimizer.zero_grad()
            loss = LOSS(ours.model(x), y)
            loss.backward()
            return float(loss.detach())

        ours.optimizer.step(closure)
    same(ours.model, theirs.model)


def test_a_closure_that_raises_leaves_the_new_layer_as_it_is() -> None:
    grower = grown(ADAMW, NewLayers())
    before = copy.deepcopy(grower.model.state_dict())

    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grower.optimizer.step(interrupted)
    assert all(torch.equal(v, before[k]) for k, v in grower.model.state_dict().items())
    other = grown(ADAMW, NewLayers())
    for each in (grower, other):
        train(each, 3)
    for found, expected in zip(grower.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_step_that_fails_is_undone_before_the_next() -> None:
    grower, other = grown(SGD, NewLayers()), grown(SGD, NewLayers())
    for each in (grower, other):
        for p in each.model.parameters():
            p.grad = torch.zeros_like(p)
    state, grower.optimizer.state = grower.optimizer.state, None
    with pytest.raises(TypeError):
        grower.optimizer.step()
    grower.optimizer.state = state
    for each in (grower, other):
        each.optimizer.step()
    for found, expected in zip(grower.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
