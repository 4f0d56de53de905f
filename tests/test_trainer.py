"""Growing inside a real `Trainer` of Transformers: grows, checkpoints, is taken up again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, refused
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import constrained_growth as cg
from constrained_growth.integrations.trainer import GrowthCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Counting(Dataset[Any]):
    """Sequences that count upwards modulo 11."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = (torch.arange(8) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


def gpt() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def callback() -> GrowthCallback:
    batch = next(iter(DataLoader(Counting(), batch_size=32)))

    def candidates(model: nn.Module) -> list[cg.Candidate]:
        return [
            cg.Candidate(
                f"transformer.h.{i}.mlp",
                cg.blocks.ResidualMLP(8, 8, nn.GELU(), inner_init=1.0),
            )
            for i in range(2)
        ]

    return GrowthCallback(
        [(batch, None)],
        candidates=candidates,
        when=lambda losses: len(losses) >= 2,
        max_insertions=2,
    )


def train(folder: Path, growth: GrowthCallback, model: nn.Module, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=24,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        logging_steps=4,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting(), callbacks=[growth])
    trainer.train(**options)
    return trainer


def test_grows_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    growth, model = callback(), gpt()
    trainer = train(tmp_path / "whole", growth, model)
    assert [one.step for one in growth.history.insertions] == [8, 16]
    assert growth.history.steps == [4, 8, 12, 16, 20, 24]
    assert len([name for name in model.state_dict() if ".inserted." in name]) == 6
    logged = [row for row in trainer.state.log_history if "growth/layers" in row]
    assert [row["step"] for row in logged] == [8, 16]

    again = callback()
    folder = tmp_path / "whole" / "checkpoint-12"  # between the insertions
    fresh = again.resume(gpt(), folder)
    train(tmp_path / "part", again, fresh, resume_from_checkpoint=str(folder))
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert again.history.losses == growth.history.losses
    assert again.history.steps == growth.history.steps


def test_a_folder_without_growth_is_refused(tmp_path: Path) -> None:
    with refused(cg.CheckpointError, "growth.safetensors", "does not exist"):
        callback().resume(gpt(), tmp_path)


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    growth, model = callback(), gpt()
    train(tmp_path, growth, model)
    train(tmp_path, growth, model)
    assert len(growth.history.losses) == 12
