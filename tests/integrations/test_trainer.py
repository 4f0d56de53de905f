"""Growing inside a real `Trainer` of Transformers: grows, checkpoints, resumes."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same, refused
from peft import LoraConfig, get_peft_model
from processes import together
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.modules import module
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

import constrained_growth as cg
from constrained_growth.integrations.trainer import GrowthCallback
from constrained_growth.integrations.trainer import own_loss as trainer_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Counting(Dataset[Any]):
    """Sequences that count upwards modulo 11."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = (torch.arange(8) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


def gpt(vocabulary: int = 11) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def callback(data: Any = None, **options: Any) -> GrowthCallback:
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
        data or [(batch, None)],
        **options,
        candidates=candidates,
        when=lambda losses: len(losses) >= 2,
        max_insertions=2,
    )


def train(
    folder: Path,
    growth: GrowthCallback,
    model: nn.Module,
    processes: int = 1,
    loss: Any = None,
    arguments: dict[str, Any] | None = None,
    more: Any = (),
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8 // processes,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **(arguments or {}),
    }
    all_arguments = TrainingArguments(str(folder), **settings)
    trainer = Trainer(
        model,
        all_arguments,
        train_dataset=Counting(),
        eval_dataset=Counting(),
        callbacks=[growth, *more],
        compute_loss_func=loss,
    )
    trainer.train(**options)
    return trainer


def test_grows_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    growth, model = callback(), gpt()
    trainer = train(tmp_path / "whole", growth, model)
    assert [one.step for one in growth.history.insertions] == [4, 8]
    assert growth.history.steps == [2, 4, 6, 8, 10, 12]
    assert len([name for name in model.state_dict() if ".inserted" in name]) == 6
    logged = [row for row in trainer.state.log_history if "growth/layers" in row]
    assert [row["step"] for row in logged] == [4, 8]

    last = GrowthCallback([]).resume(gpt(), tmp_path / "whole" / "checkpoint-12")
    load_model(last, tmp_path / "whole" / "checkpoint-12" / "model.safetensors")
    assert_same(dict(last.state_dict()), dict(model.state_dict()))

    again = callback()
    folder = tmp_path / "whole" / "checkpoint-6"  # between the insertions
    fresh = again.resume(gpt(), folder)
    train(tmp_path / "part", again, fresh, resume_from_checkpoint=str(folder))
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert again.history.losses == growth.history.losses
    assert again.history.steps == growth.history.steps

    train(tmp_path / "more", again, fresh)  # a second training goes on
    assert len(again.history.losses) == 12
    with refused(cg.TrainingError, "another model", "make a new GrowthCallback"):
        train(tmp_path / "other", again, gpt())
    with refused(cg.TrainingError, "callback.resume(model, folder)"):
        before = tmp_path / "whole" / "checkpoint-3"  # the insertions
        train(tmp_path / "more", again, fresh, resume_from_checkpoint=str(before))
    assert len(again.history.losses) == 12


class Averaging(TrainerCallback):
    """Updates an average after each step."""

    def __init__(self, average: AveragedModel) -> None:
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update_parameters(kwargs["model"])


def test_settings_of_large_models(tmp_path: Path) -> None:
    """50,000 tokens, bfloat16, activations computed again, gradients of several batches."""
    batch = next(iter(DataLoader(Counting(), batch_size=32)))
    arguments = {
        "max_steps": 7,
        "save_steps": 6,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "bf16": True,
    }
    options: Any = {"when": lambda losses: len(losses) >= 2, "max_insertions": 1}
    growth, model = GrowthCallback([(batch, None)], **options), gpt(50_000)
    train(tmp_path, growth, model, arguments=arguments)
    assert [one.step for one in growth.history.insertions] == [4]
    assert len(model.get_submodule("transformer.h")._modules) == 3
    again = GrowthCallback([(batch, None)], **options)
    folder = tmp_path / "checkpoint-6"
    fresh = again.resume(gpt(50_000), folder)
    train(tmp_path / "part", again, fresh, arguments=arguments, resume_from_checkpoint=str(folder))
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert again.history.losses == growth.history.losses


def test_averages_grow_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    def run(name: str, start: str = "") -> dict[str, Any]:
        model = gpt()
        average = AveragedModel(model)
        growth = callback(averaged=average)
        options: Any = {"resume_from_checkpoint": start} if start else {}
        if start:
            growth.resume(model, start)
        train(tmp_path / name, growth, model, more=[Averaging(average)], **options)
        assert list(average.module.state_dict()) == list(model.state_dict())
        return dict(average.state_dict())

    whole = run("whole")
    assert any(".inserted." in name for name in whole)
    assert_same(run("part", str(tmp_path / "whole" / "checkpoint-6")), whole)
    with refused(cg.CheckpointError, "averaged: 0 given, 1 saved"):
        callback().resume(gpt(), tmp_path / "whole" / "checkpoint-6")


