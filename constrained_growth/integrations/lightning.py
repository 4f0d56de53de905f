"""Growing inside a Lightning `Trainer`: one callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from constrained_growth._distributed import everywhere, rank
from constrained_growth.checkpoint.optimizer_state import parameter_names, reassign_state
from constrained_growth.errors import CheckpointError, TrainingError
from constrained_growth.insertion import GrowthRecord, replay
from constrained_growth.training.grower import Grower, checked_options
from constrained_growth.training.history import History


class GrowthCallback(Callback):
    """Insert layers at the ends of training epochs, and keep the growth in the checkpoints.

    `trainer.fit(module, ckpt_path=…)` with a fresh module and a fresh callback grows the module
    before its weights are loaded, gives each parameter its own optimizer state, and goes on. The
    sensitivities, decisions and depth go to the loggers of the trainer.

    With `strategy="ddp"` all processes insert the same layer. Other strategies for several
    processes are refused; `"ddp_spawn"` and the like load the weights back into a model that did
    not grow.

    Args:
        loss_fn: `loss_fn(output, target)`, as for `GrowthProblem`.
        data: The data to decide on, as for `GrowthProblem`: a loader other than the one that is
            being iterated; on each process its shard.
        model: `model(module)`, the model that grows; by default the LightningModule itself.
        blocks: Your own blocks, to resume a run, as for `replay`.
        **options: Of `Grower`: `rule`, `when`, `candidates`, `max_insertions`, `after_insertion`,
            `solver`, `writer`.

    Attributes:
        grower: The `Grower`, once training has started; None before.

    Raises:
        TrainingError: An option is unknown; or, when training starts, there are several
            optimizers, or several processes in another way than by `strategy="ddp"`.
        CheckpointError: The checkpoint to resume from was saved without this callback.

    Example:
        >>> import torch
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> callback = GrowthCallback(nn.CrossEntropyLoss(), data, max_insertions=2)
        >>> trainer = Trainer(accelerator="cpu", callbacks=[callback], logger=False)
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[Any],
        *,
        model: Callable[[LightningModule], nn.Module] = lambda module: module,
        blocks: Mapping[str, nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.grower: Grower | None = None
        self._loss_fn, self._data = loss_fn, data
        self._options = checked_options(type(self).__name__, options)
        self._model, self._blocks = model, blocks
        self._saved: dict[str, Any] | None = None

    @property
    def history(self) -> History:
        """Losses and decisions so far."""
        return History() if self.grower is None else self.grower.history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that a fresh module grows before the weights of a checkpoint are loaded."""
        strategy = trainer.strategy
        plain = isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
        if trainer.world_size > 1 and not plain:
            raise TrainingError(
                f"GrowthCallback: the trainer starts {trainer.world_size} processes by "
                f'{type(strategy).__name__}; use Trainer(strategy="ddp") or devices=1.'
            )
        own = pl_module.on_load_checkpoint

        def grow_first(checkpoint: dict[str, Any]) -> None:
            vars(pl_module).pop("on_load_checkpoint", None)
            saved = checkpoint.get("callbacks", {}).get(self.state_key)
            if not saved:
                raise CheckpointError("ckpt_path was saved without a GrowthCallback.")
            record = GrowthRecord.from_json(saved["grower"]["record"])
            replay(self._model(pl_module), record, blocks=self._blocks)
            own(checkpoint)

        pl_module.on_load_checkpoint = grow_first  # the one hook before the weights are loaded

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the grower, in the state of the checkpoint if there is one."""
        vars(pl_module).pop("on_load_checkpoint", None)
        if len(trainer.optimizers) != 1:
            raise TrainingError(
                f"GrowthCallback needs one optimizer, not {len(trainer.optimizers)}; use cg.Grower."
            )
        model, optimizer = self._model(pl_module), trainer.optimizers[0]
        wrapper = trainer.strategy.model if trainer.world_size > 1 else None

        def log(tag: str, value: float, _: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics({tag: value}, step=trainer.global_step)

        writer = SimpleNamespace(add_scalar=log)
        options = {"writer": writer, "wrapper": wrapper, **self._options}
        before, saved = self.grower, self._saved
        self.grower = Grower(model, optimizer, self._loss_fn, self._data, **options)
        if saved is not None:
            reassign_state(optimizer, model, saved["names"])
            losses = saved["losses"][rank(None) % len(saved["losses"])]
            self.grower.load_state_dict({**saved["grower"], **losses})
            self._saved = None
        elif before is not None:
            self.grower.load_state_dict(before.state_dict())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self.grower is not None and loss is not None:
            self.grower.step(loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close a row of the history, with the metrics of the trainer; grow if due."""
        if self.grower is None:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.grower.observe(metrics)
        else:
            self.grower.maybe_grow(metrics)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the grower, and the names of the parameters of the optimizer."""
        if self.grower is None:
            return {}
        names = parameter_names(self.grower.optimizer, self.grower.model)
        state = self.grower.state_dict()
        # Lightning calls this on all processes and writes what the first one returns
        losses = everywhere(lambda: {key: state[key] for key in ("sum", "count")}, None)
        return {"grower": state, "names": names, "losses": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._saved = state_dict or None
