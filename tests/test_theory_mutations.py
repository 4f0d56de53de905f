"""Wrong multipliers are caught by every notebook that is about λ.

`solve` is replaced by one whose answer is wrong, as the notebook and the certificates see it. Not
among them: 8, which has no square pin to transpose, and 9, which reads files.
"""

import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from torch import Tensor

import constrained_growth as cg
from constrained_growth._later import with_fields
from constrained_growth.verification import reports

THEORY = Path(__file__).parent.parent / "theory"
ABOUT_MULTIPLIERS = ("01", "02", "03", "04", "05", "06", "07")

Pins = dict[str, Tensor]


def is_square(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] > 1


def scaled(pins: Pins, first: bool) -> Pins:
    """All of λ off by 1 %."""
    return {key: 1.01 * own for key, own in pins.items()}


def sign(pins: Pins, first: bool) -> Pins:
    """The other sign in the largest pin of the first candidate."""
    key = max(pins, key=lambda key: float(pins[key].norm()))
    return pins | {key: -pins[key]} if first else pins


def transposed(pins: Pins, first: bool) -> Pins:
    """One square pin of each candidate transposed."""
    squares = [key for key, own in pins.items() if is_square(own)]
    return pins | {key: pins[key].mT.contiguous() for key in squares[:1]}


def mutated(right: Callable[..., cg.Solution], change: Callable[[Pins, bool], Pins]) -> Any:
    def solve(*args: Any, **kwargs: Any) -> cg.Solution:
        solution = right(*args, **kwargs)
        multipliers = {
            name: change(dict(pins), index == 0)
            for index, (name, pins) in enumerate(solution.multipliers.items())
        }
        return with_fields(solution, multipliers=multipliers)

    return solve


def run(number: str, change: Callable[[Pins, bool], Pins], monkeypatch: Any) -> None:
    """A notebook as a plain script, with changed multipliers."""
    (source,) = THEORY.glob(f"{number}_*.py")
    wrong = mutated(cg.solve, change)
    monkeypatch.setattr(cg, "solve", wrong)
    monkeypatch.setattr(reports, "solve", wrong)
    monkeypatch.chdir(THEORY)
    matplotlib.use("agg")
    with plt.rc_context():
        try:
            runpy.run_path(str(source), run_name="__main__")
        finally:
            plt.close("all")


@pytest.mark.parametrize("change", [scaled, sign, transposed], ids=lambda change: change.__name__)
@pytest.mark.parametrize("number", ABOUT_MULTIPLIERS)
def test_wrong_multipliers_fail_an_assertion_of_the_notebook(number, change, monkeypatch):
    with pytest.raises(AssertionError) as caught:
        run(number, change, monkeypatch)
    *_, last = traceback.extract_tb(caught.value.__traceback__)
    assert Path(last.filename).parent == THEORY, "it is the library that fails, not the notebook"


def test_a_replaced_solve_alone_fails_nothing(monkeypatch):
    """Else the other test could not fail."""
    run("02", lambda pins, first: pins, monkeypatch)
