"""Rules of thumb: places counted by hand; modules skipped by taking them out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.rules import LeastImportant, Placed

LETTERS = "abcdefgh"


@pytest.mark.parametrize(
    ("where", "k", "n", "expected"),
    [
        ("first", 2, 8, "ab"),
        ("last", 2, 8, "gh"),
        ("middle", 1, 8, "d"),
        ("middle", 2, 8, "de"),
        ("middle", 3, 7, "cde"),
        ("interleaved", 1, 8, "h"),
        ("interleaved", 2, 8, "dh"),
        ("interleaved", 4, 8, "bdfh"),
        ("interleaved", 3, 8, "beh"),
        ("upper", 1, 8, "h"),
        ("upper", 2, 8, "fh"),
        ("upper", 4, 8, "efgh"),
        ("upper", 6, 8, "cdefgh"),
        ("upper", 2, 5, "de"),
        ("interleaved", 9, 4, "abcd"),
        ("middle", 9, 4, "abcd"),
        ("upper", 9, 4, "abcd"),
    ],
)
def test_places_by_a_rule_of_thumb(where: Any, k: int, n: int, expected: str) -> None:
    given = {name: cg.Sensitivity(0.0) for name in LETTERS[:n]}
    assert Placed(where, k)(given).chosen == tuple(expected)
    assert Placed(where, k)({}).chosen == ()


def test_a_wrong_place_is_refused() -> None:
    wrong: Any = "lower"
    with pytest.raises(cg.RuleError, match="where='lower' of Placed"):
        Placed(wrong)
    with pytest.raises(cg.RuleError, match="k=0"):
        Placed("upper", 0)


class Scaled(nn.Module):
    """x + strength · tanh(Wx), with another output beside it."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = nn.Linear(4, 4), strength

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.strength * torch.tanh(self.inner(x)), "more"


class Network(nn.Module):
    def __init__(self, *strengths: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(strength) for strength in strengths)
        self.head = nn.Linear(4, 3)
        self.left_out: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x if block is self.left_out else block(x)[0]
        return self.head(x)


def test_least_important_is_what_can_best_be_left_out() -> None:
    model, loss_fn = Network(1.0, 0.1, 0.5, 0.3), nn.CrossEntropyLoss()
    old = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (5, 8)]
    new = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    sites = [*(f"blocks.{i}" for i in range(4)), "head"]
    candidates = [
        cg.Candidate(at, cg.blocks.ResidualMLP(3 if at == "head" else 4, 4, torch.tanh))
        for at in sites
    ]
    problem = cg.GrowthProblem(model, loss_fn, new, candidates)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    decision = cg.solve(problem, LeastImportant(old, k=2)).decision

    def loss() -> float:
        return sum(len(x) * float(loss_fn(model(x), y).detach()) for x, y in old) / 13

    whole, rises = loss(), {}
    for at in sites[:-1]:
        model.left_out = model.get_submodule(at)
        rises[at] = loss() - whole
    model.left_out = None
    assert decision.evidence["rise"] == pytest.approx(rises, abs=1e-12)
    assert decision.chosen == tuple(sorted(rises, key=rises.__getitem__)[:2])
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_old_data_that_can_be_read_once_are_refused() -> None:
    with pytest.raises(cg.DataError, match="data=list_iterator"):
        LeastImportant(iter([]))


def test_old_data_without_batches_are_refused() -> None:
    model = Network(1.0)
    one = cg.Candidate("blocks.0", cg.blocks.ResidualMLP(4, 3, torch.tanh))
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [one])
    with pytest.raises(cg.DataError, match="no batches"):
        cg.solve(problem, LeastImportant([]))
