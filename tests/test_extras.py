"""Where a package is missing, the error says what to install."""

import importlib
import sys

import pytest

import constrained_growth as cg
from constrained_growth.__main__ import main


@pytest.fixture
def without(monkeypatch):
    """As if these modules were not installed, and those of ours were not imported yet."""

    def hide(*hidden, reimported=()):
        for module in hidden:
            monkeypatch.setitem(sys.modules, module, None)
        for module in reimported:
            monkeypatch.delitem(sys.modules, module, raising=False)

    return hide


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("plotting", "matplotlib.axes", "plot"),
        ("integrations.lightning", "lightning.pytorch", "lightning"),
        ("integrations.trainer", "transformers", "transformers"),
        ("integrations.transformers", "transformers", "transformers"),
    ],
)
def test_the_extra_of_a_module_is_named(without, module, hidden, extra):
    name, package = f"constrained_growth.{module}", hidden.partition(".")[0]
    without(hidden, reimported=[name])
    match = rf"^{package} is missing: pip install 'constrained-growth\[{extra}\]'$"
    with pytest.raises(ModuleNotFoundError, match=match):
        importlib.import_module(name)


def test_pictures_name_their_extra(without):
    without("matplotlib.axes", reimported=["constrained_growth.plotting"])
    history = cg.History()
    history.add(loss=0.7, step=10, layers=2, seconds=0.1, metrics={})
    with pytest.raises(ModuleNotFoundError, match=r"constrained-growth\[plot\]"):
        history.plot()
    without("pandas")
    with pytest.raises(ModuleNotFoundError, match=r"^pandas is missing: pip install pandas$"):
        history.to_frame()


@pytest.mark.parametrize(
    ("hidden", "importers"),
    [("typer", ["commands"]), ("joblib", ["jobs", "reproduction.reproduce"])],
)
def test_the_command_line_names_its_extra(without, monkeypatch, hidden, importers):
    """Also if the package is only needed by what a command runs."""
    without(hidden, reimported=[f"constrained_growth.experiments.{name}" for name in importers])
    monkeypatch.setattr(sys, "argv", ["constrained-growth", "reproduce", "--list"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == f"{hidden} is missing: pip install 'constrained-growth[demo]'"


def test_other_missing_modules_are_not_blamed_on_an_extra(without):
    without("constrained_growth.solution", reimported=["constrained_growth.plotting"])
    with pytest.raises(ModuleNotFoundError, match=r"constrained_growth\.solution halted"):
        importlib.import_module("constrained_growth.plotting")
