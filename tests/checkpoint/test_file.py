"""The file: on any disk, beside a reader, after a failure, and from a stranger."""

import json
import multiprocessing
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import feedforward, nothing_left_behind, refused
from safetensors import safe_open
from torch import nn

import constrained_growth as cg
from constrained_growth.checkpoint import file as format
from constrained_growth.checkpoint import load, previous, restore, resume, save

# --- written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_old_one_is_kept_and_nothing_else(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "run"
    for step in range(4):
        save(path, nn.Linear(2, 1), step=step)
        assert load(path).step == step
        assert step == 0 or load(previous(path)).step == step - 1
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous"]


@pytest.mark.parametrize("name", ["save_file", "replace", "link and copyfile"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing_of_itself(
    name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Any, *_: Any) -> None:
        if name != "replace":
            Path(path).write_bytes(b"half of it")
        raise error

    path = tmp_path / "run"
    save(path, nn.Linear(2, 1), step=1)
    with monkeypatch.context() as patched:
        if name == "save_file":
            patched.setattr(safetensors.torch, "save_file", fail)
        elif name == "replace":
            patched.setattr(os, "replace", fail)
        else:
            patched.setattr(os, "link", fail)
            patched.setattr(format.shutil, "copyfile", fail)
        with pytest.raises((cg.CheckpointError, KeyboardInterrupt)):
            save(path, nn.Linear(2, 1), step=2)
    assert os.listdir(tmp_path) == ["run"]
    assert load(path).step == 1


def write_for_ever(path: Path) -> None:
    torch.set_num_threads(1)
    for step in range(1_000_000):
        save(path, nn.Linear(200 + step % 2, 100), step=step)


def test_reader_beside_a_writer_sees_whole_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "run"
    save(path, nn.Linear(200, 100))
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
    writer.start()
    try:
        end, steps = time.monotonic() + 3, set()
        while time.monotonic() < end:
            checkpoint = load(path)
            assert checkpoint.weights["weight"].shape == (100, 200 + checkpoint.step % 2)
            steps.add(checkpoint.step)
    finally:
        writer.kill()
        writer.join()
    assert len(steps) > 2


# --- read -------------------------------------------------------------------------------------


def content_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["content"])


def write(path: Path, text: str, header: Any = None) -> None:
    """A file with this text for its JSON, and the right checksum."""
    _, tensors = format.read(path)
    checksum = format._checksum(text, tensors)
    header = json.dumps({"version": 1, "checksum": checksum} if header is None else header)
    metadata = {"constrained_growth": header, "content": text}
    safetensors.torch.save_file(tensors, path, metadata)


NESTED = 200_000
HOSTILE: dict[str, Any] = {
    "nothing": "",
    "a number": "7",
    "a list": "[]",
    "no keys": "{}",
    "deep": "[" * NESTED + "]" * NESTED,
    "deep keys": '{"a":' * NESTED + "1" + "}" * NESTED,
    "record": {"record": 5},
    "deep record": {"record": "[" * NESTED + "]" * NESTED},
    "others": {"others": 5},
    "unknown tensor": {"extra": {"$tensor": "nowhere"}},
    "unhashable key": {"extra": {"$dict": [[[1], 2]]}},
    "a pair of three": {"extra": {"$dict": [[1, 2, 3]]}},
    "counter": {"extra": {"$counter": 4}},
    "a long tensor": {"extra": {"$array": ["a"]}},
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_content_is_a_clear_error(hostile: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save(path, nn.Linear(2, 1))
    change = HOSTILE[hostile]
    text = change if isinstance(change, str) else json.dumps({**content_of(path), **change})
    write(path, text)
    with refused(cg.GrowthError):
        load(path)


@pytest.mark.parametrize("header", [5, [], "x", {"version": 1}, {"checksum": 1}, {"version": {}}])
def test_hostile_header_is_a_clear_error(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save(path, nn.Linear(2, 1))
    write(path, json.dumps(content_of(path)), header)
    with refused(cg.CheckpointError, str(path)):
        load(path)


def test_header_that_is_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for size in (2**63, 10**8 - 1, 0):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with refused(cg.CheckpointError, str(path)):
            load(path)


PARTS: dict[str, Any] = {
    "random": [
        {},
        {"python": 1, "numpy": 2, "torch": 3, "cuda": 4},
        {"python": {"$tuple": [3, {"$tuple": [10**30] * 625}, None]}},
    ],
    "model": [5, {}, {"weight": 1, "bias": 2}],
    "optimizer": [5, {}, {"state": {}, "groups": [{}]}, {"state": 1, "groups": [{"params": [[]]}]}],
    "states": [5, {}, {"rule": 5}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, every in PARTS.items() for v in every])
def test_hostile_parts_are_refused_before_anything_is_loaded(
    name: str, value: Any, tmp_path: Path
) -> None:
    path, rule = tmp_path / "run", cg.TrustRegion()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(path, model, optimizer=optimizer, rule=rule)
    content = content_of(path)
    content[name] = {**content[name], **value} if name == "random" and value else value
    write(path, json.dumps(content))
    other = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with nothing_left_behind(other), refused(cg.GrowthError):
        restore(load(path), other, optimizer=optimizer, rule=rule)


@pytest.mark.parametrize("path", [5, None, [], b"run"])
def test_what_is_no_path(path: Any) -> None:
    model = feedforward(2, 4, 3)
    for function in (
        lambda: save(path, model),
        lambda: load(path),
        lambda: resume(path, model, torch.optim.SGD),
    ):
        with nothing_left_behind(model), refused(cg.CheckpointError, "path="):
            function()


def test_what_is_no_model_and_no_checkpoint(tmp_path: Path) -> None:
    model, path = feedforward(2, 4, 3), tmp_path / "run"
    with refused(cg.CheckpointError, "model="):
        save(path, 3)  # type: ignore[arg-type]
    with refused(cg.CheckpointError, "record="):
        save(path, model, record="{}")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    with refused(cg.CheckpointError, "checkpoint="):
        restore("run", model)  # type: ignore[arg-type]
    with refused(cg.CheckpointError, "optimizer_factory="):
        resume(save(path, model), model, None)  # type: ignore[arg-type]
