"""What objects print, in a terminal and in a notebook, says what they hold."""

import functools
import html
import re

import torch
from helpers import candidate, classified, feedforward, solved
from torch import nn

import constrained_growth as cg
from constrained_growth.training import NewLayers
from constrained_growth.verification import check_with_cvxpy

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def cells(shown: str) -> list[list[str]]:
    """The rows of the tables in HTML."""
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    return [
        [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in rows
    ]


def test_a_solution_prints_its_decision_and_a_row_for_each_candidate() -> None:
    model = feedforward(2, 4, 4, 3)
    solution = solved(model, classified(20), candidate("1"), candidate("3"), rule=cg.TopK(1))
    (chosen,) = solution.decision.chosen
    first, second, heads, *rows = str(solution).splitlines()
    rows, kinks = rows[:2], rows[2:]
    assert first == f"insert {chosen} ({solution.decision.reason})"
    assert f"{solution.loss:.6g}" in second
    assert second.endswith(f"20 samples, train mode: {solution.status.name}")
    shares = [s.kink for s in solution.sensitivities.values()]
    assert all(0 < share < 1 for share in shares)
    assert [line.split()[0] for line in kinks] == [f"{share:.2g}" for share in shares]
    assert "s.e." not in heads  # not computed to be printed
    assert [row.split()[-4:] for row in rows] == [
        [s.site, f"{s.value:.4g}", str(s.num_parameters), str(s.num_new_parameters)]
        for s in solution.sensitivities.values()
    ]
    assert [row.startswith("→") for row in rows] == [n == chosen for n in solution.sensitivities]
    error = f"{solution.sensitivities[chosen].standard_error:.2g}"
    marked, other = sorted(cells(solution._repr_html_())[1:], reverse=True)
    assert marked[:3] == ["→", chosen, solution.sensitivities[chosen].site]
    assert (marked[4], other[4]) == (error, "")
    assert len(repr(solution).splitlines()) == 1


def test_a_solution_of_many_candidates_prints_the_largest_and_the_chosen() -> None:
    model = feedforward(2, 4, 3)
    many = [candidate("1", name=f"{index}") for index in range(60)]
    solution = solved(model, classified(20), *many, rule=cg.Fixed("59"))
    lines = str(solution).splitlines()
    assert len(lines) == 3 + 41 + 2
    assert lines[-3].startswith("→  59")
    assert lines[-2] == "and 19 candidates of smaller sensitivity"


def test_a_history_prints_its_epochs_and_insertions() -> None:
    data, seen = classified(16), {"half": lambda output, target: torch.tensor(0.5)}
    options = {"rule": cg.Fixed("1"), "when": cg.rules.Plateau(patience=1, tolerance=0.9)}
    model, loss = feedforward(2, 4, 4, 3), nn.CrossEntropyLoss()
    history = cg.grow(model, SGD, loss, data, epochs=50, metrics=seen, max_insertions=1, **options)
    summary, *rows = cells("<tr><td>" + str(history).splitlines()[0] + "</td></tr>") + cells(
        history._repr_html_()
    )
    decisions, shown = len(history.rounds), len(rows) - 1
    assert summary[0].startswith(f"50 epochs, {decisions} decision")
    assert summary[0].endswith(f"1 with an insertion; {shown} epochs shown")
    assert rows[0] == ["epoch", "step", "loss", "half", "layers", "seconds", "inserted at its end"]
    assert 17 <= shown <= 19
    assert (rows[1][0], rows[-1][0]) == ("1", "50")
    assert all(row[2] == f"{history.losses[int(row[0]) - 1]:.4g}" for row in rows[1:])
    (inserted,) = [row for row in rows[1:] if row[-1]]
    assert (int(inserted[0]), inserted[-1]) == (history.insertions[0].epoch, "+ 1")
    assert str(cg.History()) == "0 epochs, 0 decisions, 0 with an insertion"


def test_a_history_prints_what_was_inserted_before_the_first_step() -> None:
    model = feedforward(2, 4, 4, 3)
    grower = cg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        classified(16),
        candidates=[candidate("1")],
        rule=cg.TopK(1),
    )
    grower.ask()
    grower.step(0.5)
    grower.observe()
    lines = [line for line in str(grower.history).splitlines() if line.strip()[:1].isdigit()]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1"]
    assert lines[1].endswith("+ 1")


def test_proposals_and_reports_are_tables_in_a_notebook() -> None:
    model = feedforward(2, 4, 4, 3)
    found = cg.find_candidates(model, classified(8)[0][0])
    rows = cells(found._repr_html_())
    assert rows[0] == ["after", "block", "parameters", "pinned", "why"]
    assert [row[0] for row in rows[1 : 1 + len(found)]] == [one.after for one in found]
    assert "nothing proposed after" in found._repr_html_()
    x = torch.linspace(-1, 1, 12).unsqueeze(1)
    small = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    small[0].requires_grad_(False)
    one = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(2, 2, torch.tanh))
    report = check_with_cvxpy(cg.GrowthProblem(small, nn.MSELoss(), [(x, x.sin())], [one]))
    rows = cells(report._repr_html_())
    assert [row[0] for row in rows[1 : 1 + len(report.checks)]] == [c.name for c in report.checks]
    assert rows[-1][0] == "1: outer.weight"
    assert "<div>passed</div>" in report._repr_html_()


def test_names_are_escaped() -> None:
    named = candidate("1", name="<b>")
    solution = solved(feedforward(2, 4, 3), classified(20), named, rule=cg.Fixed("<b>"))
    assert "&lt;b&gt;" in solution._repr_html_()
    assert cells(solution._repr_html_())[1][1] == "<b>"


def test_what_watches_and_proposes_says_so_shortly() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(8)
    found = cg.find_candidates(model, data[0][0])
    assert repr(found) == f"Proposals({', '.join(repr(one.name) for one in found)})"
    with cg.monitor(cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, found)) as monitor:
        assert repr(monitor).startswith("Monitor(0 samples, candidates: 1")
    grower = cg.Grower(model, SGD(model.parameters()), nn.CrossEntropyLoss(), data)
    assert repr(grower) == "Grower(Sequential, History(rows: 0; inserted: nothing))"
    assert repr(NewLayers(0.5)) == "NewLayers(scale=0.5, warmup=20)"
