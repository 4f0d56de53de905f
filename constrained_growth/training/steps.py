"""The first optimizer steps after an insertion: policies for `Grower(after_insertion=…)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from constrained_growth._arguments import instance, integer, number, positive_int
from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import several
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import call, device_of
from constrained_growth.errors import CheckpointError, TrainingError
from constrained_growth.insertion.training_state import as_optimizers
from constrained_growth.training.grower import Grower
from constrained_growth.training.history import Round

T = TypeVar("T")


class NewLayers:
    """A learning-rate warm-up for new layers, and weight decay towards their initial values.

    It hooks into any optimizer. Of each step of a new parameter p only a share is taken, which
    rises linearly from 0 to `scale` over `warmup` steps. During the step the optimizer sees the
    deviation p − p₀ from the initial value p₀, so weight decay pulls an identity layer towards the
    identity, not towards zero. Outside a `Grower` call `attach(model, optimizer, names)` after
    `insert`.

    On seven tasks (theory/results/growth.md) a warm-up over 20 steps left the final loss as it was
    and made large jumps of the loss three to seven times smaller; decay towards the initial values
    ended with the same loss as decay to zero, or a lower one.

    Args:
        scale: Learning rate of new layers relative to that of the others.
        warmup: Number of steps until it is reached; 0 for none.

    Raises:
        TrainingError: An argument is out of range.
    """

    def __init__(self, scale: float = 1.0, warmup: int = 20) -> None:
        self.scale = number("scale", scale, TrainingError, "(0, inf)")
        self.warmup = integer("warmup", warmup, TrainingError, 0)
        # new parameter → steps it has made, initial value
        self._new: dict[Tensor, tuple[int, Tensor]] = {}
        self._loaded: Mapping[str, tuple[int, Tensor]] = {}
        self._model = nn.Module()
        self._hooks: list[Any] = []
        self._before: list[tuple[Tensor, Tensor, float]] = []
        self._shifted: list[tuple[Tensor, Tensor]] = []  # during a step

    def __repr__(self) -> str:
        return f"NewLayers(scale={self.scale:g}, warmup={self.warmup})"

    def __call__(self, grower: Grower, round: Round) -> None:
        """Attach to the grower's optimizer, for the parameters just inserted."""
        self.attach(grower.model, grower.optimizer, round.new_parameters)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        names: Iterable[str] = (),
    ) -> None:
        """Hook into the optimizers of a grown model, for the parameters `names` just inserted.

        Hooks on another optimizer are removed, and a state that was loaded goes on.
        """
        instance("model", model, nn.Module, TrainingError, "the grown model")
        if not (optimizers := as_optimizers(optimizer)):
            raise TrainingError(f"optimizer={optimizer!r} is none; give those that train.")
        parameters = dict(model.named_parameters())
        unknown = [name for name in (*names, *self._loaded) if name not in parameters]
        if unknown:
            raise TrainingError(f"names: {type(model).__name__} has no parameters {unknown}.")
        for name, (age, start) in self._loaded.items():
            self._new[parameters[name]] = (age, start.to(parameters[name]).clone())
        for name in names:
            self._new[parameters[name]] = (0, parameters[name].detach().clone())
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for one in optimizers:
            self._hooks.append(one.register_step_pre_hook(self._before_step))
            self._hooks.append(one.register_step_post_hook(self._after_step))
        self._model, self._loaded = model, {}

    def state_dict(self) -> dict[str, Any]:
        """Name of every new parameter → steps it has made, initial value."""
        named = [(n, self._new[p]) for n, p in self._model.named_parameters() if p in self._new]
        return {name: (age, start.clone()) for name, (age, start) in named}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the next `attach` finds the parameters by name."""
        instance("state", state, Mapping, CheckpointError, "what state_dict returned")
        self._loaded = state

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._shift(1)  # after a step that has failed
        self._before = []
        # an optimizer without the setting may decay all the same
        groups = [group for group in optimizer.param_groups if group.get("weight_decay", 1)]
        decayed = {p for group in groups for p in group["params"]}
        new = _trained_by(optimizer, self._new)
        self._shifted = [(p, start) for p, (_, start) in new.items() if p in decayed]
        self._shift(-1)
        for parameter, (age, _) in new.items():
            share = self.scale * min(1.0, (age + 1) / (self.warmup + 1))
            if share != 1:
                self._before.append((parameter, parameter.clone(), share))
        # a closure runs the model, which must not see deviations
        args = tuple(self._unshifted(value) for value in args)
        return args, {name: self._unshifted(value) for name, value in kwargs.items()}

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, before, share in self._before:
            parameter.copy_(before.lerp(parameter, share))
        self._shift(1)
        self._shifted, self._before = [], []
        for parameter, (age, start) in _trained_by(optimizer, self._new).items():
            self._new[parameter] = (age + 1, start)

    @torch.no_grad()
    def _shift(self, sign: int) -> None:  # parameters into deviations (−1), or back (1)
        for parameter, start in self._shifted:
            parameter.add_(start, alpha=sign)

    def _unshifted(self, closure: Any) -> Any:
        """The closure, evaluated at the parameters and not at their deviations."""

        def evaluated() -> Any:
            self._shift(1)
            try:
                found = closure()
            except BaseException:  # of which the hook after the step does not hear
                self._shifted, self._before = [], []
                raise
            self._shift(-1)
            return found

        return evaluated if callable(closure) else closure


def _trained_by(optimizer: torch.optim.Optimizer, new: Mapping[Tensor, T]) -> dict[Tensor, T]:
    own = {p for group in optimizer.param_groups for p in group["params"]}
    return {parameter: value for parameter, value in new.items() if parameter in own}


@dataclass(frozen=True)
class LineSearch:
    """A backtracking line search over the first steps after an insertion.

    A step s from θ is halved, t = 1, ½, ¼, …, until the loss L on the data that decided is low
    enough, L(θ + t s) ≤ L(θ) + 10⁻⁴ t min(⟨∇L(θ), s⟩, 0), and undone after 20 trials. The state
    of the optimizer is that of whole steps. It changed the final loss on one of seven tasks, by
    0.1 % (theory/results/growth.md).

    Args:
        steps: Number of steps. Each costs a gradient pass over the data, and a forward pass per
            trial.

    Raises:
        TrainingError: `steps` is out of range; or, when called, there are several processes.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm 3.1.
    """

    steps: int = 5

    def __post_init__(self) -> None:
        positive_int("steps", self.steps, TrainingError)

    def __call__(self, grower: Grower, round: Round | None = None) -> list[float]:
        """Make the steps, and return the share t taken of each, 0 for one that was undone."""
        if several(None) or is_sharded(grower.model):
            raise TrainingError("LineSearch works on one process alone; leave it out.")
        return [self._step(grower) for _ in range(self.steps)]

    def _step(self, grower: Grower) -> float:
        optimizers = grower.optimizers
        trained = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        for one in optimizers:
            one.zero_grad()
        start = _mean_loss(grower, trained)
        before = [p.detach().clone() for p in trained]
        gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        for one in optimizers:
            one.step()
            one.zero_grad()
        with torch.no_grad():
            step = [p - b for p, b in zip(trained, before, strict=True)]
            pairs = zip(gradients, step, strict=True)
            slope = min(sum(float((g * s).sum()) for g, s in pairs if g is not None), 0.0)
            for share in (0.5**halvings for halvings in range(20)):
                if _mean_loss(grower) <= start + 1e-4 * share * slope:  # False for NaN
                    return share
                for p, b, s in zip(trained, before, step, strict=True):
                    p.copy_(b + share / 2 * s)
            for p, b in zip(trained, before, strict=True):
                p.copy_(b)
        return 0.0


def _mean_loss(grower: Grower, trained: Sequence[Tensor] = ()) -> float:
    """The mean over the samples; puts its gradient into `.grad` of `trained`."""
    total, samples = 0.0, 0
    for input, target in batches(grower.data, device_of(grower.model)):
        size = batch_size(input, target)
        loss = size * grower.loss_fn(call(grower.model, input), target)
        if trained:
            loss.backward()
        total, samples = total + loss.item(), samples + size
    for p in trained:
        p.grad = None if p.grad is None else p.grad / samples
    return total / samples
