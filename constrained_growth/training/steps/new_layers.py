"""New layers at a learning rate of their own, and with a weight decay of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.errors import TrainingError
from constrained_growth.training.steps.protocol import Grown, Inserted


class NewLayers:
    """New layers at a learning rate of their own, and with a weight decay towards where they began.

    A policy for `Grower(after_insertion=…)`. New parameters are in the groups of their
    neighbours, so that schedulers, clipping and a gradient scaler treat them like these. Hooks of
    the optimizer do the rest, for any optimizer alike:

    * of the step that the optimizer gives a new parameter, only the share `scale` is taken, after
      a linear warm-up from 0 over `warmup` steps. For SGD, Adam and all others whose steps are
      proportional to the learning rate this is a learning rate times `scale`;
    * while it steps, the optimizer sees a new parameter p as its deviation p − p₀ from the value
      p₀ at which it was inserted. Weight decay of every kind thus pulls the layer towards the
      identity, and not an identity layer towards zero. Groups without weight decay are left
      alone. (Where a rule starts a layer elsewhere than at its pins, p₀ is there.)

    Outside a `Grower` call `watch(model, optimizer, names)` after `insert`.

    The defaults are what `constrained-growth bench steps` supports on seven tasks: a learning
    rate times 0.1 or 3 and a warm-up over 100 steps ended higher than no policy on some of them.
    A warm-up over 20 steps never did, beyond noise, and made large jumps of the loss (those with
    SGD) three to seven times smaller; decay towards the identity ended lower than decay to zero,
    or the same.

    Args:
        scale: Learning rate of new layers relative to their neighbours'.
        warmup: Over how many steps it is reached; 0 for at once.
        anchored: Whether weight decay pulls towards p₀ (default), or towards zero.

    Raises:
        TrainingError: An argument is out of range.

    Example:
        >>> import constrained_growth as cg
        >>> from constrained_growth.training import NewLayers
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> policy = NewLayers(scale=0.5, warmup=100)
        >>> grower = cg.Grower(
        ...     net, optimizer, nn.CrossEntropyLoss(), data, after_insertion=policy
        ... )
    """

    def __init__(self, scale: float = 1.0, warmup: int = 20, *, anchored: bool = True) -> None:
        if not scale > 0:
            raise TrainingError(f"scale={scale!r} of NewLayers must be a positive number.")
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
            raise TrainingError(f"warmup={warmup!r} of NewLayers is not a whole number ≥ 0.")
        self.scale, self.warmup, self.anchored = scale, warmup, anchored
        self._ages: dict[Tensor, int] = {}
        self._origins: dict[Tensor, Tensor] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        self._shifted: list[tuple[Tensor, Tensor]] = []
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        return f"NewLayers(scale={self.scale:g}, warmup={self.warmup}, anchored={self.anchored})"

    def __call__(self, grower: Grown, one: Inserted) -> None:
        """Take care of the parameters that were just inserted."""
        self.watch(grower.model, grower.optimizer, one.new_parameters)

    def watch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str] = ()
    ) -> None:
        """Hook into an optimizer, and go on with what `load_state_dict` was given, if anything.

        Args:
            model: Has the parameters.
            optimizer: Trains them.
            names: Of parameters that were just inserted.

        Raises:
            TrainingError: There are no such parameters.
        """
        parameters = dict(model.named_parameters())
        kept = self._kept or {"ages": {}, "origins": {}}
        unknown = [name for name in (*names, *kept["ages"]) if name not in parameters]
        if unknown:
            raise TrainingError(
                f"names: {type(model).__name__} has no parameters {unknown}; give names of "
                "parameters of the model as it is now."
            )
        for name, age in kept["ages"].items():
            self._ages[parameters[name]] = age
        for name, origin in kept["origins"].items():
            self._origins[parameters[name]] = origin.to(parameters[name]).clone()
        for name in names:
            self._ages[parameters[name]] = 0
            if self.anchored:
                self._origins[parameters[name]] = parameters[name].detach().clone()
        if optimizer is not self._optimizer:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        self._model, self._optimizer, self._kept = model, optimizer, None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: how many steps each new parameter has made, and where it began."""
        if self._kept is not None:
            return dict(self._kept)
        named = () if self._model is None else self._model.named_parameters()
        names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        return {
            "ages": {names[p]: age for p, age in self._ages.items() if p in names},
            "origins": {names[p]: o.clone() for p, o in self._origins.items() if p in names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; `watch` then finds the parameters, by their names."""
        self._kept = state

    def _share(self, age: int) -> float:
        return self.scale * min(1.0, (age + 1) / (self.warmup + 1))

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        if optimizer is not self._optimizer:
            return None
        decayed = {
            p for g in optimizer.param_groups if g.get("weight_decay", 1) for p in g["params"]
        }
        self._shifted = [(p, o) for p, o in self._origins.items() if p in decayed]
        self._shift(-1)
        self._before = [
            (parameter, parameter.detach().clone())
            for parameter, age in self._ages.items()
            if self._share(age) != 1
        ]
        args = tuple(self._in_place(value) for value in args)
        return args, {name: self._in_place(value) for name, value in kwargs.items()}

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._optimizer:
            return
        for parameter, before in self._before:
            parameter.copy_(before.lerp(parameter, self._share(self._ages[parameter])))
        self._shift(1)
        self._before, self._shifted = [], []
        self._ages = {parameter: age + 1 for parameter, age in self._ages.items()}

    @torch.no_grad()
    def _shift(self, sign: int) -> None:
        """From parameters to deviations (−1), or back."""
        for parameter, origin in self._shifted:
            parameter.add_(origin, alpha=sign)

    def _in_place(self, value: Any) -> Any:
        """A closure that finds the parameters where they are."""
        if not callable(value):
            return value

        def evaluated() -> Any:
            self._shift(1)
            try:
                return value()
            finally:
                self._shift(-1)

        return evaluated
