"""Random models that read a tensor past its site: λ is that of the layer that `insert` makes.

A model keeps activations, returns what it computes from them, changes them in place, differentiates
itself; a loss reads what was kept, runs the model again, or differentiates it. Whatever they do, λ
is minus the gradient of the layer that was really inserted, or the problem is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from helpers import Gain, nothing_left_behind
from hypothesis import assume, event, given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import constrained_growth as cg

WIDTH, POSITIONS, OUT = 4, 5, 3


# --- pieces of models: each keeps the shape of what it gets ---------------------------------------


class Keeps(nn.Module):
    """Keeps what its inner module returns in an attribute, where a later layer reads it."""

    def __init__(self, inner: nn.Module, rest: nn.Module, change: str) -> None:
        super().__init__()
        self.inner, self.rest, self.change = Keeping(inner), rest, change

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.change == "the output":
            y.mul_(0.7)
        elif self.change == "what was kept":
            self.inner.skip.add_(0.3)
        return self.rest(y) + self.inner.skip.sin()


class Keeping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.skip = self.inner(x)
        return self.skip


class Second(NamedTuple):
    first: Tensor
    second: Tensor


SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda y: y,
    "view": lambda y: y[:],
    "double": lambda y: 2 * y,
    "sine": torch.sin,
    "detached": lambda y: y.detach().cos(),
}
PACK: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"first": a, "second": b},
    "named tuple": Second,
}


class Twofold(nn.Module):
    """Returns what its inner module returns, and something computed from that."""

    def __init__(self, inner: nn.Module, second: str, pack: str) -> None:
        super().__init__()
        self.inner, self.second, self.pack = inner, SECOND[second], PACK[pack]

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return self.pack(y, self.second(y))


class Joined(nn.Module):
    """Uses both outputs of a `Twofold`."""

    def __init__(self, pair: nn.Module, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.pair, self.left, self.right = pair, left, right

    def forward(self, x: Tensor) -> Tensor:
        both = self.pair(x)
        first, second = both.values() if isinstance(both, dict) else both
        return self.left(first) + self.right(second)


class Around(nn.Module):
    """x and f(x), added or multiplied."""

    def __init__(self, inner: nn.Module, product: bool) -> None:
        super().__init__()
        self.inner, self.product = inner, product

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x * y.sigmoid() if self.product else x + y


class Twice(nn.Module):
    """The same module run two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x) + x)


class Checkpointed(nn.Module):
    """A part that backward runs again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Idle(nn.Module):
    """Samples of one kind alone go through its inner module, and in some batches there are none."""

    def __init__(self, inner: nn.Module, whole: bool) -> None:
        super().__init__()
        self.inner, self.whole = inner, whole

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.detach().mean((1, 2)) > 0.05).nonzero().squeeze(1)
        if self.whole:
            return x + self.inner(x) if len(rows) > 1 else x
        return x.index_add(0, rows, self.inner(x[rows])) if len(rows) else x


class Carries(nn.Module):
    """Keeps a state from batch to batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.state = inner, torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x + self.state)
        self.state = 0.5 * self.state + y.detach().mean((0, 1))
        return y


