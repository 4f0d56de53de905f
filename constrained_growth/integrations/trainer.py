"""Growing inside the `Trainer` of Transformers: one callback."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from constrained_growth import checkpoint
from constrained_growth._arguments import instance
from constrained_growth._extras import extra_packages
from constrained_growth.checkpoint.optimizer_state import arrange_groups, parameter_names
from constrained_growth.errors import CheckpointError, DataError, TrainingError
from constrained_growth.insertion import replay
from constrained_growth.insertion.training_state import as_copies, grown_in
from constrained_growth.training.arguments import check_blocks
from constrained_growth.training.grower import Grower
from constrained_growth.training.history import History, Round, measurements
from constrained_growth.training.options import checked_options

with extra_packages():
    from transformers import Trainer, TrainerCallback

__all__ = ["GrowthCallback", "own_loss"]

_FILE = "growth.safetensors"


def own_loss(output: Any, target: object) -> Tensor:
    """The loss that a model of Transformers returns when its inputs have labels.

    Raises:
        DataError: It returned none.
    """
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    raise DataError(
        f"data: the model's output, a {type(output).__name__}, has no loss; give inputs with "
        "labels, as it is trained with, or a loss_fn(output, target)."
    )


class GrowthCallback(TrainerCallback):
    """Insert layers when the Trainer logs its loss, and keep the growth in its checkpoints.

    A row of the history is one entry that the Trainer logs (`logging_steps`), and after each but
    the last the model may grow; the measurements are appended to `trainer.state.log_history`. A
    model of which nothing is trained, as all is frozen, grows before the first step, whatever
    `when` says, and its new layers are trained. To resume, grow a fresh model before the Trainer
    loads into it:

        model = make_model()  # frozen as it was
        callback.resume(model, "out/checkpoint-500")
        trainer = Trainer(model, arguments, callbacks=[callback], …)
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    To load a checkpoint, such as `trainer.state.best_model_checkpoint`, do the same, and load the
    weights: `safetensors.torch.load_model(model, "out/checkpoint-500/model.safetensors")`. The
    class's `from_pretrained` is enough only where the config counts each new layer, as in GPT-2 or
    Llama and not in BERT, and where the folder does not hold adapters alone.

    With several processes (`torchrun`, `accelerate launch`) all insert the same layer, and the
    DistributedDataParallel is initialised again in place; other wrappers are refused.

    Args:
        data: The data to decide on: `(inputs, None)` pairs with a dict of inputs, labels among
            them, such as `[(batch, None) for batch in loader]`; on each process its shard.
        loss_fn: `loss_fn(output, target)`; by default the loss that the model returns.
        **options: Of `Grower`: `rule`, `norm`, `when`, `confirm`, `candidates`, `max_insertions`,
            `after_insertion`, `solver`, `writer`, `averaged`.

    Attributes:
        grower: The `Grower`, once training has started; None before.

    Raises:
        TrainingError: An option is unknown; or, when training starts, there are several processes
            and no DistributedDataParallel, the best model is to be loaded at the end, which may be
            one from before an insertion, a model goes on that `resume` has not grown, the
            callback has grown another model, or all is frozen and no layer was inserted.

    Example:
        >>> callback = GrowthCallback([], max_insertions=2)
        >>> callback.history.losses
        []
    """

    def __init__(
        self,
        data: Iterable[Any],
        *,
        loss_fn: Callable[[Any, Any], Tensor] = own_loss,
        **options: Any,
    ) -> None:
        self.grower: Grower | None = None
        self._data, self._loss_fn = data, loss_fn
        self._options = checked_options(type(self).__name__, loss_fn, data, options)
        self._saved: checkpoint.Checkpoint | None = None
        self._hook: RemovableHandle | None = None  # before training a guard, then in search

    @property
    def history(self) -> History:
        """Losses and decisions so far."""
        return History() if self.grower is None else self.grower.history

    def resume(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        blocks: Mapping[str, nn.Module] | None = None,
    ) -> nn.Module:
        """Grow a fresh model, in place, to the architecture in a checkpoint folder.

        The weights are loaded by the Trainer, and here those of new layers, which a model of PEFT
        does not save with its adapters.

        Raises:
            CheckpointError: The folder was not written with this callback.
            RecordError: The record does not fit the model, or a block of your own is not in
                `blocks`, as for `replay`.
        """
        instance("model", model, nn.Module, CheckpointError, "a fresh model")
        check_blocks(blocks)
        instance("folder", folder, (str, os.PathLike), CheckpointError, "that of a checkpoint")
        saved = checkpoint.load(Path(folder) / _FILE)
        copies = as_copies(self._options.get("averaged", ()))
        if len(copies) != len(saved.averaged):
            raise CheckpointError(f"averaged: {len(copies)} given, {len(saved.averaged)} saved.")
        for one in (model, *map(grown_in, copies)):
            replay(one, saved.record, blocks=blocks)
        model.load_state_dict(saved.weights, strict=False)  # part of them
        self._saved = saved
        return model

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse, until training begins, the weights of a model that grew further than this one."""

        def look(module: nn.Module, weights: Mapping[str, Any], *rest: Any) -> None:
            unknown = sorted(weights.keys() - module.state_dict().keys())
            if unknown:  # the Trainer would leave them out
                self._unhook()
                raise TrainingError(f'{_NOT_RESUMED} The first without a place is "{unknown[0]}".')

        self._hook = kwargs["model"].register_load_state_dict_pre_hook(look)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the grower, in the state of the checkpoint if there is one."""
        self._unhook()
        if args.load_best_model_at_end:
            raise TrainingError(
                "load_best_model_at_end=True: the best checkpoint may be older than an insertion, "
                "and its weights do not fit the grown model. Set it to False, keep "
                "metric_for_best_model, and afterwards load trainer.state.best_model_checkpoint, "
                "folder, into a fresh model: GrowthCallback([]).resume(model, folder), then "
                'safetensors.torch.load_model(model, f"{folder}/model.safetensors"). Its class\'s '
                "from_pretrained(folder) does so only if the config counts all new layers."
            )
        grown = any("growth/layers" in row for row in state.log_history)
        before, saved = self.grower, self._saved
        if saved is None and (grown or (before is not None and state.global_step)):
            raise TrainingError(_NOT_RESUMED)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        if saved is None and before is not None and before.model is not model:
            raise TrainingError(
                "GrowthCallback: this one has the record and the history of another model; make a "
                "new GrowthCallback for each model (and for each train() with model_init=)."
            )
        self.grower = Grower(model, optimizer, self._loss_fn, self._data, **self._options)
        if saved is not None:
            if parameter_names(optimizer, model) != saved.extra:  # PyTorch goes by their numbers
                raise CheckpointError(
                    "optimizer: its groups have other parameters than in the checkpoint, or in "
                    "another order; make it as it was made in the run that was saved."
                )
            self.grower.load_state_dict(saved.states["grower"])
            for one, weights in zip(as_copies(self.grower.averaged), saved.averaged, strict=True):
                one.load_state_dict(weights)
            self._saved = None
        elif before is not None:
            self.grower.load_state_dict(before.state_dict())
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._grow_frozen(args, state)
        never = {
            "no": True,
            "steps": state.logging_steps >= state.max_steps and not args.logging_first_step,
            "epoch": state.num_train_epochs <= 1,
        }
        strategy = args.logging_strategy.value
        if never.get(strategy, False) and not self.grower.is_over:
            warnings.warn(
                "GrowthCallback: the model grows where the Trainer logs its loss, except after the "
                f'last step, and with logging_strategy="{strategy}", '
                f"logging_steps={state.logging_steps} and max_steps={state.max_steps} that is "
                "never; log more often.",
                stacklevel=2,
            )
        if args.world_size > 1:
            # A callback is given the model without the wrapper around it.
            self._hook = register_module_forward_pre_hook(self._find_wrapper)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Close a row of the history with the logged loss; grow if due."""
        if self.grower is None or "loss" not in (logs or {}):
            return
        self._unhook()
        if args.world_size > 1 and self.grower.wrapper is None:
            raise TrainingError(
                f"GrowthCallback: the Trainer uses {args.world_size} processes and no "
                "DistributedDataParallel; train without fsdp and deepspeed, or on one process."
            )
        # the logged loss is a mean over many steps, and a row of the history
        self.grower.step(logs["loss"])
        self.grower.num_steps = state.global_step
        if state.global_step >= state.max_steps:
            self.grower.observe()
            return
        one = self.grower.maybe_grow()
        if one is not None:
            self._note(one, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave no hook behind."""
        self._unhook()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the growth to the checkpoint folder."""
        if self.grower is not None:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            checkpoint.save(
                folder / _FILE,
                _NewLayers(self.grower),
                averaged=self.grower.averaged,
                record=self.grower.record,
                step=state.global_step,
                extra=parameter_names(self.grower.optimizer, self.grower.model),
                grower=self.grower,
            )

    def _grow_frozen(self, args: Any, state: Any) -> None:
        """Insert layers before the first step, which would have no gradients."""
        assert self.grower is not None
        if args.world_size > 1:
            raise TrainingError(
                "GrowthCallback: all parameters are frozen, and such a model can grow on one "
                "process alone; let some be trained, or insert a layer before Trainer(model, …)."
            )
        self.grower.model.train()  # as in the steps
        one = None if self.grower.is_over else self.grower.ask()
        if one is None or not one.chosen:
            why = "max_insertions=0" if one is None else one.reason
            raise TrainingError(
                f"GrowthCallback: all parameters are frozen and no layer was inserted ({why}), so "
                "that there is nothing to train; let some be trained, as by "
                "model.lm_head.requires_grad_(True), or decide without validation=."
            )
        self._note(one, state)

    def _note(self, one: Round, state: Any) -> None:
        """Log a round; the groups of the optimizer are those that a Trainer would make again."""
        assert self.grower is not None
        _group_as_trainer(self.grower.optimizers[0], self.grower.model, one.new_parameters)
        state.log_history.append({**measurements(one), "step": state.global_step})

    def _find_wrapper(self, module: nn.Module, args: Any) -> None:
        grower = self.grower if isinstance(module, DistributedDataParallel) else None
        if grower is not None and grower.model in module.modules():
            grower.wrapper = module
            self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()


class _NewLayers(nn.Module):
    """The layers inserted into a model, to be saved under their names there."""

    def __init__(self, grower: Grower) -> None:
        super().__init__()
        new = {id(parameter) for _, parameter in grower.record.new_parameters(grower.model)}
        names = [
            f"{name}."  # with their buffers
            for name, module in grower.model.named_modules()
            if new.issuperset(own := [id(p) for p in module.parameters()]) and own
        ]
        weights = grower.model.state_dict().items()
        self.weights = {name: value for name, value in weights if name.startswith(tuple(names))}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.weights


def _group_as_trainer(
    optimizer: torch.optim.Optimizer, model: nn.Module, new: Iterable[str]
) -> None:
    """Let new parameters decay or not as the Trainer decides, where it has made the groups."""
    groups, decayed = parameter_names(optimizer, model), _decayed(model)
    kinds = [{name in decayed for name in set(group).difference(new)} for group in groups]
    if len(kinds) == 2 and kinds[0] <= {True} and kinds[1] <= {False}:
        trained = {name for group in groups for name in group}
        names = [name for name, _ in model.named_parameters() if name in trained]
        arrange_groups(
            optimizer,
            model,
            [[n for n in names if (n in decayed) is kind] for kind in (True, False)],
        )


def _decayed(model: nn.Module) -> set[str]:
    trainer: Any = Trainer  # whose method does not look at the instance
    return set(trainer.get_decay_parameter_names(None, model))


_NOT_RESUMED = (
    "resume_from_checkpoint: the checkpoint is of a model that grew, and this one has not; call "
    "callback.resume(model, folder) with the fresh model, before Trainer(model, …)."
)
