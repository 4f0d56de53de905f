"""Every Python example of the README and of the guides runs, in the order of reading."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import constrained_growth as cg

README = Path(__file__).parent.parent / "README.md"
GUIDES = sorted((README.parent / "theory" / "guides").glob("*.md"))


def test_examples_run(capsys, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)  # as a reader has it
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (table,) = re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) >= 8
    module = types.ModuleType("readme")  # where classes can be pickled from, as from __main__
    monkeypatch.setitem(sys.modules, "readme", module)
    namespace = vars(module)
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
        if "cg.replay" in example:
            model, fresh, (x, _) = namespace["model"], namespace["fresh"], namespace["data"][0]
            assert torch.equal(fresh(x), model(x))
    printed = capsys.readouterr().out
    assert namespace["record"].insertions[0].after.startswith("transformer.h.")
    assert all(p.requires_grad for p in namespace["adam"].param_groups[0]["params"])
    assert namespace["solution"].decision.reason == "the best of the narrow ones"
    assert table in printed
    assert len(namespace["grower"].history.losses) == 6
    assert namespace["callback"] in namespace["trainer"].callbacks
    assert namespace["gpt"].config.n_layer == len(namespace["gpt"].transformer.h) == 3
    assert "True\npassed\nCVXPY, CLARABEL: optimal" in printed  # both checks of the last example


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides_run(guide, tmp_path, monkeypatch):
    """A text behind an example is the error that it raises; "…" stands for any words."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    namespace = vars(module)
    pattern = r"```python\n(.*?)```(?:\n*```text\n(.*?)\n```)?"
    examples = re.findall(pattern, guide.read_text(), flags=re.DOTALL)
    assert examples
    for example, error in examples:
        code = compile(example, str(guide), "exec")
        if not error:
            exec(code, namespace)
            continue
        with pytest.raises(cg.GrowthError) as raised:
            exec(code, namespace)
        words = ".*".join(map(re.escape, error.split("…")))
        assert re.fullmatch(words, f"{raised.type.__name__}: {raised.value}", flags=re.DOTALL)
    if guide.stem == "expansion":
        solution, gpt = namespace["solution"], namespace["gpt"]
        assert gpt.config.n_layer == len(gpt.transformer.h) == 6
        assert len(solution.decision.chosen) == 2
        with torch.no_grad():
            held_out = [gpt(**input).loss for input, _ in namespace["held_out"]]
        assert torch.stack(held_out).mean() < solution.loss - 0.1


def test_links_between_pages_lead_somewhere():
    root = README.parent
    pages = [*root.glob("*.md"), *(root / "theory").rglob("*.md")]
    assert len(pages) > 10
    missing = [
        f"{page.relative_to(root)}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not missing
