"""The first optimizer steps after an insertion: policies for `Grower(after_insertion=…)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._distributed import add_up, everywhere, num_processes
from constrained_growth._sharding import is_sharded, reshard, whole
from constrained_growth._sites.model import call
from constrained_growth.errors import TrainingError
from constrained_growth.training.evaluation import sized_batches
from constrained_growth.training.grower import Grower
from constrained_growth.training.history import Round


class NewLayers:
    """A learning-rate warm-up for new layers, and weight decay towards their initial values.

    New parameters share the parameter groups of their neighbours, so schedulers, clipping and a
    gradient scaler treat them alike. Hooks on the optimizer do the rest, whichever optimizer it is:

    * Of each step that the optimizer gives a new parameter only a share is taken, which rises
      linearly from 0 to `scale` over `warmup` steps. For SGD, Adam and every other optimizer whose
      steps are proportional to the learning rate, this is a learning rate times that share.
    * During the step the optimizer sees a new parameter p as its deviation p − p₀ from the value
      p₀ at which it was inserted. So weight decay of any kind pulls the layer towards the
      identity, and not an identity layer towards zero. Groups without weight decay are left alone.

    Outside a `Grower` call `attach(model, optimizer, names)` after `insert`.

    `constrained-growth bench steps` supports the defaults on seven tasks. Learning rates times 0.1
    or 3 and a warm-up over 100 steps ended with a higher loss than no policy on some of them. A
    warm-up over 20 steps never did so beyond noise, and made large jumps of the loss (those with
    SGD) three to seven times smaller. Decay towards the identity ended with the same loss as decay
    to zero, or a lower one.

    Args:
        scale: Learning rate of new layers relative to their neighbours'.
        warmup: Number of steps until it is reached; 0 for none.
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
        self._loaded: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        return f"NewLayers(scale={self.scale:g}, warmup={self.warmup}, anchored={self.anchored})"

    def __call__(self, grower: Grower, round: Round) -> None:
        """Attach to the grower's optimizer, for the parameters just inserted."""
        self.attach(grower.model, grower.optimizer, round.new_parameters)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str] = ()
    ) -> None:
        """Hook into an optimizer; what `load_state_dict` was given, if anything, goes on.

        Args:
            model: The grown model.
            optimizer: The optimizer that trains it.
            names: Names of the parameters just inserted.

        Raises:
            TrainingError: There are no such parameters.
        """
        parameters = dict(model.named_parameters())
        loaded = self._loaded or {"ages": {}, "origins": {}}
        unknown = [name for name in (*names, *loaded["ages"]) if name not in parameters]
        if unknown:
            raise TrainingError(
                f"names: {type(model).__name__} has no parameters {unknown}; give names of "
                "parameters of the model as it is now."
            )
        for name, age in loaded["ages"].items():
            self._ages[parameters[name]] = age
        for name, origin in loaded["origins"].items():
            self._origins[parameters[name]] = origin.to(parameters[name]).clone()
        for name in names:
            self._ages[parameters[name]] = 0
            if self.anchored:
                self._origins[parameters[name]] = parameters[name].detach().clone()
        if optimizer is not self._optimizer:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        self._model, self._optimizer, self._loaded = model, optimizer, None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the steps and the initial value of every new parameter, by name."""
        if self._loaded is not None:
            return dict(self._loaded)
        named = () if self._model is None else self._model.named_parameters()
        names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        return {
            "ages": {names[p]: age for p, age in self._ages.items() if p in names},
            "origins": {names[p]: o.clone() for p, o in self._origins.items() if p in names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the next `attach` finds the parameters by name."""
        self._loaded = state

    def _share(self, age: int) -> float:
        return self.scale * min(1.0, (age + 1) / (self.warmup + 1))

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        if optimizer is not self._optimizer:
            return None
        # an optimizer without the setting may decay all the same
        groups = [g for g in optimizer.param_groups if g.get("weight_decay", 1)]
        decayed = {p for group in groups for p in group["params"]}
        self._shifted = [(p, o) for p, o in self._origins.items() if p in decayed]
        self._shift(-1)
        self._before = [
            (parameter, parameter.detach().clone())
            for parameter, age in self._ages.items()
            if self._share(age) != 1
        ]
        args = tuple(self._unshifted(value) for value in args)
        return args, {name: self._unshifted(value) for name, value in kwargs.items()}

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
        """Turn parameters into deviations (−1), or back (1)."""
        for parameter, origin in self._shifted:
            parameter.add_(origin, alpha=sign)

    def _unshifted(self, closure: Any) -> Any:
        """The closure, evaluated at the parameters and not at their deviations."""
        if not callable(closure):
            return closure

        def evaluated() -> Any:
            self._shift(1)
            try:
                return closure()
            finally:
                self._shift(-1)

        return evaluated


