"""Growing inside a real Lightning fit: grows, checkpoints, resumes, logs."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, candidate, classified, feedforward, refused
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from processes import together
from torch import Tensor, nn
from torch.utils.data import DataLoader

import constrained_growth as cg
from constrained_growth.integrations.lightning import GrowthCallback, load_from_checkpoint
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
    more: Any = (),
    accumulate: int = 1,
    **options: Any,
) -> tuple[Classifier, Trainer]:
    module = module or Classifier()
    trainer = Trainer(
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[growth, *more, ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
        logger=CSVLogger(folder, version=str(epochs)),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batched(data), **options)
    return module, trainer


def test_grows_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Also when the optimizer has its parameters in another order than the one that was saved."""
    data = classified(24, batch=8)
    growth = callback(data)
    module, trainer = fit(tmp_path / "whole", growth, data, 5)
    assert [one.epoch for one in growth.history.insertions] == [2, 4]
    assert growth.history.layers == [3, 3, 4, 4, 5]
    assert len(growth.history.metrics["seen"]) == 5
    for reverse in (False, True):
        again = callback(data)
        fresh = Classifier(reverse=reverse)
        path = tmp_path / "whole" / "epoch=2.ckpt"  # between the insertions
        fit(tmp_path / f"part {reverse}", again, data, 5, fresh, ckpt_path=path, weights_only=True)
        assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
        assert again.history.losses == growth.history.losses
        assert again.grower is not None
        assert growth.grower is not None
        assert again.grower.record == growth.grower.record

    assert trainer.log_dir is not None  # all that was measured goes to the loggers
    rows = list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").open()))
    logged = [row for row in rows if row["growth/layers"]]
    assert [float(row["growth/layers"]) for row in logged] == [4, 5]
    for name, value in growth.history.rounds[-1].sensitivities.items():
        found = [row[f"growth/sensitivity/{name}"] for row in rows]
        assert float([text for text in found if text][-1]) == pytest.approx(value, rel=1e-6)


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    growth = callback(data)
    module, _ = fit(tmp_path / "one", growth, data, 3)
    fit(tmp_path / "two", growth, data, 3, module)
    assert len(growth.history.losses) == 6
    assert growth.grower is not None
    assert len(growth.grower.record.insertions) == 2


