"""Rules that need the model, on two processes with a shard each, against one with all the data."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CROSS_ENTROPY, classified, feedforward, nothing_left_behind, refused
from processes import together
from torch import nn

import constrained_growth as cg

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def compare(number: int) -> None:
    groups: list[Any] = [dist.new_group([each]) for each in range(2)]
    torch.manual_seed(1)
    model, data = feedforward(2, 4, 4, 3, activation=nn.Tanh), classified(19, batch=7)
    candidates = [
        cg.Candidate("1", cg.blocks.ResidualMLP(4, 2, torch.tanh)),
        cg.Candidate("3", cg.blocks.ResidualLinear(4, torch.tanh)),
    ]
    shard = data[:2] if number == 0 else data[2:]
    problems = [
        cg.GrowthProblem(model, CROSS_ENTROPY, part, candidates, group=group)
        for part, group in ((shard, None), (data, groups[number]))
    ]
    rules: list[Any] = [
        lambda: cg.TrustRegion(max_products=2),
        lambda: cg.Budget(parameters=20, multiply_adds=16),
        lambda: cg.rules.Stable(functools.partial(torch.optim.SGD, lr=0.1)),
    ]
    for rule in rules:
        with nothing_left_behind(model):
            together, single = (cg.solve(problem, rule=rule()).decision for problem in problems)
        assert together.chosen == single.chosen != ()
        for name, values in single.values.items():
            for key, value in values.items():
                torch.testing.assert_close(together.values[name][key], value, rtol=1e-6, atol=1e-9)
        for key in ("predicted", "actual", "gain"):
            if key in single.evidence:
                assert together.evidence[key] == pytest.approx(single.evidence[key], rel=1e-6)
        parts = [decision.evidence.get("stability", {}) for decision in (together, single)]
        assert parts[0] == {name: pytest.approx(part, rel=1e-9) for name, part in parts[1].items()}
    step = cg.solve(problems[1]).multipliers["1"]
    slopes = [cg.directional_derivative(problem, "1", step) for problem in problems]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-10)
    with nothing_left_behind(model), refused(cg.RuleError, "Trial", "several processes"):
        cg.solve(problems[0], rule=cg.rules.Trial(3, torch.optim.Adam))


def test_two_processes(tmp_path: Path) -> None:
    together(compare, tmp_path)