class Slope(nn.Module):
    """f(x) and its derivative by x."""

    def __init__(self, inner: nn.Module, alone: bool) -> None:
        super().__init__()
        self.inner, self.alone = inner, alone

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = self.inner(x)
        (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return slope + x if self.alone else y + slope


class Damped(nn.Module):
    """Passes half of the gradient on to its inner module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 0.5 * gradient)
        return y


class Stopped(nn.Module):
    """A part without gradients, added to what goes on."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "before":
            return self.inner(x.detach())
        if self.how == "after":
            return x + self.inner(x).detach()
        with torch.no_grad():
            return self.inner(x)


class Hooked(nn.Module):
    """A module with a forward hook of the user's, which keeps or replaces what it returns."""

    def __init__(self, inner: nn.Module, how: str, side: list[Tensor]) -> None:
        super().__init__()
        self.inner = inner
        inner.register_forward_hook(partial(HOOKS[how], side))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _keep(side: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    side.append(output)


def _replace(side: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 1.5 * output


def _keep_and_replace(side: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> Tensor:
    side.append(output)
    return output.cos()


def _keep_a_square(side: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    side.append(output.square())


def _change(side: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.9)


HOOKS = {
    "keep": _keep,
    "replace": _replace,
    "keep and replace": _keep_and_replace,
    "keep a square": _keep_a_square,
    "change": _change,
}

LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv": lambda: nn.Conv1d(POSITIONS, POSITIONS, 3, padding=1),
    "tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
    "relu in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "silu in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(inplace=True)),
    "leaky in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "gelu": nn.GELU,
    "dropout": lambda: nn.Dropout(0.3),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(POSITIONS, momentum=0.3),
    "identity": nn.Identity,
}


# --- descriptions of models, losses and data ------------------------------------------------------


def pieces() -> st.SearchStrategy[Any]:
    """Nested tuples: the kind of a piece, then what it is made of."""
    leaf = st.tuples(st.just("leaf"), st.sampled_from(sorted(LEAVES)))

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        changes = st.sampled_from(["nothing", "the output", "what was kept"])
        return st.one_of(
            st.tuples(st.just("chain"), inner, inner),
            st.tuples(st.just("chain"), inner, inner),
            st.tuples(st.just("keeps"), inner, inner, changes),
            st.tuples(
                st.just("two"),
                inner,
                inner,
                inner,
                st.sampled_from(sorted(SECOND)),
                st.sampled_from(sorted(PACK)),
            ),
            st.tuples(st.just("around"), inner, st.booleans()),
            st.tuples(st.just("twice"), inner),
            st.tuples(st.just("checkpointed"), inner),
            st.tuples(st.just("slope"), inner, st.booleans()),
            st.tuples(st.just("stopped"), inner, st.sampled_from(["before", "after", "no_grad"])),
            st.tuples(st.just("hooked"), inner, st.sampled_from(sorted(HOOKS))),
            st.tuples(st.just("frozen"), inner),
            st.tuples(st.just("idle"), inner, st.booleans()),
            st.tuples(st.just("carries"), inner),
            st.tuples(st.just("damped"), inner),
        )

    return st.recursive(leaf, around, max_leaves=5)


def built(piece: Any, side: list[Tensor]) -> nn.Module:
    kind, *parts = piece
    if kind == "leaf":
        return LEAVES[parts[0]]()
    rest: list[Any]
    inner, *rest = [built(part, side) if isinstance(part, tuple) else part for part in parts]
    if kind == "chain":
        return nn.Sequential(inner, *rest)
    if kind == "two":
        left, right, second, pack = rest
        return Joined(Twofold(inner, second, pack), left, right)
    if kind == "hooked":
        return Hooked(inner, rest[0], side)
    if kind == "frozen":
        return inner.requires_grad_(False)
    made: dict[str, Callable[..., nn.Module]] = {
        "keeps": Keeps,
        "around": Around,
        "twice": Twice,
        "checkpointed": Checkpointed,
        "idle": Idle,
        "carries": Carries,
        "damped": Damped,
        "slope": Slope,
        "stopped": Stopped,
    }
    return made[kind](inner, *rest)


class Net(nn.Module):
    """Keeps its input and what follows it, to be differentiated by; may return hidden states."""

    def __init__(self, body: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, WIDTH), body, nn.Linear(WIDTH, OUT)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Any:
        self.x = x.detach().requires_grad_()
        self.first = self.stem(self.x)
        last = self.body(self.first.tanh())
        output = self.head(last)
        return (output, [self.first, last]) if self.hidden else output


EXTRAS = (
    "kept",
    "again",
    "slope of output",
    "penalty on a hidden tensor",
    "Hessian-vector product",
    "slope of loss by a weight",
    "output in place",
    "straight through",
    "own target",
    "running centre",
)


class Centre(nn.Module):
    """A running mean in a buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(OUT))
        self.seen = 0

    def forward(self, output: Tensor) -> Tensor:
        self.seen += 1
        self.mean.lerp_(output.detach().mean((0, 1)), 0.3)
        return (output - self.mean).square().mean()


@dataclass
class Loss:
    """The mean squared error and more."""

    net: Net
    side: list[Tensor]
    extras: frozenset[str]
    centre: Centre

    def __call__(self, output: Any, target: tuple[Tensor, Tensor]) -> Tensor:
        net, (x, y) = self.net, target
        at, first = net.x, net.first
        states = []
        if net.hidden:
            output, states = output
        kept = list(self.side)
        self.side.clear()
        if "output in place" in self.extras:
            output.mul_(1.1)
        loss = (output - y).square().mean()
        for state in states:
            loss = loss + 0.2 * state.sin().square().mean()
        if "running centre" in self.extras:
            loss = loss + self.centre(output)
        if "kept" in self.extras:
            loss = loss + sum((0.3 * k.square().mean() for k in kept), torch.zeros(()))
        if "straight through" in self.extras:
            loss = loss + (output + (output.round() - output).detach()).square().mean()
        if "slope of output" in self.extras:
            loss = loss + (slope(output.sum(), at) - 1).square().mean()
        if "penalty on a hidden tensor" in self.extras:
            loss = loss + slope(output.square().sum(), first).square().sum(-1).mean()
        if "Hessian-vector product" in self.extras:
            along = slope(output.square().sum(), at).tanh().sum()
            loss = loss + slope(along, at).square().mean()
        if "slope of loss by a weight" in self.extras:
            loss = loss + slope(loss, net.stem.weight).square().sum()
        if "own target" in self.extras:
            with torch.no_grad():
                other = net(x - 0.1)
            loss = loss + ((other[0] if net.hidden else other) - output).square().mean()
            self.side.clear()
        if "again" in self.extras:
            other = net(x + 0.3)
            loss = loss + ((other[0] if net.hidden else other) - output).square().mean()
            self.side.clear()
        return loss


def slope(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of, create_graph=True, materialize_grads=True)
    return found


@dataclass(frozen=True)
class Setting:
    """All that a model, its loss and its data are made from, the same each time."""

    piece: Any
    hidden: bool
    extras: frozenset[str]
    training: bool
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None

    def make(self) -> tuple[Net, Loss]:
        torch.default_generator.manual_seed(1)
        side: list[Tensor] = []
        net = Net(built(self.piece, side), self.hidden).train(self.training)
        return net, Loss(net, side, self.extras, Centre())

    def data(self) -> list[Any]:
        torch.default_generator.manual_seed(2)
        batches = []
        for size in self.sizes:
            x, y = torch.randn(size, POSITIONS, 3), torch.randn(size, POSITIONS, OUT)
            batches.append((x, (x, y)))
        return batches

    def weight(self) -> Callable[[Any, Any], float] | None:
        if self.weights is None:
            return None
        weights = dict(zip((float(x.sum()) for x, _ in self.data()), self.weights, strict=True))
        return lambda x, _: weights[float(x.sum())]


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    sizes = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    weights = st.tuples(*(st.sampled_from([0.5, 1.0, 3.0]) for _ in sizes))
    return sizes, draw(st.none() | weights)


@st.composite
def sites(draw: st.DrawFn, net: Net) -> list[cg.Candidate]:
    """Blocks at random sites, several at some of them."""
    names = [name for name, _ in net.named_modules() if name]
    found = []
    for number in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        module, output = net.get_submodule(name), None
        if isinstance(module, Twofold):
            keys = ["first", "second"] if module.pack is PACK["dict"] else [0, 1]
            output = draw(st.sampled_from([None, *keys]))
        width = OUT if name == "head" else WIDTH
        kinds = ["residual", "inner", "own"] + ["identity"] * 3 * isinstance(module, nn.ReLU)
        torch.default_generator.manual_seed(3 + number)
        block = BLOCKS[draw(st.sampled_from(kinds))](width)
        found.append(cg.Candidate(name, block, name=f"{number} after {name}", output=output))
    return found


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "residual": lambda width: cg.blocks.ResidualMLP(width, 3, torch.tanh),
    "inner": lambda width: cg.blocks.ResidualMLP(width, 3, torch.tanh, "inner"),
    "identity": lambda width: cg.blocks.IdentityLinear(width, nn.ReLU()),
    "own": Gain,
}


# --- the layer really inserted --------------------------------------------------------------------


def measured(
    net: Net, loss: Loss, setting: Setting, of: list[Tensor]
) -> tuple[float, list[Tensor]]:
    """The weighted mean loss and its gradients, batch by batch as in training.

    The random numbers are those that `solve` draws.
    """
    data, weight = setting.data(), setting.weight()
    loss.side.clear()
    torch.default_generator.manual_seed(4)
    weights = [len(x) if weight is None else weight(x, y) for x, y in data]
    total, gradients = 0.0, [torch.zeros_like(one) for one in of]
    for share, (x, y) in zip(weights, data, strict=True):
        value = share / sum(weights) * loss(net(x), y)
        total += value.item()
        found = torch.autograd.grad(value, of, materialize_grads=True)
        gradients = [one + more for one, more in zip(gradients, found, strict=True)]
    return total, gradients


def trained(net: Net) -> list[Tensor]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def runs(setting: Setting) -> bool:
    """Whether the model can be trained at all: PyTorch refuses some changes in place.

    It does not see them in what a checkpointed part computes again, and trains on wrong gradients;
    so the model has to run without checkpoints too.
    """
    value = math.nan
    try:
        for piece in dict.fromkeys((setting.piece, unchecked(setting.piece))):
            one = replace(setting, piece=piece)
            net, loss = one.make()
            value, _ = measured(net, loss, one, trained(net))
    except RuntimeError:
        return False
    return math.isfinite(value)


def unchecked(piece: Any) -> Any:
    """The same without checkpoints."""
    if not isinstance(piece, tuple):
        return piece
    return unchecked(piece[1]) if piece[0] == "checkpointed" else tuple(map(unchecked, piece))


def inserted(solution: cg.Solution, name: str, setting: Setting) -> dict[str, Tensor]:
    """−∇_v of the model into which `insert` has put the block."""
    net, loss = setting.make()
    chosen = cg.Solution(**{**vars(solution), "decision": cg.Decision((name,))})
    record = cg.insert(net, chosen, data=())  # whose check of the outputs is tested elsewhere
    layer = net.get_submodule(record.insertions[0].after).get_submodule("inserted")
    names = list(solution.multipliers[name])
    pins: list[Tensor] = [layer.get_parameter(key) for key in names]
    value, grads = measured(net, loss, setting, pins)
    torch.testing.assert_close(value, solution.loss, rtol=1e-9, atol=1e-12)
    return {key: -grad for key, grad in zip(names, grads, strict=True)}


def check(setting: Setting, candidates: list[cg.Candidate], tally: Counter[str]) -> None:
    net, loss = setting.make()
    torch.default_generator.manual_seed(4)
    try:
        with nothing_left_behind(net), nothing_left_behind(loss.centre):
            data, weight = setting.data(), setting.weight()
            torch.default_generator.manual_seed(4)
            problem = cg.GrowthProblem(net, loss, data, candidates, weight=weight)
            loss.side.clear()
            solution = cg.solve(problem)
            torch.default_generator.manual_seed(4)
    except cg.GrowthError as error:
        event(f"refused: {str(error)[:60]}")
        if len(candidates) > 1:
            for one in candidates:
                check(setting, [one], tally)
        else:
            tally["refused"] += 1
        return
    event(solution.method.name)
    net, loss = setting.make()
    _, grads = measured(net, loss, setting, trained(net))
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    torch.testing.assert_close(solution.stationarity, norm.item(), rtol=1e-8, atol=1e-12)
    for one in candidates:
        try:
            expected = inserted(solution, one.name, setting)
        except cg.GrowthError as error:
            event(f"not inserted: {str(error)[:60]}")
            tally["refused"] += 1
            continue
        found = solution.multipliers[one.name]
        size = torch.cat([value.flatten() for value in expected.values()]).norm()
        for key, value in expected.items():
            error = (found[key] - value).norm()
            assert error <= 1e-8 * size + 1e-13, (one, setting, float(error / size))
        tally["right"] += 1


REFUSED = 0.2
"""At most this share of the candidates may be refused; the others are right."""


def test_the_multiplier_is_that_of_the_inserted_layer() -> None:
    tally: Counter[str] = Counter()

    @given(data=st.data())
    @settings(max_examples=320)
    def examples(data: st.DataObject) -> None:
        sizes, weights = data.draw(batches())
        setting = Setting(
            piece=data.draw(pieces()),
            hidden=data.draw(st.booleans()),
            extras=frozenset(data.draw(st.lists(st.sampled_from(EXTRAS), max_size=3))),
            training=data.draw(st.booleans()),
            sizes=sizes,
            weights=weights,
        )
        assume(runs(setting))
        check(setting, data.draw(sites(setting.make()[0])), tally)

    examples()
    assert tally["right"] > 320
    assert tally["refused"] <= REFUSED * tally.total()