class LineSearch:
    """A backtracking line search over the first steps after an insertion.

    The optimizer makes `steps` steps on all the data that decided. A step s from θ that does not
    lower their loss L enough is halved, t = 1, ½, ¼, …, until it does (Armijo):

        L(θ + t s) ≤ L(θ) + c t ⟨∇L(θ), s⟩,    or L(θ + t s) ≤ L(θ) where ⟨∇L, s⟩ > 0,

    and undone where 20 trials do not suffice. The optimizer's state is that of whole steps. A step
    costs a gradient pass over the data, and a forward pass per trial.

    Args:
        steps: Number of steps.
        sufficient: c.

    Raises:
        TrainingError: An argument is out of range.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm 3.1.

    Example:
        >>> from constrained_growth.training import LineSearch
        >>> LineSearch(steps=3)
        LineSearch(steps=3)
    """

    def __init__(self, steps: int = 5, *, sufficient: float = 1e-4) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise TrainingError(f"steps={steps!r} of LineSearch is not a positive whole number.")
        if not 0 <= sufficient < 1:
            raise TrainingError(
                f"sufficient={sufficient!r} of LineSearch must be at least 0 and below 1."
            )
        self.steps, self.sufficient = steps, sufficient

    def __repr__(self) -> str:
        return f"LineSearch(steps={self.steps})"

    def __call__(self, grower: Grower, round: Round | None = None) -> list[float]:
        """Make the steps.

        Returns:
            The share t taken of each step, 0 for one that was undone.
        """
        return [self._step(grower) for _ in range(self.steps)]

    def _step(self, grower: Grower) -> float:
        optimizer = grower.optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        start = _mean_loss(grower, gradients_of=trained)
        before = [p.detach().clone() for p in trained]
        gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            step = [p - b for p, b in zip(trained, before, strict=True)]
            pairs = zip(gradients, step, strict=True)
            products = [whole((g * s).sum()) for g, s in pairs if g is not None]
            # rounding may differ between processes, and all have to take the same share
            slope = everywhere(lambda: min(float(sum(products)), 0.0), None)[0]
            share = 1.0
            for _ in range(20):
                if _mean_loss(grower) <= start + self.sufficient * share * slope:  # False for NaN
                    return share
                share /= 2
                for p, b, s in zip(trained, before, step, strict=True):
                    p.copy_(b + share * s)
            for p, b in zip(trained, before, strict=True):
                p.copy_(b)
        return 0.0


def _mean_loss(grower: Grower, gradients_of: Sequence[Tensor] = ()) -> float:
    """The mean over the samples of all processes; its gradient is put into `.grad` of these."""
    model = grower.model

    def read() -> tuple[float, int]:
        total, samples = 0.0, 0
        for input, target, size in sized_batches(model, grower.data):
            loss = grower.loss_fn(call(model, input), target) * size
            if gradients_of:
                loss.backward()
            total, samples = total + float(loss.detach()), samples + size
        return total, samples

    sharded = is_sharded(model)
    found = everywhere(read, None, collective=sharded)
    reshard(model)
    samples = sum(size for _, size in found)
    if gradients_of and not sharded:
        _add_up_gradients(gradients_of)
    # a sharded model averages gradients over the processes, where we want their sum
    factor = (num_processes(None) if sharded else 1) / samples
    for parameter in gradients_of:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return sum(total for total, _ in found) / samples


def _add_up_gradients(parameters: Sequence[Tensor]) -> None:
    """Over all processes; a parameter has a gradient where it has one on any of them."""
    have = everywhere(lambda: [p.grad is not None for p in parameters], None)
    reached = [p for p, on in zip(parameters, zip(*have, strict=True), strict=True) if any(on)]
    for p in reached:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    add_up([p.grad for p in reached if p.grad is not None], None)
