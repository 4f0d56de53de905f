"""The notebooks of theory/: every source runs, and the executed notebook beside it is of it."""

import re
import runpy
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

THEORY = Path(__file__).parent.parent / "theory"
SOURCES = sorted(THEORY.glob("[0-9]*.py"))

pytestmark = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_source_runs(source, monkeypatch):
    """As a plain script; each claim in it is an assertion, and warnings are errors."""
    matplotlib.use("agg")
    monkeypatch.chdir(THEORY)
    with plt.rc_context():
        try:
            runpy.run_path(str(source), run_name="__main__")
        finally:
            plt.close("all")


def test_notebook_is_executed_from_source(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells, (
        "run: python theory/execute.py"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_notebook_is_clean_and_small(source):
    path = source.with_suffix(".ipynb")
    text = path.read_text()
    assert len(text) < 300_000
    outputs = [o for c in nbformat.reads(text, 4).cells for o in c.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not re.search(r"/(home|tmp|work|root|Users)/|\"iopub|20\d\d-\d\d-\d\dT", text)


def test_notebook_has_its_parts(source):
    """Opens with what the reader will be able to say, closes with exercises, cites something."""
    text = source.read_text()
    for part in ("you will be able to say", "## Exercises", "## References", "**Figure 1"):
        assert part in text
    assert text.count("\nassert ") + text.count("    assert ") >= 5
