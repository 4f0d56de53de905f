"""The demonstration: train to a plateau, ask where a layer would help, insert it, train on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.experiments.data import Split, digits, two_spirals
from constrained_growth.experiments.networks import feedforward

LOSS = nn.CrossEntropyLoss()

DATA: dict[str, Callable[..., Split]] = {"digits": digits, "spirals": two_spirals}


@dataclass(frozen=True)
class Setting:
    """How a demonstration trains: full-batch gradient descent, the same before and after.

    The plateau is reached when the best loss of the last `window` epochs is below the best before
    them by no more than the fraction `tolerance`; `max_epochs` ends training in any case.
    """

    hidden: tuple[int, ...]
    learning_rate: float
    momentum: float = 0.0
    he_init: bool = False
    window: int = 200
    tolerance: float = 0.05
    max_epochs: int = 4000
    epochs_after: int = 1500


SETTINGS = {
    "digits": Setting(hidden=(5, 5, 5), learning_rate=0.01, momentum=0.9, he_init=True),
    "spirals": Setting(hidden=(4, 4), learning_rate=0.2),
}
"""The spirals are trained as in the source's Exp9, up to a plateau.

The setting for the digits was chosen on eight seeds by the curves of the kept network: narrow
enough for the loss to flatten out above 0, steps short enough for it to fall without jumps, and
initial weights that leave no layer dead (learning rate 0.05 without momentum had large jumps).
"""

Numbers = dict[str, Any]
"""What `--json` writes."""


def run_demo(
    data: str = "digits",
    seed: int = 0,
    *,
    rule: cg.rules.DecisionRule | None = None,
    max_epochs: int | None = None,
    epochs_after: int | None = None,
    dtype: torch.dtype = torch.float32,
    on_solved: Callable[[Numbers, cg.Solution], None] = lambda found, solution: None,
) -> Numbers:
    """Train a small ReLU network to a plateau, insert the layer of largest sensitivity, train on.

    The candidates are an identity layer and a residual block after each ReLU; by default the
    recommended decision is inserted. The network as it was trains on beside the grown one, with the
    same optimizer and for the same number of epochs. `on_solved` is called before the insertion,
    with what is known by then.

    Returns:
        Settings, the table of candidates, the decision, and for the network "kept" as it was and
        the "grown" one training loss (nats), test accuracy and size "at_insertion" and "at_end",
        and training losses after 0, 1, … epochs.

    Raises:
        DataError: There are no data of that name.
    """
    if data not in DATA:
        raise cg.DataError(f"data={data!r} is none of {', '.join(DATA)}.")
    setting = SETTINGS[data]
    limit = setting.max_epochs if max_epochs is None else max_epochs
    further = setting.epochs_after if epochs_after is None else epochs_after
    split = DATA[data](seed, dtype=dtype)
    layers = (split.num_features, *setting.hidden, split.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept = feedforward(layers, he_init=setting.he_init, dtype=dtype)
        candidates = proposals(setting.hidden, dtype=dtype)
    kept_optimizer = torch.optim.SGD(
        kept.parameters(), lr=setting.learning_rate, momentum=setting.momentum
    )

    def enough(losses: Sequence[float]) -> bool:
        return on_plateau(losses, setting.window, setting.tolerance)

    before = _train(kept, kept_optimizer, split, limit, "to the plateau", enough)
    problem = cg.GrowthProblem(kept, LOSS, [(split.x_train, split.y_train)], candidates)
    solution = cg.solve(problem, rule=rule)
    found: Numbers = {
        "data": data,
        "seed": seed,
        "setting": asdict(setting),
        "layers": layers,
        "plateau_reached": enough(before[:-1]),  # the last answer of the loop
        "stationarity": solution.stationarity,
        "status": solution.status.name,
        "candidates": [
            {
                "name": name,
                "site": s.site,
                "sensitivity": s.value,
                "standard_error": s.standard_error,
                "pinned": s.num_parameters,
                "added": s.num_new_parameters,
            }
            for name, s in solution.sensitivities.items()
        ],
        "chosen": solution.decision.chosen,
        "reason": solution.decision.reason,
        "agreement": solution.agreement,
        "losses_before": before,
    }
    on_solved(found, solution)
    grown, grown_optimizer = copy.deepcopy((kept, kept_optimizer))
    cg.insert(grown, solution, optimizer=grown_optimizer)
    found |= {"kept_at_insertion": score(kept, split), "grown_at_insertion": score(grown, split)}
    found["losses_kept"] = _train(kept, kept_optimizer, split, further, "kept as it was")
    found["losses_grown"] = _train(grown, grown_optimizer, split, further, "grown")
    return found | {"kept_at_end": score(kept, split), "grown_at_end": score(grown, split)}


def proposals(
    hidden: Sequence[int], *, dtype: torch.dtype | None = None
) -> tuple[cg.Candidate, ...]:
    """An identity layer and a residual block after each hidden ReLU."""
    found: list[cg.Candidate] = []
    for depth, width in enumerate(hidden, start=1):
        after = str(2 * depth - 1)
        identity = cg.blocks.IdentityLinear(width, nn.ReLU(), dtype=dtype)
        residual = cg.blocks.ResidualMLP(width, width, nn.ReLU(), pinned="outer", dtype=dtype)
        found.append(cg.Candidate(after, identity, name=f"identity {depth}"))
        found.append(cg.Candidate(after, residual, name=f"residual {depth}"))
    return tuple(found)


def on_plateau(losses: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether the best of the last `window` losses is hardly better than the best before them."""
    if len(losses) <= window:
        return False
    earlier, lately = min(losses[:-window]), min(losses[-window:])
    return earlier - lately <= tolerance * earlier


@torch.no_grad()
def score(model: nn.Module, split: Split) -> Numbers:
    """Training loss, test accuracy and size of a network."""
    right = model(split.x_test).argmax(dim=1) == split.y_test
    return {
        "train_loss": LOSS(model(split.x_train), split.y_train).item(),
        "test_accuracy": right.double().mean().item(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    epochs: int,
    name: str,
    stop: Callable[[Sequence[float]], bool] = lambda losses: False,
) -> list[float]:
    """Training losses after 0, 1, … epochs; before each, `stop` says whether to stop."""
    losses: list[float] = []
    with progress_bar(total=epochs, desc=name, unit=" epochs") as bar:
        while len(losses) < epochs and not stop(losses):
            optimizer.zero_grad()
            loss = LOSS(model(split.x_train), split.y_train)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.update()
    with torch.no_grad():
        return [*losses, LOSS(model(split.x_train), split.y_train).item()]
