"""What becomes of a block in a model: solved, inserted, recorded, replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.candidates.candidate import Candidate
from constrained_growth.errors import RecordError
from constrained_growth.insertion.insert import insert
from constrained_growth.insertion.record import GrowthRecord
from constrained_growth.insertion.replay import replay
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision
from constrained_growth.solve import solve
from constrained_growth.testing.case import Case, autograd_multipliers, cotangent, differ, or_zero


class _Host(nn.Module):
    """A model with one site: x, times a parameter that is 1, with the context of the case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.site = _Site(case.x)
        self._context = case.context

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x, *self._context.args, **self._context.kwargs)


class _Site(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.new_ones(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * self.scale


def works_in_a_model(case: Case) -> Iterator[str]:
    """`solve`, `insert` and `replay`."""
    model, delta = _Host(case).eval(), cotangent(case)
    candidate = Candidate("site", case.fresh(), name="block")
    problem = GrowthProblem(
        model, lambda output, target: (output * target).sum(), [(case.x, delta)], [candidate]
    )
    solution = solve(problem, lambda _: Decision(("block",)), stationarity=False)
    expected = autograd_multipliers(case, case.fresh(), delta)
    for name, value in solution.multipliers["block"].items():
        if differ(value, or_zero(expected[name], value)):
            yield f"in a model solve gives another multiplier of {name!r} than autograd."
    record = GrowthRecord.from_json(insert(model, solution).to_json())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = _replayed(_Host(case).eval(), record, case)
    again.load_state_dict(model.state_dict())
    if not torch.equal(again(case.x), model(case.x)):
        yield "a model replayed from the record, with the state dict loaded, is not the same."


def _replayed(model: nn.Module, record: GrowthRecord, case: Case) -> nn.Module:
    try:
        return replay(model, record)
    except RecordError:  # a block of the user's own: it has to be passed
        return replay(model, record, blocks={"block": case.fresh()})