def test_a_callback_is_for_one_module(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    growth = callback(data)
    fit(tmp_path / "one", growth, data, 1)
    with refused(cg.TrainingError, "another model", "new GrowthCallback"):
        fit(tmp_path / "two", growth, data, 1)


def test_the_best_checkpoint_from_before_an_insertion(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    module, trainer = fit(tmp_path, callback(data), data, 3, Evaluated())
    before = tmp_path / "epoch=0.ckpt"
    with refused(cg.CheckpointError, "fresh module", "trainer.test(Module(), loader"):
        trainer.test(module, batched(data), ckpt_path=before, verbose=False)
    trainer.test(Evaluated(), batched(data), ckpt_path=before, verbose=False)


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


class ByHand(Classifier):
    """Two optimizers by manual optimization; `training_step` returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *rest = [self.net[i].parameters() for i in (0, 2, 4)]
        return [
            torch.optim.Adam(first, lr=0.02),
            torch.optim.SGD([p for part in rest for p in part], lr=0.1, momentum=0.9),
        ]


def test_manual_optimization_by_several_optimizers(tmp_path: Path) -> None:
    data = classified(24, batch=8)
    growth = callback(data)
    module, trainer = fit(tmp_path / "whole", growth, data, 5, ByHand())
    trained = [id(p) for one in trainer.optimizers for g in one.param_groups for p in g["params"]]
    assert sorted(trained) == sorted(id(p) for p in module.parameters())
    assert [one.epoch for one in growth.history.insertions] == [2, 4]
    with torch.no_grad():  # the loss that it found itself is that of the data
        whole = [torch.cat(part) for part in zip(*data, strict=True)]
        now = nn.functional.cross_entropy(module.net(whole[0]), whole[1])
    assert growth.history.losses[-1] == pytest.approx(float(now), rel=1e-6)
    assert growth.history.steps == [len(data) * epoch for epoch in range(1, 6)]
    again, fresh = callback(data), ByHand()
    path = tmp_path / "whole" / "epoch=2.ckpt"
    fit(tmp_path / "part", again, data, 5, fresh, ckpt_path=path, weights_only=True)
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
    assert again.history.losses == growth.history.losses


class Pair(Classifier):
    """Two networks with an optimizer each, of which one grows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        kept = torch.optim.SGD(self.other.parameters(), lr=0.1)
        return [kept, torch.optim.AdamW(self.net.parameters(), lr=0.02)]

    def training_step(self, batch: Any, index: int) -> Tensor:
        input, target = batch
        loss = nn.functional.cross_entropy(self.net(input + self.other(input)), target)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss


def test_an_optimizer_of_another_network_has_no_say(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    whole, trainer = fit(tmp_path / "whole", callback(data), data, 5, Pair())
    assert [len(one.param_groups[0]["params"]) for one in trainer.optimizers] == [2, 10]
    path = tmp_path / "whole" / "epoch=3.ckpt"
    again, _ = fit(tmp_path / "more", callback(data), data, 5, Pair(), ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Silent(Classifier):
    """Steps of size 0, so that losses are those of the data."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("every", [1, 4])
def test_losses_and_steps_where_gradients_are_accumulated(every: int, tmp_path: Path) -> None:
    data = classified(48, batch=8)
    growth, module = callback(data, max_insertions=0), Silent()
    for epochs in (2, 1):  # the second trainer begins to count again
        fit(tmp_path, growth, data, epochs, module, accumulate=every)
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(module.net(x), y)) for x, y in data]
    assert growth.history.losses == pytest.approx([sum(losses) / 6] * 3, rel=1e-6)
    per_epoch = -(-6 // every)  # Lightning steps on the last batch
    assert growth.history.steps == [per_epoch, 2 * per_epoch, 3 * per_epoch]


class Evaluated(Classifier):
    """With steps of evaluation."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.validation_step(batch, index)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])


def test_checkpoints_are_evaluated_and_loaded(tmp_path: Path) -> None:
    """By the trainer that wrote them, by another, and without one; also weights alone."""
    data = classified(16, batch=8)
    weights = ModelCheckpoint(
        tmp_path, filename="weights", save_weights_only=True, every_n_epochs=4
    )
    module, trainer = fit(tmp_path, callback(data), data, 4, Evaluated(), more=[weights])
    outputs = [module.net(x) for x, _ in data]
    other = Trainer(
        accelerator="cpu",
        callbacks=[callback(data)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    quiet: Any = {"weights_only": True, "verbose": False}
    path, alone = tmp_path / "epoch=3.ckpt", tmp_path / "weights.ckpt"
    for one, here in ((trainer, module), (other, Evaluated())):
        predicted: Any = one.predict(here, batched(data), ckpt_path=path, weights_only=True)
        assert all(map(torch.equal, predicted, outputs))
        (seen,) = one.validate(here, batched(data), ckpt_path=path, **quiet)
        assert one.test(here, batched(data), ckpt_path=path, **quiet) == [seen]
        assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(here).keys()
    with refused(cg.CheckpointError, "differ in", "fresh module", "load_from_checkpoint"):
        trainer.validate(module, batched(data), ckpt_path=tmp_path / "epoch=0.ckpt", **quiet)

    trainer.validate(Evaluated(), batched(data), ckpt_path=alone, **quiet)
    assert "callbacks" not in torch.load(alone, weights_only=True)
    grows: Any = {"model": lambda module: module.get_submodule("net"), "weights_only": True}
    for file in (path, alone):
        found = load_from_checkpoint(Evaluated, file, reverse=True, **grows)
        assert type(found) is Evaluated
        assert found.reverse
        assert_same(dict(found.state_dict()), dict(module.state_dict()))
    trainer.save_checkpoint(tmp_path / "late.ckpt", weights_only=True)
    with refused(cg.CheckpointError, "without a GrowthCallback", "weights alone", "was over"):
        load_from_checkpoint(Evaluated, tmp_path / "late.ckpt", **grows)
    wrong: Any = 5
    with refused(cg.TrainingError, "module_class=5"):
        load_from_checkpoint(wrong, tmp_path / "late.ckpt", **grows)


def test_a_module_without_forward_is_refused_before_training(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    growth = GrowthCallback(nn.CrossEntropyLoss(), data)
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    words = ["Classifier has no forward()", "GrowthCallback(model=lambda m: m.net)"]
    with refused(cg.TrainingError, *words):
        fit(tmp_path, growth, data, 1, module)
    assert_same(dict(module.state_dict()), before)


@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
)
def test_averages_of_the_weights_grow_too(average: Any, tmp_path: Path) -> None:
    data = classified(16, batch=8)
    growth, weights = callback(data), average()
    module, _ = fit(tmp_path, growth, data, 5, more=[weights])
    assert len(growth.history.insertions) == 2
    shapes = {name: p.shape for name, p in module.named_parameters()}
    kept = weights._average_model
    kept = getattr(kept, "module", kept)
    assert {name: p.shape for name, p in kept.named_parameters()} == shapes
    assert all(bool(p.isfinite().all()) for p in kept.parameters())
    assert "on_load_checkpoint" not in vars(kept)


def test_an_average_is_resumed(tmp_path: Path) -> None:
    data = classified(16, batch=8)
    module, _ = fit(tmp_path / "a", callback(data), data, 5, more=[EMAWeightAveraging(decay=0.5)])
    fresh, weights = Classifier(), EMAWeightAveraging(decay=0.5)
    options: Any = {"ckpt_path": tmp_path / "a" / "epoch=2.ckpt", "weights_only": True}
    fit(tmp_path / "b", callback(data), data, 5, fresh, more=[weights], **options)
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))


def test_mixed_precision(tmp_path: Path) -> None:
    """λ is that of the parameters' own precision."""
    torch.set_default_dtype(torch.float32)
    data = [(x.float(), y) for x, y in classified(40, batch=8)]
    growth = callback(data, max_insertions=1)
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=3,
        callbacks=[growth],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, batched(data))
    (one,) = growth.history.insertions
    assert len(one.new_parameters) == 2
    assert all(p.dtype == torch.float32 for p in module.parameters())


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
    module, trainer = fit(folder / "whole", growth, data, 5, processes=2)
    assert trainer.world_size == 2
    assert_close(outcome(module, growth), kept["outcome"])

    again, fresh = drawn(number, data), Classifier()
    path = folder / "whole" / "epoch=2.ckpt"  # between the insertions
    fit(folder / "part", again, data, 5, fresh, 2, ckpt_path=path, weights_only=True)
    assert_same(outcome(fresh, again), outcome(module, growth))

    assert again.grower is not None
    again.grower.step(number + 1.0)
    losses = again.state_dict()["losses"]  # in the row that is open
    assert losses == [{"sum": 1.0, "count": 1}, {"sum": 2.0, "count": 1}]


def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    data = classified(24, batch=8)
    growth = drawn(0, data)
    module, _ = fit(tmp_path / "alone", growth, data, 5)
    kept = {"data": data, "outcome": outcome(module, growth)}
    torch.save(kept, tmp_path / "expected")
    together(fit_with_another, tmp_path, tmp_path)


def test_processes_that_do_not_bring_the_model_back_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, default_root_dir=tmp_path
    )
    with refused(cg.TrainingError, "2 processes", 'strategy="ddp"', "DDPStrategy"):
        callback([]).setup(trainer, Classifier(), "fit")


def test_the_norm_is_the_recommended_one_or_the_one_given(tmp_path: Path) -> None:
    data, norms = classified(16, batch=8), list[Any]()

    def look(solution: cg.Solution) -> cg.rules.When:
        norms.extend(s.norm for s in solution.sensitivities.values())
        return cg.rules.When.NEVER

    for norm in (None, cg.norms.Frobenius()):
        fit(tmp_path, callback(data, norm=norm, confirm=look), data, 3)
    assert norms == [cg.norms.recommended()] * 2 + [cg.norms.Frobenius()] * 2
    with refused(cg.TrainingError, "norm='fro'", "cg.norms.Frobenius()"):
        fit(tmp_path, callback(data, norm="fro"), data, 4)
