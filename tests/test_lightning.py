"""Growing inside a real Lightning fit: grows, checkpoints, is taken up again, logs."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, candidate, classified, feedforward, refused
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import constrained_growth as cg
from constrained_growth.integrations.lightning import GrowthCallback

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
        candidates=[candidate("1"), candidate("3")],
        when=lambda losses: len(losses) >= 2,
        **{"max_insertions": 2, **options},
    )


def fit(
    folder: Path, growth: GrowthCallback, data: Any, epochs: int, module: Any = None, **options: Any
) -> tuple[Classifier, Trainer]:
    module = module or Classifier()
    trainer = Trainer(
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
