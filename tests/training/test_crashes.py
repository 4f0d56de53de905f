"""Killed at any moment, also while writing, and taken up again: the same numbers, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crashing import STEPS, train
from helpers import assert_same

from constrained_growth import checkpoint as checkpoints


class Trainings:
    """Processes that train at one checkpoint, one after the other."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.server = server
        self.path, self.log = folder / "run.safetensors", folder / "log"
        self.log.touch()

    def begin(self, call: int = 0) -> int:
        """Begin or go on; returns the number of the process."""
        self._tell(f"{self.path} {self.log} {call}")
        return int(self._answer())

    def end(self) -> int:
        """Wait for it; returns its exit code, −9 when it was killed."""
        self._tell("")
        return int(self._answer())

    def kill_after(self, number: int, seconds: float) -> int:
        """Begin, wait for `number` more steps in the log and then some seconds, and kill it.

        Returns:
            Its exit code: 0 when it had finished before.
        """
        enough = self.num_lines() + number
        process = self.begin()
        while self.num_lines() < enough and not has_ended(process):
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        return self.end()

    def num_lines(self) -> int:
        return len(self.log.read_bytes().splitlines())

    def trajectory(self) -> list[tuple[int, str]]:
        """(step, loss) pairs; steps that were taken twice occur twice."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [(int(step), loss) for step, loss in lines]

    def _tell(self, line: str) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()

    def _answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, f"the process that forks ended: {self.server.poll()}"
        return line


def has_ended(process: int) -> bool:
    """Whether it is a zombie, that has ended and was not waited for."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, Path(__file__).parent.with_name("crashing.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def trainings(server: subprocess.Popen[str], tmp_path: Path) -> Trainings:
    return Trainings(server, tmp_path)


def assert_as_if_never_killed(trainings: Trainings, folder: Path) -> None:
    """Let it end, and compare with a run that writes no checkpoint at all."""
    trainings.begin()
    assert trainings.end() == 0
    model = train(None, folder / "uninterrupted")
    expected = dict(line.split() for line in (folder / "uninterrupted").read_text().splitlines())
    assert len(expected) == STEPS
    found = trainings.trajectory()
    assert all(expected[str(step)] == loss for step, loss in found)
    assert {step for step, _ in found} == set(range(1, STEPS + 1))
    checkpoint = checkpoints.load(trainings.path)
    assert len(checkpoint.record.insertions) == 3
    assert_same(dict(checkpoint.weights), dict(model.state_dict()))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_thirty_random_moments(server: subprocess.Popen[str], tmp_path: Path) -> None:
    """However fast the machine is: a training that finishes is followed by another."""
    moments = random.Random(0)
    killed, twice, trained = 0, 0, 0
    while killed < 30:
        folder = tmp_path / f"training-{trained}"
        folder.mkdir()
        trainings = Trainings(server, folder)
        code = -signal.SIGKILL
        while killed < 30 and code != 0:
            code = trainings.kill_after(moments.randrange(5), moments.uniform(0, 0.02))
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        twice += len(trainings.trajectory()) - len(dict(trainings.trajectory()))
        assert_as_if_never_killed(trainings, folder)
        trained += 1
    assert twice > 0  # steps were lost, and taken again


def test_killed_at_every_call_of_a_write(trainings: Trainings, tmp_path: Path) -> None:
    """Half of the file written; before and after each fsync, link and rename."""
    for call in range(1, 19):  # three checkpoints, the first of which replaces none
        trainings.begin(call)
        assert trainings.end() == -signal.SIGKILL
        if call > 4:  # there is a whole one
            checkpoints.load(trainings.path)
    assert_as_if_never_killed(trainings, tmp_path)


def test_the_run_moves(tmp_path: Path) -> None:
    """The comparison above is not trivial: no two steps have the same loss."""
    train(None, tmp_path / "log")
    losses = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(set(losses)) == STEPS
    assert torch.isfinite(torch.tensor([float.fromhex(loss) for loss in losses])).all()
