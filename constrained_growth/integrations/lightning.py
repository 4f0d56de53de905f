"""Growing inside a Lightning `Trainer`: one callback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from constrained_growth._arguments import function, instance
from constrained_growth._distributed import everywhere, rank
from constrained_growth._extras import extra_packages
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.checkpoint.optimizer_state import arrange_groups, parameter_names
from constrained_growth.errors import CheckpointError, TrainingError
from constrained_growth.insertion import GrowthRecord, replay
from constrained_growth.training.arguments import check_blocks
from constrained_growth.training.grower import Grower
from constrained_growth.training.history import History
from constrained_growth.training.loop import evaluate
from constrained_growth.training.options import checked_options

with extra_packages():
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

__all__ = ["GrowthCallback", "load_from_checkpoint"]


class GrowthCallback(Callback):
    """Insert layers at the ends of training epochs but the last, and keep them in the checkpoints.

    `trainer.fit(module, ckpt_path=…)` with a fresh module and a fresh callback grows the module
    before its weights are loaded, gives each parameter its own optimizer state, and goes on; so do
    `validate`, `test` and `predict`, which also take the module that has just been trained, unless
    the checkpoint is from before its last insertion (`trainer.test(Fresh(), ckpt_path="best")`
    then). Without a trainer, `load_from_checkpoint` below does it, also from the files of
    `ModelCheckpoint(save_weights_only=True)`. The sensitivities, decisions and depth go to the
    loggers of the trainer.

    The losses of the history are those that `training_step` returned, whatever
    `accumulate_grad_batches` is, and its steps are those of the optimizer: where several are
    stepped by manual optimization, the mean over them.

    The averages of Lightning's `EMAWeightAveraging`, `WeightAveraging` and
    `StochasticWeightAveraging` grow with the module. With manual optimization, return the loss from
    `training_step`; where it returns none, a row of the history has the mean of `loss_fn` over
    `data` at the end of the epoch. Under mixed precision λ is measured in the precision of the
    parameters.

    With `strategy="ddp"` all processes insert the same layer. Other strategies for several
    processes are refused; `"ddp_spawn"` and the like load the weights back into a model that did
    not grow.

    Args:
        loss_fn: `loss_fn(output, target)`, as for `GrowthProblem`.
        data: The data to decide on, as for `GrowthProblem`: a loader other than the one that is
            being iterated; on each process its shard.
        model: `model(module)`, the model that grows; by default the LightningModule itself.
        blocks: Your own blocks, to resume a run, as for `replay`.
        **options: Of `Grower`: `rule`, `norm`, `when`, `confirm`, `candidates`, `max_insertions`,
            `after_insertion`, `solver`, `writer`.

    Attributes:
        grower: The `Grower`, once training has started; None before.

    Raises:
        TrainingError: An option is unknown; or, when training starts, what grows has no `forward`,
            or there are several processes in another way than by `strategy="ddp"`.
        CheckpointError: The checkpoint to resume from was saved without this callback, or before
            the module grew to what it is now.

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
        self._options = checked_options(type(self).__name__, loss_fn, data, options)
        function("model", model, TrainingError, "lambda module: module.net")
        check_blocks(blocks)
        self._model, self._blocks = model, blocks
        self._saved: dict[str, Any] | None = None
        self._has_losses = False  # whether training_step has returned one in this epoch
        self._steps_before = 0  # by earlier trainers

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
            for module in (pl_module, *_averages(trainer)):
                _grow(module, self._model, checkpoint, self._blocks)
            own(checkpoint)

        pl_module.on_load_checkpoint = grow_first  # the one hook before the weights are loaded
        save = pl_module.on_save_checkpoint

        def save_growth(checkpoint: dict[str, Any]) -> None:
            if self.grower is not None and "callbacks" not in checkpoint:
                checkpoint[_RECORD] = self.grower.record.to_json()
            save(checkpoint)

        pl_module.on_save_checkpoint = save_growth  # the one hook where weights alone are saved

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module, nor on copies of it."""
        for module in (pl_module, *_averages(trainer)):
            vars(module).pop("on_load_checkpoint", None)
            vars(module).pop("on_save_checkpoint", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the optimizers train what they trained, before PyTorch loads states by number."""
        whole: Any = self._model(pl_module)
        if getattr(whole.forward, "__func__", None) is LightningModule.forward:
            raise TrainingError(
                f"GrowthCallback: {type(whole).__name__} has no forward(), by which λ is measured; "
                "say which of its modules grows, GrowthCallback(model=lambda m: m.net), or define "
                "forward."
            )
        if self._saved is not None:
            model, names = self._model(pl_module), self._saved["names"]
            optimizers = _optimizers_of(model, trainer)
            if len(names) != len(optimizers):
                raise CheckpointError(
                    f"the module has {len(optimizers)} optimizers, the checkpoint those of "
                    f"{len(names)}; make them as in the run that was saved."
                )
            for optimizer, groups in zip(optimizers, names, strict=True):
                arrange_groups(optimizer, model, groups)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the grower, in the state of the checkpoint if there is one."""
        vars(pl_module).pop("on_load_checkpoint", None)
        model = self._model(pl_module)
        wrapper = trainer.strategy.model if trainer.world_size > 1 else None

        def log(tag: str, value: float, _: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics({tag: value}, step=trainer.global_step)

        writer = SimpleNamespace(add_scalar=log)
        averages = [self._model(module) for module in _averages(trainer)]
        options = {"writer": writer, "wrapper": wrapper, "averaged": averages, **self._options}
        before, saved = self.grower, self._saved
        if saved is None and before is not None and before.model is not model:
            raise TrainingError(
                "GrowthCallback: this one has the record and the history of another model; make a "
                "new GrowthCallback for each module."
            )
        optimizers = _optimizers_of(model, trainer)
        self.grower = Grower(model, optimizers, self._loss_fn, self._data, **options)
        if saved is not None:
            # a run may go on with fewer or more processes than have saved it
            losses = saved["losses"][rank(None) % len(saved["losses"])]
            self.grower.load_state_dict({**saved["grower"], **losses})
            self._saved = None
        elif before is not None:
            self.grower.load_state_dict(before.state_dict())
        self._steps_before = self.grower.num_steps - _steps_of(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.grower is not None and loss is not None:
            # Lightning has divided it, for the sum of the gradients to be their mean
            automatic = pl_module.automatic_optimization
            self.grower.step(loss * trainer.accumulate_grad_batches if automatic else loss)
            self.grower.num_steps = self._steps_before + _steps_of(trainer)
            self._has_losses = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close a row of the history, with the metrics of the trainer; grow if due."""
        if self.grower is None:
            return
        if not self._has_losses:
            found = evaluate(self.grower.model, {"loss": self._loss_fn}, self._data)
            self.grower.step(found["loss"])
            self.grower.num_steps = self._steps_before + _steps_of(trainer)
        self._has_losses = False
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # a layer inserted after the last epoch would never be trained
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.grower.observe(metrics)
        else:
            self.grower.maybe_grow(metrics)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the grower, and the names of the parameters of the optimizer."""
        if self.grower is None:
            return {}
        names = [parameter_names(one, self.grower.model) for one in self.grower.optimizers]
        state = self.grower.state_dict()
        # Lightning calls this on all processes and writes what the first one returns
        losses = everywhere(lambda: {key: state[key] for key in ("sum", "count")}, None)
        return {"grower": state, "names": names, "losses": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._saved = state_dict or None


M = TypeVar("M", bound=LightningModule)


def load_from_checkpoint(
    module_class: type[M],
    checkpoint_path: str | os.PathLike[str],
    *,
    model: Callable[[LightningModule], nn.Module] = lambda module: module,
    blocks: Mapping[str, nn.Module] | None = None,
    **kwargs: Any,
) -> M:
    """`module_class.load_from_checkpoint(…)` for a module that grew by a `GrowthCallback`.

    Args:
        module_class: The LightningModule's class.
        checkpoint_path: As for its own `load_from_checkpoint`.
        model: As given to the callback.
        blocks: As given to the callback.
        **kwargs: As for its own `load_from_checkpoint`.

    Returns:
        The grown module, with the weights of the checkpoint.

    Raises:
        CheckpointError: It was saved without a `GrowthCallback`, or, with the weights alone, when
            training was over.
        RecordError: The record does not fit the module that the class makes.
        TrainingError: `module_class` is no class of LightningModules.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise TrainingError(f"module_class={module_class!r:.80}: give a LightningModule's class.")
    path = instance("checkpoint_path", checkpoint_path, (str, os.PathLike), CheckpointError, "one")
    function("model", model, TrainingError, "lambda module: module.net")
    check_blocks(blocks)

    class Growing(module_class):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            _grow(self, model, checkpoint, blocks)
            super().on_load_checkpoint(checkpoint)

    # a subclass, since nothing else comes between making the module and loading its weights
    module: Any = Growing.load_from_checkpoint(os.fspath(path), **kwargs)
    module.__class__ = module_class
    return module


