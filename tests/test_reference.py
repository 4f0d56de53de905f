"""The reference is built without a warning, and every name in it leads somewhere."""

import posixpath
import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import constrained_growth as cg

SCRIPT = Path(__file__).parent.parent / "theory" / "reference.py"


def test_the_reference_is_built_and_its_links_lead_somewhere(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    assert script["main"](tmp_path) == []
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("*.html")
    }
    text = pages["constrained_growth.html"]
    assert all(f'id="{name}"' in text for name in cg.__all__ if name[0].isupper())
    assert 'id="solve"' in text
    assert "least-squares multiplier estimates" in text  # a formula and its sentence
    links = 0
    for path, page in pages.items():
        for link in re.findall(r'<a href="([^"]*)"><code>', page):  # ours; of pdoc it is <code><a
            file, _, anchor = unquote(link).partition("#")
            target = posixpath.normpath(posixpath.join(path, "..", file) if file else path)
            assert not anchor or f'id="{anchor}"' in pages[target], (path, link)
            links += 1
    assert links > 200


def test_what_leads_nowhere_is_reported():
    script = runpy.run_path(str(SCRIPT))
    reference = script["Reference"]()
    wrong = list[str]()
    text = (
        "`Sensitivity.value`, `problem.constraints`, `cg.norms.Frobenius`, `x.y`, `solve`;\n"
        "`Sensitivity.valu`, `problem.constraint`, `cg.norm`, [`solve`][cg.solve].\n\n"
        "Raises:\n    RuleError: Fine.\n    RulesError: Not.\n"
    )
    linked = reference._linked(text, "constrained_growth.rules", wrong)
    assert "[`Sensitivity.value`](../constrained_growth.html#Sensitivity%2Evalue)" in linked
    assert (
        "[`problem.constraints`](../constrained_growth.html#GrowthProblem%2Econstraints)" in linked
    )
    assert "[`cg.norms.Frobenius`](norms.html#Frobenius), `x.y`, [`solve`](" in linked
    assert wrong == [
        "RulesError is no error",
        "has a link in the syntax of another tool",
        "`Sensitivity.valu` leads nowhere",
        "`problem.constraint` leads nowhere",
        "`cg.norm` leads nowhere",
    ]
