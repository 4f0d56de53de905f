"""Run the notebooks and write them beside their sources: python theory/execute.py [01 02 …]."""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def executed(source: Path) -> NotebookNode:
    """The notebook of a py:percent source with its outputs, and nothing else that would vary."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, kernel_name="python3", record_timing=False).execute(cwd=HERE)
    notebook.metadata = {"language_info": {"name": "python"}}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def main(prefixes: list[str]) -> None:
    """Execute all sources, or those whose names begin with one of the prefixes."""
    for source in sorted(HERE.glob("[0-9]*.py")):
        if not prefixes or source.name.startswith(tuple(prefixes)):
            print(source.name)
            nbformat.write(executed(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