def adapters() -> nn.Module:
    """Saved by their own weights alone."""
    model: Any = gpt()
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def embeddings() -> nn.Module:
    """Of which no vector is trained, so that a group of the Trainer's optimizer is empty."""
    model: Any = gpt().requires_grad_(False)
    model.transformer.wte.requires_grad_(True)
    return model


@pytest.mark.parametrize("make", [adapters, embeddings])
def test_what_is_trained_in_part_goes_on_from_a_checkpoint(make: Any, tmp_path: Path) -> None:
    batch = next(iter(DataLoader(Counting(), batch_size=32)))

    def run(name: str, start: str = "") -> nn.Module:
        growth, model = GrowthCallback([(batch, None)], max_insertions=1), make()
        options: Any = {"resume_from_checkpoint": start} if start else {}
        if start:
            growth.resume(model, start)
        trainer = train(tmp_path / name, growth, model, arguments={"weight_decay": 0.1}, **options)
        assert len(growth.history.insertions) == 1
        optimizer: Any = trainer.optimizer
        groups = optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert [{p.dim() for p in group["params"]} for group in groups] == [{2}, {1}]
        return model

    expected = dict(run("whole").state_dict())
    assert_same(dict(run("part", str(tmp_path / "whole" / "checkpoint-6")).state_dict()), expected)


