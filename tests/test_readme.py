"""Every Python example of the README runs, in the order in which it is read."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(capsys):
    torch.set_default_dtype(torch.float32)  # as a reader has it
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) >= 5
    namespace = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
    assert namespace["record"].insertions[0].after in ("1", "3")
    assert namespace["solution"].decision.reason == "10 standard errors"
    assert "KKTResiduals" in capsys.readouterr().out
