"""Every Python example of the README runs, in the order in which it is read."""

import re
import sys
import types
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


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
    assert namespace["record"].insertions[0].after in ("1", "3")
    assert namespace["solution"].decision.reason == "the best of the narrow ones"
    assert table in printed
    assert len(namespace["growth"].insertions) == 2
    assert namespace["gpt"].config.n_layer == len(namespace["gpt"].transformer.h) == 3
    assert "True\npassed\nCVXPY, CLARABEL: optimal" in printed  # both checks of the last example
