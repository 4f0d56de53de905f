"""Growing inside a real Lightning fit: grows, checkpoints, resumes, logs."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, candidate, classified, feedforward, refused
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from processes import together
from torch import Tensor, nn
from torch.utils.data import DataLoader

import constrained_growth as cg
from constrained_growth.integrations.lightning import GrowthCallback
from constrained_growth.training import NewLayers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Classifier(LightningModule):
    """AdamW in two groups that a user has put in an order of her own."""

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = feedforward(2, 4, 4, 3)
        self.reverse = reverse

    def training_step(self, batch: Any, index: int) -> Tensor:
        input, target = batch
        loss = nn.functional.cross_entropy(self.net(input), target)
        self.log("seen", loss)
        return loss

    def configure_optimizers(self) -> Any:
        parameters = list(self.net.parameters())
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() == 1]
        if self.reverse:
            matrices.reverse()
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def batched(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)


def callback(data: Any, **options: Any) -> GrowthCallback:
    return GrowthCallback(
        nn.CrossEntropyLoss(),
        data,
        model=lambda module: module.get_submodule("net"),
        when=lambda losses: len(losses) >= 2,
        **{"candidates": [candidate("1"), candidate("3")], "max_insertions": 2, **options},
    )


def fit(
    folder: Path,
    growth: GrowthCallback,
    data: Any,
    epochs: int,
    module: Any = None,
    processes: int = 1,
    **options: Any,
) -> tuple[Classifier, Trainer]:
    module = module or Classifier()
    trainer = Trainer(
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[growth, ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
        logger=CSVLogger(folder, version=str(epochs)),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batched(data), **options)
    return module, trainer


@pytest.mark.parametrize("reverse", [False, True])
def test_grows_and_goes_on_from_a_checkpoint(reverse: bool, tmp_path: Path) -> None:
    """Also when the optimizer has its parameters in another order than the one that was saved."""
    data = classified(40, batch=8)
    growth = callback(data)
    module, _ = fit(tmp_path / "whole", growth, data, 7)
    assert [one.epoch for one in growth.history.insertions] == [2, 4]
    assert growth.history.layers == [3, 3, 4, 4, 5, 5, 5]
    assert len(growth.history.metrics["seen"]) == 7
    again = callback(data)
    fresh = Classifier(reverse=reverse)
    path = tmp_path / "whole" / "epoch=2.ckpt"  # between the insertions
    fit(tmp_path / "part", again, data, 7, fresh, ckpt_path=path, weights_only=True)
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
    assert again.history.losses == growth.history.losses
    assert again.grower is not None
    assert growth.grower is not None
    assert again.grower.record == growth.grower.record


def test_all_that_was_measured_goes_to_the_loggers(tmp_path: Path) -> None:
    data = classified(40, batch=8)
    growth = callback(data, max_insertions=1)
    _, trainer = fit(tmp_path, growth, data, 4)
    assert trainer.log_dir is not None
    rows = list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").open()))
    logged = {
        key: row[key] for row in rows for key in row if key.startswith("growth/") and row[key]
    }
    (one,) = growth.history.rounds
    for name, value in one.sensitivities.items():
        assert float(logged[f"growth/sensitivity/{name}"]) == pytest.approx(value, rel=1e-6)
    assert float(logged["growth/layers"]) == 4


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    data = classified(40, batch=8)
    growth = callback(data)
    module, _ = fit(tmp_path / "one", growth, data, 3)
    fit(tmp_path / "two", growth, data, 3, module)
    assert len(growth.history.losses) == 6
    assert growth.grower is not None
    assert len(growth.grower.record.insertions) == 2


def test_a_checkpoint_without_growth_is_refused(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), batched(data))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with refused(cg.CheckpointError, "without a GrowthCallback"):
        fit(tmp_path, callback(data), data, 2, ckpt_path=tmp_path / "plain.ckpt")


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    data = classified(16, batch=8)
    with refused(cg.TrainingError, "one optimizer", "2", "cg.Grower"):
        fit(tmp_path, callback(data), data, 1, Two())


# --- two processes ------------------------------------------------------------------------------


def halves(data: Any, number: int) -> Any:
    """A process's half of every global batch."""
    return [(x[number::2], y[number::2]) for x, y in data]


def drawn(number: int, data: Any) -> GrowthCallback:
    """Its blocks and policies; every process draws other ones."""
    torch.manual_seed(number)
    blocks = {site: cg.blocks.ResidualMLP(4, 3, nn.Tanh()) for site in ("1", "3")}
    policy = NewLayers(warmup=4)
    sites = [candidate(site, block=block) for site, block in blocks.items()]
    return callback(data, candidates=sites, after_insertion=policy)


def outcome(module: nn.Module, growth: GrowthCallback) -> dict[str, Any]:
    rounds = growth.history.insertions
    return {
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "losses": growth.history.losses,
        "chosen": [one.chosen for one in rounds],
        "sensitivities": [list(one.sensitivities.values()) for one in rounds],
    }


def assert_close(found: Any, expected: Any) -> None:
    for key in ("chosen", "losses", "sensitivities"):
        assert len(expected[key]) > 1
    assert found["chosen"] == expected["chosen"]
    for key in ("losses", "sensitivities"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
    assert list(found["weights"]) == list(expected["weights"])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-9, atol=1e-12, msg=name)


def fit_with_another(number: int, folder: Path) -> None:
    """As one process would, and again from a checkpoint."""
    warnings.simplefilter("ignore")
    kept = torch.load(folder / "expected", weights_only=True)
    data = halves(kept["data"], number)
    growth = drawn(number, data)
    module, trainer = fit(folder / "whole", growth, data, 7, processes=2)
    assert trainer.world_size == 2
    assert_close(outcome(module, growth), kept["outcome"])

    again, fresh = drawn(number, data), Classifier()
    path = folder / "whole" / "epoch=2.ckpt"  # between the insertions
    fit(folder / "part", again, data, 7, fresh, 2, ckpt_path=path, weights_only=True)
    assert_same(outcome(fresh, again), outcome(module, growth))

    assert again.grower is not None
    again.grower.step(number + 1.0)
    losses = again.state_dict()["losses"]  # in the row that is open
    assert losses == [{"sum": 1.0, "count": 1}, {"sum": 2.0, "count": 1}]


def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    data = classified(40, batch=8)
    growth = drawn(0, data)
    module, _ = fit(tmp_path / "alone", growth, data, 7)
    kept = {"data": data, "outcome": outcome(module, growth)}
    torch.save(kept, tmp_path / "expected")
    together(fit_with_another, tmp_path, tmp_path)


def test_processes_that_do_not_bring_the_model_back_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, default_root_dir=tmp_path
    )
    with refused(cg.TrainingError, "2 processes", 'strategy="ddp"', "DDPStrategy"):
        callback([]).setup(trainer, Classifier(), "fit")
