"""What the commands share: names in any case, and files whose names tell one run from another."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from constrained_growth.experiments.command_line import carry_out
from constrained_growth.experiments.commands import app


@dataclass(frozen=True)
class Plan:
    tasks: tuple[SimpleNamespace, ...]


def run(plan, seed, cache):
    return {"tasks": [task.name for task in plan.tasks], "seed": seed}


PLAN = Plan((SimpleNamespace(name="MLP-a"), SimpleNamespace(name="conv-b")))
STUDY = SimpleNamespace(
    FULL=PLAN, QUICK=PLAN, run=run, tables=lambda found: Text(f"seed {found['seed']}")
)


def test_runs_with_other_options_write_other_files(tmp_path):
    runs = [
        {"quick": False, "seed": 0, "tasks": None},
        {"quick": True, "seed": 0, "tasks": None},
        {"quick": False, "seed": 1, "tasks": None},
        {"quick": False, "seed": 0, "tasks": ["conv-b"]},
    ]
    for options in runs:
        carry_out("name", STUDY, out=tmp_path, json=None, **options)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(written) == [
        "constrained-growth-bench-name-0.txt",
        "constrained-growth-bench-name-1.txt",
        "constrained-growth-bench-name-conv-b-0.txt",
        "constrained-growth-bench-name-quick-0.txt",
    ]
    assert "seed 1" in written["constrained-growth-bench-name-1.txt"]


def test_tasks_are_found_in_any_case():
    options = {"quick": False, "seed": 0, "out": None, "json": None}
    found = carry_out("name", STUDY, tasks=["mlp-A"], **options)
    assert found["tasks"] == ["MLP-a"]
    with pytest.raises(typer.BadParameter, match="--task mlp is none of MLP-a, conv-b"):
        carry_out("name", STUDY, tasks=["mlp"], **options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--change", "Inverted", "--seed", "-1"],
        ["bench", "decisions", "--family", "SHIFTS", "--seed", "-1"],
        ["reproduce", "EXP6", "--data", "MNIST1D", "--seed", "-1"],
    ],
)
def test_choices_are_taken_in_any_case(arguments):
    """Only the seed is refused."""
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2
    assert "--seed" in ran.stderr
    assert not any(option in ran.stderr for option in ("--change", "--family", "--data"))
