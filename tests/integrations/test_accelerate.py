"""The two calls in a loop with Accelerate, and a checkpoint of it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from helpers import assert_same, candidate, classified, feedforward
from processes import together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def train(data: Any, epochs: int, path: Path, batch_size: int = 10) -> tuple[nn.Module, cg.History]:
    """Go on from the checkpoint if it is there, and write one after each epoch."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loader = feedforward(2, 4, 4, 3), DataLoader(TensorDataset(*data), batch_size=batch_size)
    resumed = cg.checkpoint.resume(path, model, adamw) if path.exists() else None
    optimizer = resumed.optimizer if resumed else adamw(model.parameters())
    prepared, trained, batches = accelerator.prepare(model, optimizer, loader)
    sites = [candidate("1"), candidate("3")]
    grower = cg.Grower(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        batches,
        candidates=sites,
        when=lambda losses: len(losses) >= 2,
        max_insertions=2,
        wrapper=prepared,
    )
    if resumed:
        grower.load_state_dict(resumed.checkpoint.states["grower"])
    while len(grower.history.losses) < epochs:
        for input, target in batches:
            with accelerator.accumulate(prepared):
                loss = nn.functional.cross_entropy(prepared(input), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                trained.step()
                trained.zero_grad()
            grower.step(accelerator.gather(loss).mean())  # type: ignore[union-attr]
        grower.maybe_grow()
        cg.checkpoint.save(path, model, optimizer=optimizer, record=grower.record, grower=grower)
    return model, grower.history


def test_grows_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    ((x, y),) = classified(40)
    whole, history = train((x, y), 6, tmp_path / "whole")
    assert [one.epoch for one in history.insertions] == [2, 4]
    train((x, y), 3, tmp_path / "part")
    again, resumed = train((x, y), 6, tmp_path / "part")
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    assert resumed.losses == history.losses


@pytest.mark.parametrize("part", ["all", "half"])
def test_an_offloaded_model_is_refused(part: str, tmp_path: Path) -> None:
    model: Any = feedforward(2, 4, 4, 3)
    if part == "all":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places: Any = {name: "disk" if name > "2" else "cpu" for name, _ in model.named_children()}
        dispatch_model(model, places, torch.device("cpu"), offload_dir=tmp_path, force_hooks=True)
    (batch,) = classified(5)
    words = "on the meta device and has no values; load the whole model first"
    with pytest.raises(cg.CandidateError, match=words):
        cg.find_candidates(model, batch[0])
    with pytest.raises(cg.CandidateError, match=words):
        cg.GrowthProblem(model, nn.CrossEntropyLoss(), [batch], [candidate("1")])


def test_a_dispatched_model_grows() -> None:
    (batch,) = classified(40)
    found = []
    for hooks in (False, True):
        torch.manual_seed(0)
        model: Any = feedforward(2, 4, 4, 3)
        if hooks:  # as on several devices, where each module moves its input
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
        sites = cg.find_candidates(model, batch[0])
        solution = cg.solve(cg.GrowthProblem(model, nn.CrossEntropyLoss(), [batch], sites))
        y = model(batch[0])
        cg.insert(model, solution)
        torch.testing.assert_close(model(batch[0]), y)
        found.append(solution.multipliers)
    assert_same(*found)


def train_with_another(number: int, data: Any, expected: Any, folder: Path) -> None:
    """As one process would with the same global batches, and again from a checkpoint."""
    warnings.simplefilter("ignore")
    whole, history = train(data, 6, folder / "whole", batch_size=5)
    assert [one.chosen for one in history.insertions] == expected["chosen"]
    torch.testing.assert_close(history.losses, expected["losses"], rtol=1e-9, atol=1e-12)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-9, atol=1e-12)
    train(data, 3, folder / "part", batch_size=5)
    again, resumed = train(data, 6, folder / "part", batch_size=5)
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    assert resumed.losses == history.losses


def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    ((x, y),) = classified(40)
    model, history = train((x, y), 6, tmp_path / "alone")
    chosen = [one.chosen for one in history.insertions]
    assert len(chosen) == 2
    expected = {"chosen": chosen, "losses": history.losses, "weights": dict(model.state_dict())}
    together(train_with_another, tmp_path, (x, y), expected, tmp_path)
