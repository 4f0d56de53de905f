"""Written whole or not at all, read without executing anything, refused when it does not fit."""

import copy
import json
import os
import pickle
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Gain,
    assert_same,
    candidate,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg
from constrained_growth.checkpoint import load, previous, restore, resume, save

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, times: int = 1) -> None:
    for _ in range(times):
        for input, target in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(input), target).backward()
            optimizer.step()


def grown(make: Callable[[Any], torch.optim.Optimizer], data: Any) -> tuple[Any, Any, Any]:
    """A model that was trained, grew at two places and was trained on."""
    model = feedforward(2, 4, 4, 3)
    optimizer = make(model.parameters())
    trained(model, optimizer, data)
    solution = solved(model, data, candidate("1"), candidate("3"), rule=cg.TopK(2))
    record = cg.insert(model, solution, optimizer=optimizer)
    trained(model, optimizer, data)
    return model, optimizer, record


# --- the same run again ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_training_is_the_same_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    make, data = OPTIMIZERS[kind], classified(40, batch=8)
    model, optimizer, record = grown(make, data)
    save(tmp_path / "run", model, optimizer=optimizer, record=record, step=10, extra={"a": (1, 2)})
    fresh = feedforward(2, 4, 4, 3)
    again = resume(tmp_path / "run", fresh, make)
    assert again.model is fresh
    assert (again.checkpoint.step, again.checkpoint.extra) == (10, {"a": (1, 2)})
    assert again.checkpoint.record == record
    trained(model, optimizer, data, 2)
    trained(fresh, again.optimizer, data, 2)
    assert_same(fresh.state_dict(), model.state_dict())


def test_optimizer_state_goes_by_name_and_not_by_number(tmp_path: Path) -> None:
    """With other groups PyTorch's own loading assigns the wrong moments."""
    data = classified(40, batch=8)
    model, optimizer, record = grown(OPTIMIZERS["Adam"], data)
    save(tmp_path / "run", model, optimizer=optimizer, record=record)

    def other_groups(parameters: Any) -> torch.optim.Optimizer:
        vectors_first = sorted(parameters, key=lambda p: p.dim())
        return torch.optim.Adam(
            [{"params": vectors_first[:5]}, {"params": vectors_first[5:], "lr": 7.0}]
        )

    again = resume(tmp_path / "run", feedforward(2, 4, 4, 3), other_groups)
    assert [len(group["params"]) for group in again.optimizer.param_groups] == [10]
    for name, parameter in again.model.named_parameters():
        moments = optimizer.state[model.get_parameter(name)]
        assert_same(dict(again.optimizer.state[parameter]), dict(moments))
    trained(model, optimizer, data)
    trained(again.model, again.optimizer, data)
    assert_same(again.model.state_dict(), model.state_dict())


def test_random_state_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(
        TensorDataset(torch.arange(50)),
        batch_size=10,
        shuffle=True,
        generator=torch.Generator().manual_seed(6),
    )

    def draws() -> list[Any]:
        own = torch.rand(3, generator=generator).tolist()
        order = torch.cat([batch for (batch,) in loader]).tolist()
        return [random.random(), np.random.rand(), torch.rand(2).tolist(), own, order]  # noqa: NPY002

    model = feedforward(2, 4, 3)
    draws()
    save(tmp_path / "run", model, generator=generator, loader=loader)
    expected = draws()
    assert draws() != expected
    restore(load(tmp_path / "run"), model, generator=generator, loader=loader)
    assert draws() == expected


def test_schedulers_and_rules_go_on(tmp_path: Path) -> None:
    class Counting:
        count = 0

        def __call__(self, sensitivities: Any) -> cg.Decision:
            return cg.Decision()

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "radius": torch.tensor(0.5)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    def make(optimizer: torch.optim.Optimizer) -> Any:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5], gamma=0.5)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [2])

    model, rule, other = feedforward(2, 4, 3), Counting(), Counting()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scheduler, rates, rule.count = make(optimizer), [], 3
    for step in range(9):
        if step == 4:
            save(tmp_path / "run", model, optimizer=optimizer, scheduler=scheduler, rule=rule)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    again = resume(
        tmp_path / "run",
        feedforward(2, 4, 3),
        OPTIMIZERS["SGD"],
        scheduler_factory=make,
        rule=other,
    )
    assert other.count == 3
    for rate in rates[4:]:
        again.optimizer.step()
        again.scheduler.step()
        assert again.scheduler.get_last_lr() == rate