def test_a_frozen_model_grows_before_the_first_step(tmp_path: Path) -> None:
    growth, model = callback(), gpt().requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, growth, model, arguments={"weight_decay": 0.1})
    assert [one.step for one in growth.history.insertions] == [0, 4]
    new = dict(growth.grower.record.new_parameters(model)) if growth.grower else {}
    optimizer: Any = trainer.optimizer
    trained = [group["params"] for group in optimizer.param_groups]
    assert [{p.dim() for p in group} for group in trained] == [{2}, {1}]
    assert {id(p) for group in trained for p in group} == {id(p) for p in new.values()}
    old = [p for name, p in model.named_parameters() if name not in new]
    assert all(torch.equal(p, value) for p, value in zip(old, before.values(), strict=True))
    assert growth.history.losses[-1] < growth.history.losses[0]
    cases: Any = ({"max_insertions": 0}, "max_insertions=0"), ({"rule": cg.Fixed()}, "")
    for options, why in cases:
        frozen, data = gpt().requires_grad_(False), [(next(iter(DataLoader(Counting(), 32))), None)]
        with refused(cg.TrainingError, "all parameters are frozen", why, "requires_grad_(True)"):
            train(tmp_path, GrowthCallback(data, **options), frozen)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logging_steps": 24},
        {"logging_strategy": "no"},
        {"logging_strategy": "epoch", "max_steps": 4},
    ],
)
def test_a_log_after_which_nothing_can_grow_is_warned_of(arguments: Any, tmp_path: Path) -> None:
    short = {"max_steps": 24, "logging_steps": 4, **arguments}
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **short)
    state = TrainerState(max_steps=args.max_steps, num_train_epochs=args.max_steps // 4)
    state.compute_steps(args, args.max_steps)
    model, control = gpt(), TrainerControl()
    given: Any = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
    with pytest.warns(UserWarning, match="that is never; log more often"):
        callback().on_train_begin(args, state, control, **given)
    for name, value in {"logging_strategy": IntervalStrategy.STEPS, "logging_steps": 1}.items():
        setattr(args, name, value)
    state.compute_steps(args, args.max_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback().on_train_begin(args, state, control, **given)


def test_data_without_pairs_or_labels_are_refused() -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(Counting(), batch_size=32)
    ids = [({"input_ids": batch["input_ids"]}, None) for batch in loader]
    for data, words in ((loader, "[(batch, None) for batch in loader]"), (ids, "labels")):
        with refused(cg.DataError, "data", words):
            cg.Grower(model, optimizer, trainer_loss, data).ask()


def test_a_folder_without_growth_is_refused(tmp_path: Path) -> None:
    with refused(cg.CheckpointError, "growth.safetensors", "does not exist"):
        callback().resume(gpt(), tmp_path)


def test_a_model_that_has_not_grown_again_is_refused_before_the_first_step(tmp_path: Path) -> None:
    train(tmp_path / "whole", callback(), gpt(), arguments={"max_steps": 6})
    folder = tmp_path / "whole" / "checkpoint-6"
    model = gpt()
    with refused(cg.TrainingError, "callback.resume(model, folder)", "mlp.base"):
        train(tmp_path / "part", callback(), model, resume_from_checkpoint=str(folder))
    assert_same(dict(model.state_dict()), dict(gpt().state_dict()))
    (folder / "model.safetensors").unlink()  # the guard does not see the weights of a wrapped model
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "optimizer.pt").unlink()
    with refused(cg.TrainingError, "callback.resume(model, folder)"):
        train(tmp_path / "part", callback(), model, resume_from_checkpoint=str(folder))
    assert not model._load_state_dict_pre_hooks


def test_the_best_model_at_the_end_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = gpt()
    with refused(cg.TrainingError, "load_best_model_at_end=True", "load_model(model"):
        train(
            tmp_path,
            callback(),
            model,
            arguments={"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
        )
    assert_same(dict(model.state_dict()), dict(gpt().state_dict()))


def test_an_unknown_option_is_refused_where_it_is_written() -> None:
    with refused(cg.TrainingError, "max_insertion=3", "did you mean max_insertions=?"):
        GrowthCallback([], max_insertion=3)
    with refused(cg.TrainingError, "colour='red'", "candidates", "max_insertions"):
        GrowthCallback([], colour="red")


# --- two processes ------------------------------------------------------------------------------


def own_loss(output: Any, target: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """In float64, where the models of the library calculate theirs in float32."""
    found = nn.functional.cross_entropy(
        output["logits"][:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="sum"
    )
    return found / (target[:, 1:].numel() if num_items_in_batch is None else num_items_in_batch)


def drawn(number: int, processes: int) -> GrowthCallback:
    """On one of several processes, with its share of the data that decide."""
    batch = next(iter(DataLoader(Counting(), batch_size=32)))
    ids = batch["input_ids"][number::processes]
    return callback([({"input_ids": ids}, ids)], loss_fn=own_loss)


def outcome(model: nn.Module, growth: GrowthCallback) -> dict[str, Any]:
    rounds = growth.history.insertions
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "losses": growth.history.losses,
        "steps": [one.step for one in rounds],
        "chosen": [one.chosen for one in rounds],
        "sensitivities": [list(one.sensitivities.values()) for one in rounds],
    }


def train_with_another(number: int, folder: Path) -> None:
    """As one process would."""
    warnings.simplefilter("ignore")
    expected = torch.load(folder / "expected", weights_only=True)
    growth, model = drawn(number, 2), gpt()
    trainer = train(folder / "whole", growth, model, 2, own_loss)
    assert trainer.args.world_size == 2
    found = outcome(model, growth)
    for key in ("steps", "chosen"):
        assert found[key] == expected[key]
    for key in ("losses", "sensitivities"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
    assert list(found["weights"]) == list(expected["weights"])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_other_wrappers_are_refused_and_no_hook_is_left() -> None:
    growth, model = callback(), gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args: Any = SimpleNamespace(
        world_size=2,
        load_best_model_at_end=False,
        logging_strategy=IntervalStrategy.STEPS,
        logging_first_step=False,
    )
    state: Any = SimpleNamespace(
        global_step=0, max_steps=2, logging_steps=1, num_train_epochs=1, log_history=[]
    )
    control: Any = None
    growth.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    model(torch.zeros(1, 2, dtype=torch.long))
    assert len(module._global_forward_pre_hooks) == 1
    with refused(cg.TrainingError, "2 processes", "DistributedDataParallel", "fsdp"):
        growth.on_log(args, state, control, {"loss": 1.0})
    assert not module._global_forward_pre_hooks


def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    growth, model = drawn(0, 1), gpt()
    train(tmp_path / "alone", growth, model, 1, own_loss)
    assert len(growth.history.insertions) == 2
    torch.save(outcome(model, growth), tmp_path / "expected")
    together(train_with_another, tmp_path, tmp_path)


def test_the_norm_is_the_recommended_one_or_the_one_given(tmp_path: Path) -> None:
    norms: list[Any] = []

    def look(solution: cg.Solution) -> cg.rules.When:
        norms.extend(s.norm for s in solution.sensitivities.values())
        return cg.rules.When.NEVER

    for norm in (None, cg.norms.Frobenius()):
        train(tmp_path, callback(norm=norm, confirm=look), gpt(), arguments={"max_steps": 6})
    assert norms == [cg.norms.recommended()] * 2 + [cg.norms.Frobenius()] * 2
    with refused(cg.TrainingError, "norm='fro'", "cg.norms.Frobenius()"):
        train(tmp_path, callback(norm="fro"), gpt())
