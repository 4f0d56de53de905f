"""Growing inside the `Trainer` of Transformers: one callback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from constrained_growth import checkpoint
from constrained_growth._extras import extra_packages
from constrained_growth.checkpoint.optimizer_state import parameter_names, reassign_state
from constrained_growth.errors import CheckpointError, TrainingError
from constrained_growth.insertion import replay
from constrained_growth.insertion.training_state import as_copies, grown_in
from constrained_growth.training.grower import Grower, checked_options
from constrained_growth.training.history import History, measurements

with extra_packages():
    from transformers import TrainerCallback

_FILE = "growth.safetensors"


def own_loss(output: Any, target: object) -> Tensor:
    """The loss that a model of Transformers returns when its inputs have labels."""
    return output["loss"]


class GrowthCallback(TrainerCallback):
    """Insert layers when the Trainer logs its loss, and keep the growth in its checkpoints.

    A row of the history is one entry that the Trainer logs (`logging_steps`); the measurements are
    appended to `trainer.state.log_history`. To resume, grow a fresh model before the Trainer loads
    into it:

        model = make_model()
        callback.resume(model, "out/checkpoint-500")
        trainer = Trainer(model, arguments, callbacks=[callback], …)
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    With several processes (`torchrun`, `accelerate launch`) all insert the same layer, and the
    DistributedDataParallel is initialised again in place; other wrappers are refused.

    Args:
        data: The data to decide on: `(inputs, None)` pairs with a dict of inputs, labels among
            them, such as `[(batch, None) for batch in loader]`; on each process its shard.
        loss_fn: `loss_fn(output, target)`; by default the loss that the model returns.
        **options: Of `Grower`: `rule`, `norm`, `when`, `candidates`, `max_insertions`,
            `after_insertion`, `solver`, `writer`, `averaged`.

    Attributes:
        grower: The `Grower`, once training has started; None before.

    Raises:
        TrainingError: An option is unknown; or, when training starts, there are several processes
            and no DistributedDataParallel, the best model is to be loaded at the end, which may be
            one from before an insertion, or a model goes on that `resume` has not grown.

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
        self._options = checked_options(type(self).__name__, options)
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

        Raises:
            CheckpointError: The folder was not written with this callback.
            RecordError: The record does not fit the model, or a block of your own is not in
                `blocks`, as for `replay`.
        """
        saved = checkpoint.load(Path(folder) / _FILE)
        copies = as_copies(self._options.get("averaged", ()))
        if len(copies) != len(saved.averaged):
            raise CheckpointError(f"averaged: {len(copies)} given, {len(saved.averaged)} saved.")
        for one in (model, *map(grown_in, copies)):
            replay(one, saved.record, blocks=blocks)
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
                "metric_for_best_model, and load trainer.state.best_model_checkpoint afterwards, "
                "by from_pretrained or with callback.resume."
            )
        grown = any("growth/layers" in row for row in state.log_history)
        if grown and self._saved is None and self.grower is None:
            raise TrainingError(_NOT_RESUMED)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        before, saved = self.grower, self._saved
        self.grower = Grower(model, optimizer, self._loss_fn, self._data, **self._options)
        if saved is not None:
            reassign_state(optimizer, model, saved.extra)
            self.grower.load_state_dict(saved.states["grower"])
            for one, weights in zip(as_copies(self.grower.averaged), saved.averaged, strict=True):
                one.load_state_dict(weights)
            self._saved = None
        elif before is not None:
            self.grower.load_state_dict(before.state_dict())
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
            state.log_history.append({**measurements(one), "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave no hook behind."""
        self._unhook()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the growth to the checkpoint folder."""
        if self.grower is not None:
            checkpoint.save(
                Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / _FILE,
                nn.Identity(),  # the weights are in the Trainer's own file
                averaged=self.grower.averaged,
                record=self.grower.record,
                step=state.global_step,
                extra=parameter_names(self.grower.optimizer, self.grower.model),
                grower=self.grower,
            )

    def _find_wrapper(self, module: nn.Module, args: Any) -> None:
        grower = self.grower if isinstance(module, DistributedDataParallel) else None
        if grower is not None and grower.model in module.modules():
            grower.wrapper = module
            self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()


_NOT_RESUMED = (
    "resume_from_checkpoint: the checkpoint is of a model that grew, and this one has not; call "
    "callback.resume(model, folder) with the fresh model, before Trainer(model, …)."
)