def _grow(
    module: nn.Module,
    model: Callable[[Any], nn.Module],
    checkpoint: Mapping[str, Any],
    blocks: Mapping[str, nn.Module] | None,
) -> None:
    """Grow a module to the architecture of a checkpoint, if it is not there yet."""
    found = [
        state["grower"]["record"]
        for state in checkpoint.get("callbacks", {}).values()
        if isinstance(state, Mapping) and isinstance(state.get("grower"), Mapping)
    ]
    found += [checkpoint[_RECORD]] if _RECORD in checkpoint else []
    if not found:
        raise CheckpointError(
            "the checkpoint was saved without a GrowthCallback, or holds the weights alone and was "
            "saved when training was over: trainer.save_checkpoint(path) without weights_only."
        )
    record, grown = GrowthRecord.from_json(found[0]), model(module)
    if parameter_shapes(grown) == dict(record.model):
        replay(grown, record, blocks=blocks)
    unknown = module.state_dict().keys() ^ checkpoint["state_dict"].keys()
    if unknown:
        raise CheckpointError(
            f'the checkpoint and the module differ in "{min(unknown)}", and {len(unknown)} entries '
            "in all: one has grown otherwise. Load it into a fresh module, as by "
            'trainer.test(Module(), loader, ckpt_path="best"), or by '
            "constrained_growth.integrations.lightning.load_from_checkpoint."
        )


_RECORD = "constrained_growth"
"""Where a checkpoint of weights alone has the record."""


def _steps_of(trainer: Trainer) -> int:
    """Steps of the optimizer so far; of several, which Lightning adds up, the mean."""
    return trainer.global_step // max(len(trainer.optimizers), 1)


def _optimizers_of(model: nn.Module, trainer: Trainer) -> list[Optimizer]:
    """Those that train a part of the model; another, as of a GAN's generator, has no say here."""
    own = set(model.parameters())
    parameters = [[p for g in o.param_groups for p in g["params"]] for o in trainer.optimizers]
    pairs = zip(trainer.optimizers, parameters, strict=True)
    return [one for one, trained in pairs if not own.isdisjoint(trained)] or trainer.optimizers


def _averages(trainer: Trainer) -> list[Any]:
    """The modules in which Lightning's callbacks keep averages of the weights."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [one.module if isinstance(one, AveragedModel) else one for one in found if one]
