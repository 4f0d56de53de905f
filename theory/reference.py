"""The reference of the library, made from its docstrings: `python theory/reference.py [FOLDER]`.

Writes web pages into FOLDER (`build/reference` if none is given), to be opened at `index.html`.
Names of the library in backticks become links. Those that lead nowhere are listed, and the exit
status is then 1. Needs the extra `docs`.
"""

from __future__ import annotations

import builtins
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc.doc
import pdoc.render
from pdoc.render_helpers import relative_link

import constrained_growth as cg

LIBRARY = "constrained_growth"

MODULES = (
    LIBRARY,
    *(
        f"{LIBRARY}.{name}"
        for name in (
            "blocks",
            "candidates",
            "norms",
            "rules",
            "solution",
            "statistics",
            "curvature",
            "monitoring",
            "insertion",
            "training",
            "checkpoint",
            "plotting",
            "verification",
            "testing",
            "integrations.lightning",
            "integrations.trainer",
            "integrations.transformers",
            "bookkeeping",
        )
    ),
)
"""What is public. A name that several have is linked to the first of them."""

INSTANCES = {
    "problem": "GrowthProblem",
    "solution": "Solution",
    "record": "GrowthRecord",
    "history": "History",
}
"""Variables of the docstrings, and their classes."""

_REFERENCE = re.compile(r"(?<![`\[])`((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(\(\))?`(?![`\]])")
_RAISED = re.compile(r"^Raises:\n((?: .*\n?|\n)+)", flags=re.MULTILINE)


class Reference:
    """The documented modules, and where each of their names is."""

    def __init__(self) -> None:
        for name in cg.__all__:
            getattr(cg, name)  # which the package imports when it is first used
        self.modules = {name: pdoc.doc.Module(importlib.import_module(name)) for name in MODULES}
        self.places: dict[str, tuple[str, str]] = {}
        for module in self.modules:
            for doc in self.documented(module):
                for name in (doc.qualname, f"{module}.{doc.qualname}".rstrip(".")):
                    self.places.setdefault(name.removeprefix(f"{LIBRARY}."), (module, doc.qualname))

    def documented(self, module: str) -> Iterator[pdoc.doc.Doc]:
        """The module and everything in it that is our own."""
        todo: list[pdoc.doc.Doc] = [self.modules[module]]
        while todo:
            doc = todo.pop(0)
            yield doc
            if isinstance(doc, pdoc.doc.Namespace):
                for member in doc.members.values():
                    ours = member.taken_from[0].partition(".")[0] == LIBRARY
                    alias = isinstance(member, pdoc.doc.Variable) and doc.kind == "module"
                    if (ours and not isinstance(member, pdoc.doc.Module)) or alias:
                        todo.append(member)

    def link(self) -> list[str]:
        """Turn the names in the docstrings into links; returns what is wrong, a line each."""
        wrong = list[str]()
        for module in self.modules:
            for doc in self.documented(module):
                found = list[str]()
                doc.docstring = self._linked(doc.docstring, module, found)
                wrong += [f"{module}: {doc.qualname}: {line}" for line in found]
        return wrong

    def _linked(self, text: str, module: str, wrong: list[str]) -> str:
        def replace(match: re.Match[str]) -> str:
            name = match[1].removeprefix("cg.").removeprefix(f"{LIBRARY}.")
            head, _, rest = name.partition(".")
            ours = match[1] != name or (rest and (head in INSTANCES or self._ours(head)))
            if rest and head in INSTANCES:
                name = f"{INSTANCES[head]}.{rest}"
            place = self.places.get(name)
            if ours and place is None:
                wrong.append(f"{match[0]} leads nowhere")
            public = rest or name[0].isupper() or name in cg.__all__
            if place is None or not public:
                return match[0]
            # pdoc makes a link of its own from a dot and a name, also within an address
            target = f"#{place[1].replace('.', '%2E')}" if place[1] else ""
            return f"[{match[0]}]({relative_link(module, place[0])}{target})"

        for raised in _RAISED.findall(text):
            for name in re.findall(r"^ {1,4}(\w+):", raised, flags=re.MULTILINE):
                if name not in self.places and not hasattr(builtins, name):
                    wrong.append(f"{name} is no error")
        if "][" in re.sub(r"`.*?`|^ {4,}.*$|^>>> .*$", "", text, flags=re.MULTILINE):
            wrong.append("has a link in the syntax of another tool")
        return _REFERENCE.sub(replace, text)

    def _ours(self, head: str) -> bool:
        return head in self.places and (head[0].isupper() or head in cg.__all__)

    def write(self, folder: Path) -> None:
        """Render all pages."""
        pdoc.render.configure(docformat="google", show_source=False)
        for name, module in self.modules.items():
            file = folder.joinpath(*name.split(".")).with_suffix(".html")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(pdoc.render.html_module(module, self.modules), encoding="utf-8")
        (folder / "index.html").write_text(pdoc.render.html_index(self.modules), encoding="utf-8")
        (folder / "search.js").write_text(pdoc.render.search_index(self.modules), encoding="utf-8")


def main(folder: Path) -> list[str]:
    """Write the reference into a folder; returns what is wrong with it, a line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = Reference()
        wrong = reference.link()
        reference.write(folder)
    return wrong


if __name__ == "__main__":
    found = main(Path(*sys.argv[1:2] or ["build/reference"]))
    print("\n".join(found) or "Every name leads somewhere.")
    sys.exit(bool(found))
