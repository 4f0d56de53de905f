"""What is imported, and when: torch and SciPy take seconds."""

import os
import pickle
import subprocess
import sys

import pytest

import constrained_growth as cg

COMMANDS = [
    ["--version"],
    ["--help"],
    *(
        ["bench", name, "--help"]
        for name in ("multipliers", "monitoring", "device", "decisions", "growth", "expansion")
    ),
    *([name, "--help"] for name in ("demo", "bench", "expand", "reproduce")),
]


def run(program):
    """What a Python that has imported nothing yet prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_command_line_shows_its_help_without_torch():
    shown = run(
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from constrained_growth.experiments.commands import app\n"
        f"for arguments in {COMMANDS}:\n"
        "    ran = CliRunner().invoke(app, arguments)\n"
        "    assert ran.exit_code == 0, ran.output\n"
        "    print(ran.output)\n"
        "for module in ('torch', 'numpy', 'scipy', 'cvxpy', 'matplotlib'):\n"
        "    assert module not in sys.modules, module\n"
    )
    assert shown.startswith(cg.__version__)
    assert shown.count("Usage:") == len(COMMANDS) - 1


def test_every_command_is_asked_for_its_help():
    from typer.main import get_command

    from constrained_growth.experiments.commands import app

    def named(command, *before):
        for name, one in getattr(command, "commands", {}).items():
            yield [*before, name, "--help"]
            yield from named(one, *before, name)

    assert sorted(named(get_command(app))) == sorted(COMMANDS[2:])


def test_the_library_is_imported_without_scipy_and_cvxpy():
    run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import constrained_growth.training\n"
        "import constrained_growth as cg\n"
        "from constrained_growth import *\n"
        "assert cg.solve is solve and solve.__name__ == 'solve'\n"
        "assert cg.monitor is monitor and monitor.__name__ == 'monitor'\n"
        "assert cg.training.grow is grow and cg.norms is norms\n"
        "later = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not later & {'scipy', 'cvxpy', 'matplotlib', 'transformers', 'pandas'}, later\n"
        "assert cg.verification.check_with_scipy and 'scipy' in sys.modules\n"
    )


def test_names_are_those_in_all():
    assert dir(cg) == sorted([*cg.__all__, "__version__"])
    assert pickle.loads(pickle.dumps(cg.solve)) is cg.solve
    with pytest.raises(
        AttributeError, match="module 'constrained_growth' has no attribute 'slove'"
    ):
        getattr(cg, "slo" + "ve")