def test_tied_weights_and_a_users_own_block(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = feedforward(4, 4, 4, 4)
        model[2].weight = model[0].weight  # type: ignore[index,union-attr]
        return model

    model = make()
    data = classified(16, width=4)
    record = cg.insert(model, solved(model, data, cg.Candidate("1", Gain(4))))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    save(tmp_path / "run", model, optimizer=optimizer, record=record)
    assert len([name for name in load_file(tmp_path / "run") if name.endswith(".weight")]) == 2
    with refused(cg.RecordError, "blocks="):
        resume(tmp_path / "run", make(), OPTIMIZERS["SGD"])
    again = resume(tmp_path / "run", make(), OPTIMIZERS["SGD"], blocks={"1": Gain(4)})
    assert_same(again.model.state_dict(), model.state_dict())
    assert len(list(again.model.parameters())) == len(list(model.parameters()))


# --- what does not fit is refused before anything is changed --------------------------------


def test_another_model_is_refused_and_as_it_was(tmp_path: Path) -> None:
    data = classified(40, batch=8)
    model, optimizer, record = grown(OPTIMIZERS["Adam"], data)
    save(tmp_path / "run", model, optimizer=optimizer, record=record)
    wider, deeper = feedforward(2, 5, 4, 3), feedforward(2, 4, 4, 4, 3)
    for other in (wider, deeper):
        with nothing_left_behind(other), refused(cg.RecordError, "does not fit"):
            resume(tmp_path / "run", other, OPTIMIZERS["Adam"])
    fresh = feedforward(2, 4, 4, 3)
    with nothing_left_behind(fresh), refused(cg.CheckpointError, "0.bias", "after replay"):
        resume(tmp_path / "run", fresh, lambda p: torch.optim.SGD([next(iter(p))], lr=1.0))
    with nothing_left_behind(fresh), refused(cg.CheckpointError, "does not fit", "cg.replay"):
        restore(load(tmp_path / "run"), fresh)
    with nothing_left_behind(fresh), refused(cg.CheckpointError, "scaler", "save(…, scaler=…)"):
        resume(tmp_path / "run", fresh, OPTIMIZERS["Adam"], scaler=torch.amp.GradScaler("cpu"))


def test_a_grower_brings_its_record_and_has_to_have_the_optimizer(tmp_path: Path) -> None:
    data, start = classified(16), feedforward(2, 4, 4, 3)

    def grower(model: nn.Module, optimizer: torch.optim.Optimizer) -> cg.Grower:
        options: Any = {"candidates": [candidate("1")], "rule": cg.TopK(1)}
        return cg.Grower(model, optimizer, nn.CrossEntropyLoss(), data, **options)

    make = OPTIMIZERS["Adam"]
    model = copy.deepcopy(start)
    optimizer = make(model.parameters())
    growing = grower(model, optimizer)
    trained(model, optimizer, data)
    growing.step(1.0)
    growing.maybe_grow()
    path = save(tmp_path / "run", model, optimizer=optimizer, grower=growing)
    assert load(path).record == growing.record
    fresh = copy.deepcopy(start)
    early = grower(fresh, make(fresh.parameters()))
    with refused(cg.OptimizerError, "optimizer", "after checkpoint.resume"):
        resume(path, fresh, make, grower=early)
    resumed = resume(path, copy.deepcopy(start), make)
    late = grower(resumed.model, resumed.optimizer)
    late.load_state_dict(resumed.checkpoint.states["grower"])
    assert late.record == growing.record


def test_an_optimizer_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    model = feedforward(2, 4, 3)
    save(tmp_path / "run", model)
    with nothing_left_behind(model), refused(cg.CheckpointError, "no state of one"):
        resume(tmp_path / "run", model, OPTIMIZERS["SGD"])


def test_an_optimizer_of_another_class_is_refused(tmp_path: Path) -> None:
    net = feedforward(2, 4, 3)
    path = save(tmp_path / "run", net, optimizer=torch.optim.Adam(net.parameters()))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with nothing_left_behind(net), refused(cg.CheckpointError, "optimizer=SGD", "class Adam"):
        restore(load(path), net, optimizer=sgd)


def nested() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize("extra", [torch.eye(2).to_sparse(), nested()])
def test_what_no_file_holds_is_refused(extra: Any, tmp_path: Path) -> None:
    with refused(cg.CheckpointError, "extra", "dense tensors"):
        save(tmp_path / "run", feedforward(2, 4, 3), extra=extra)
    assert not list(tmp_path.iterdir())


def test_parameters_outside_the_model_are_refused(tmp_path: Path) -> None:
    model, loss = feedforward(2, 4, 3), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    with refused(cg.CheckpointError, "group 0", "Sequential"):
        save(tmp_path / "run", model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


# --- damaged and foreign files --------------------------------------------------------------


def written(folder: Path) -> Path:
    """A checkpoint that replaced another."""
    model = feedforward(2, 4, 3)
    for step in (1, 2):
        save(folder / "run", model, optimizer=OPTIMIZERS["Adam"](model.parameters()), step=step)
    return folder / "run"


def test_damage_anywhere_is_found_and_the_one_before_is_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert (load(path).step, load(previous(path)).step) == (2, 1)
    whole = path.read_bytes()
    places = random.Random(0)
    damaged = [whole[:n] for n in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"x"]
    for _ in range(60):  # one bit flipped
        place, bit = places.randrange(len(whole)), 1 << places.randrange(8)
        damaged.append(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with refused(cg.CheckpointError, str(path), str(previous(path))):
            load(path)
        assert load(previous(path)).step == 1
    path.unlink()
    with refused(cg.CheckpointError, "does not exist", str(previous(path))):
        load(path)


def test_foreign_files_are_refused_and_not_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "run", tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    path.write_bytes(pickle.dumps(Bomb()))
    with refused(cg.CheckpointError, "no checkpoint as save() writes it"):
        load(path)
    torch.save({"model": Bomb()}, path)
    with refused(cg.CheckpointError, "no checkpoint as save() writes it"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with refused(cg.CheckpointError, "another program"):
        load(path)
    with refused(cg.CheckpointError, str(tmp_path)):
        load(tmp_path)
    assert not marker.exists()


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"version": 2, "checksum": 0})
    metadata = {"constrained_growth": header, "content": "{}"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "run", metadata)
    with refused(cg.CheckpointError, "version 2", "reads 1"):
        load(tmp_path / "run")


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = written(tmp_path)
    with refused(cg.CheckpointError, "extra/0/deep is a function", "without executing code"):
        save(path, feedforward(2, 4, 3), extra=[{"deep": label_of}])
    assert load(path).step == 2
    with refused(cg.CheckpointError, "cannot be written"):
        save(tmp_path / "no" / "folder", feedforward(2, 4, 3))


def label_of() -> None:
    pass


def test_files_left_by_a_killed_process_do_not_matter(tmp_path: Path) -> None:
    path = written(tmp_path)
    for ending in (".tmp", ".link"):
        path.with_name(path.name + ending).write_bytes(b"half")
    save(path, feedforward(2, 4, 3), step=3)
    assert [load(path).step, load(previous(path)).step] == [3, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "run.previous"]


# --- nested data ----------------------------------------------------------------------------


def test_nested_data_come_back_as_they_were(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    tree = {
        "numbers": [1, -2.5, float("inf"), True, None, "text", 2**70],
        "tuple": (1, (2, [3])),
        3: {"int key": {(1, 2): "pair"}},
        "$tensor": "a key that looks like a tag",
        "counter": Counter([3, 3, 5]),
        "ordered": OrderedDict(a=1),
        "same": [tensor, tensor],
        "view": [tensor[:, 1], tensor.t(), tensor.expand(2, 3, 4), torch.zeros(0), torch.tensor(1)],
        "kinds": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.bool, torch.int8)],
        "numpy": [np.float64(0.1), np.arange(3, dtype=np.int16)],
    }
    before = copy.deepcopy(tree)
    save(tmp_path / "run", nn.Identity(), extra=tree)
    again = load(tmp_path / "run").extra
    assert_same(tree["same"], before["same"])
    for key in tree.keys() - {"ordered", "numpy"}:
        assert_same(again[key], tree[key])
    assert again["ordered"] == {"a": 1}
    assert again["numpy"][0] == 0.1
    assert again["numpy"][1].dtype == np.int16
    assert again["same"][0] is again["same"][1]
    names = [name for name in load_file(tmp_path / "run") if name.startswith("extra/")]
    assert [name for name in names if "same" in name] == ["extra/same/0"]


def test_equal_names_of_tensors_are_told_apart(tmp_path: Path) -> None:
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    save(tmp_path / "run", nn.Identity(), extra=tree)
    assert load(tmp_path / "run").extra == tree


def test_a_tensor_of_the_model_can_be_saved_again_as_extra(tmp_path: Path) -> None:
    model = feedforward(2, 4, 3)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    trained(model, optimizer, classified(8))
    extra = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
    save(tmp_path / "run", model, optimizer=optimizer, extra=extra)
    assert_same(load(tmp_path / "run").extra, [tensor.detach() for tensor in extra])


def test_loaded_state_is_not_shared_with_the_checkpoint(tmp_path: Path) -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    trained(model, optimizer, data)
    save(tmp_path / "run", model, optimizer=optimizer)
    checkpoint = load(tmp_path / "run")
    kept = copy.deepcopy(checkpoint)
    restore(checkpoint, model, optimizer=optimizer)
    trained(model, optimizer, data)
    assert_same(dict(checkpoint.optimizer or {}), dict(kept.optimizer or {}))
    assert_same(dict(checkpoint.weights), dict(kept.weights))


@pytest.mark.parametrize(
    ("saved", "given"), [("Adam", "AdamW"), ("AdamW", "RAdam"), ("Adam", "Adamax")]
)
def test_relatives_of_an_optimizer_are_refused(saved: str, given: str, tmp_path: Path) -> None:
    net = feedforward(2, 4, 3)
    optimizer = getattr(torch.optim, saved)(net.parameters(), lr=0.5)
    trained(net, optimizer, classified(8))
    path = save(tmp_path / "run", net, optimizer=optimizer)
    other = getattr(torch.optim, given)(net.parameters(), lr=0.1)
    before = copy.deepcopy(other.state_dict())
    with refused(cg.CheckpointError, f"optimizer={given}", f"class {saved}"):
        restore(load(path), net, optimizer=other)
    assert_same(other.state_dict(), before)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    net = feedforward(2, 4, 3)
    path = save(tmp_path / "run", net)
    other = feedforward(2, 4, 3).float()
    with nothing_left_behind(other), refused(cg.CheckpointError, '"0.weight"', "model.to(torch"):
        restore(load(path), other)


def test_names_that_an_optimizer_has_are_kept(tmp_path: Path) -> None:
    net = feedforward(2, 4, 3)
    path = save(tmp_path / "run", net, optimizer=torch.optim.AdamW(net.parameters()))
    named = torch.optim.AdamW((f"my {name}", p) for name, p in net.named_parameters())
    restore(load(path), net, optimizer=named)
    assert named.param_groups[0]["param_names"] == [
        f"my {name}" for name, _ in net.named_parameters()
    ]


class Extra(nn.Linear):
    """Has a state beside its tensors, which it may refuse."""

    refuses = False

    def get_extra_state(self) -> Any:
        return {"number": 3}

    def set_extra_state(self, state: Any) -> None:
        if self.refuses:
            raise ValueError("not this one")


@pytest.mark.parametrize("case", ["none saved", "none here", "refused", "refused by a copy"])
def test_states_beside_tensors(case: str, tmp_path: Path) -> None:
    plain, extra = nn.Linear(2, 3), Extra(2, 3)
    saved, given = (plain, extra) if case == "none saved" else (extra, plain)
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.5)
    path = save(tmp_path / "run", saved, optimizer=optimizer, averaged=copy.deepcopy(saved))
    copied: Any = copy.deepcopy(given)
    if case.startswith("refused"):
        given, copied = Extra(2, 3), Extra(2, 3)
        copied.refuses, given.refuses = case == "refused by a copy", case == "refused"
    other = torch.optim.SGD(given.parameters(), lr=0.1)
    with nothing_left_behind(given), refused(cg.CheckpointError):
        restore(load(path), given, optimizer=other, averaged=copied)
    assert other.param_groups[0]["lr"] == 0.1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for path in ("", tmp_path):
        with refused(cg.CheckpointError, "is a folder"):
            save(path, feedforward(2, 4, 3))
        with refused(cg.CheckpointError, "is a folder"):
            load(path)


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path) -> None:
    left = tmp_path / "run.tmp"
    left.mkdir()
    (left / ".tmpAbC123").write_bytes(b"half of it")
    save(tmp_path / "run", feedforward(2, 4, 3))
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
