"""L(θ, v) of a candidate that stands at its site and is not inserted."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    classified,
    feedforward,
    label,
    mean_loss,
    moved_loss,
    nothing_left_behind,
    refused,
    splice,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP
from constrained_growth.curvature import (
    FORWARD_PASSES,
    JOINT_PRODUCT_PASSES,
    PRODUCT_PASSES,
    VirtualLoss,
)
from constrained_growth.directional import directional_derivative
from constrained_growth.verification.extended import ExtendedProblem, hessian, with_gradient

MSE = nn.MSELoss()


def virtual(
    model: nn.Module,
    data: Any,
    one: cg.Candidate,
    joint: bool = False,
    loss_fn: Any = CROSS_ENTROPY,
) -> tuple[cg.GrowthProblem, VirtualLoss]:
    problem = cg.GrowthProblem(model, loss_fn, data, [one])
    return problem, VirtualLoss(problem, cg.solve(problem).candidates[one.name], joint=joint)


def matrix(product: Any, loss: VirtualLoss) -> Tensor:
    """A matrix from its products with unit vectors."""
    return torch.stack([product(e) for e in torch.eye(loss.num_old + loss.size)])


BLOCKS = {
    "identity": lambda: IdentityLinear(4, nn.ReLU()),
    "linear": lambda: ResidualLinear(4, torch.tanh),
    "outer": lambda: ResidualMLP(4, 3, torch.tanh),
    "inner": lambda: ResidualMLP(4, 3, torch.tanh, "inner"),
    "gain": lambda: Gain(4),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_is_that_of_the_network_with_the_layer_in_it(block: str) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=12)
    one = cg.Candidate("1", BLOCKS[block]())
    _, loss = virtual(model, data, one)
    for scale in (0.0, 0.1, 2.0):
        v = scale * torch.randn(loss.size)
        with nothing_left_behind(model):
            found = loss(v)
        assert found == pytest.approx(moved_loss(model, data, one, loss.unflatten(v)), rel=1e-13)


@pytest.mark.parametrize("block", ["linear", "outer", "inner", "gain"])
@pytest.mark.parametrize("joint", [False, True], ids=["new", "old and new"])
def test_gradient_and_hessian_against_the_extended_network(block: str, joint: bool) -> None:
    model, data = feedforward(2, 4, 4, 3, activation=nn.Tanh), classified(30, batch=12)
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    one = cg.Candidate("1", BLOCKS[block]())
    problem, loss = virtual(model, data, one, joint)
    extended = ExtendedProblem(problem)
    zero = extended.zero.numpy()
    skip = 0 if joint else extended.sizes[0]
    gradient = torch.tensor(with_gradient(extended.loss, zero)[1])[skip:]
    bend = torch.tensor(hessian(extended.loss, zero))[skip:, skip:]
    with nothing_left_behind(model):
        found, products = loss.gradient(), matrix(loss.hessian_product, loss)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-14)
    torch.testing.assert_close(products, bend, rtol=0, atol=1e-13)


@pytest.mark.parametrize("joint", [False, True], ids=["new", "old and new"])
@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squares"])
def test_gauss_newton_against_jacobians(joint: bool, regression: bool) -> None:
    """Jᵀ H J with H known: 2/(N out) for the squares, diag p − ppᵀ for the cross-entropy."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20, batch=8)
    if regression:
        data = [(x, torch.randn(len(x), 3)) for x, _ in data]
    one = cg.Candidate("1", ResidualMLP(4, 3, torch.tanh))
    problem, loss = virtual(model, data, one, joint, MSE if regression else CROSS_ENTROPY)
    extended = ExtendedProblem(problem)
    skip = 0 if joint else extended.sizes[0]

    def outputs(z: Tensor) -> Tensor:
        return torch.cat([output for output, _ in extended.each(z)])

    jacobian = torch.autograd.functional.jacobian(outputs, extended.zero)
    assert isinstance(jacobian, Tensor)
    jacobian = jacobian[..., skip:]
    p = outputs(extended.zero).softmax(1)
    bend = (
        (2 / 3) * torch.eye(3).expand(20, 3, 3)
        if regression
        else torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    )
    expected = torch.einsum("nia,nij,njb->ab", jacobian, bend, jacobian) / 20
    with nothing_left_behind(model):
        found = matrix(loss.gauss_newton_product, loss)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


class Attention(nn.Module):
    """Attention that returns (hidden, weights-or-None), with a residual tail."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
        return x + self.out(y.squeeze(1)), None


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Attention(), Attention(), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x, _ = self.first(x, scale=scale)
        x, _ = self.second(x, scale=scale)
        return {"logits": self.head(x).mean(1)}


class ScaledGain(nn.Module):
    """A block that asks for the further argument of the module at its site."""

    pinned = ("gain",)
    takes_context = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.gain * x.sin()


@pytest.mark.parametrize("block", [ScaledGain, lambda: ResidualMLP(4, 3, torch.tanh)], ids=label)
def test_contexts_tuples_attention_and_structured_outputs(block: Any) -> None:
    """By differences, as no one else differentiates such a network twice."""
    model = Sequence().eval()
    x, scale, y = torch.randn(6, 5, 4), torch.tensor(1.7), torch.randint(3, (6,))
    data = [((x[:4], scale), y[:4]), ((x[4:], scale), y[4:])]
    one = cg.Candidate("first", block())
    problem, loss = virtual(
        model, data, one, loss_fn=lambda output, target: F.cross_entropy(output["logits"], target)
    )
    u, w, h = torch.randn(loss.size), torch.randn(loss.size), 1e-4
    slope = (loss(h * u) - loss(-h * u)) / (2 * h)
    assert slope == pytest.approx(float(loss.gradient() @ u), rel=1e-6)
    bend = (loss(h * u) - 2 * loss(0 * u) + loss(-h * u)) / h**2
    assert bend == pytest.approx(float(loss.hessian_product(u) @ u), rel=1e-4)
    cross = float(loss.hessian_product(u) @ w)
    assert cross == pytest.approx(float(loss.hessian_product(w) @ u), rel=1e-10)
    products = matrix(loss.gauss_newton_product, loss)
    torch.testing.assert_close(products, products.mT, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(products)[0] > -1e-14
    assert problem.candidates == (one,)


def test_weights_of_batches() -> None:
    """A batch counts as much as the problem says, and one of weight 0 is passed over."""
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(30, batch=12)
    data[1] = (data[1][0] * float("nan"), data[1][1])
    weights = {12: 0.0, 6: 2.0}
    first = data[0][0]
    one = cg.Candidate("1", ResidualLinear(4, torch.tanh))
    problem = cg.GrowthProblem(
        model,
        CROSS_ENTROPY,
        data,
        [one],
        weight=lambda x, y: 5.0 if torch.equal(x, first) else weights[len(x)],
    )
    solution = cg.solve(problem)
    loss = VirtualLoss(problem, solution.candidates["1"])
    parts = [mean_loss(model, [batch]).item() for batch in (data[0], data[2])]
    assert loss(torch.zeros(loss.size)) == pytest.approx((5 * parts[0] + 2 * parts[1]) / 7)
    expected = torch.cat([v.flatten() for v in solution.multipliers["1"].values()])
    torch.testing.assert_close(-loss.gradient(), expected, rtol=0, atol=1e-14)
    step = {name: torch.randn_like(v) for name, v in solution.multipliers["1"].items()}
    slope = directional_derivative(problem, "1", step)
    linear = -sum(float((solution.multipliers["1"][n] * v).sum()) for n, v in step.items())
    assert slope == pytest.approx(linear, rel=1e-10)


def test_all_passes_see_the_same_random_numbers_and_batches() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3)).train()
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    _, loss = virtual(model, data, cg.Candidate("1", ResidualLinear(4, torch.tanh)))
    u, h = torch.randn(loss.size), 1e-5
    with nothing_left_behind(model):
        assert loss(u) == loss(u)
        slope = (loss(h * u) - loss(-h * u)) / (2 * h)
    assert slope == pytest.approx(float(loss.gradient() @ u), rel=1e-7)


def test_buffers_are_not_written_to() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).train()
    data = classified(20, batch=8)
    _, loss = virtual(model, data, cg.Candidate("2", ResidualMLP(4, 3, torch.tanh)))
    with nothing_left_behind(model):
        products = matrix(loss.hessian_product, loss)
    torch.testing.assert_close(products, products.mT, rtol=0, atol=1e-13)


def test_gauss_newton_of_outputs_in_a_dataclass() -> None:
    @dataclasses.dataclass(frozen=True)
    class Output:
        logits: Tensor

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Output:
            return Output(self.inner(x))

    model, data = feedforward(2, 4, 3), classified(8)
    _, plain = virtual(model, data, candidate())
    _, wrapped = virtual(
        Wrapped(model),
        data,
        candidate("inner.1"),
        loss_fn=lambda y, target: CROSS_ENTROPY(y.logits, target),
    )
    vector = torch.randn(plain.size)
    torch.testing.assert_close(
        wrapped.gauss_newton_product(vector), plain.gauss_newton_product(vector)
    )


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_matrix() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    _, loss = virtual(model, data, candidate(), loss_fn=lambda output, target: output.mean())
    with nothing_left_behind(model), refused(cg.RuleError, "gauss_newton", "linear", "hessian"):
        loss.gauss_newton_product(torch.ones(loss.size))
    assert not bool(loss.hessian_product(torch.ones(loss.size)).isnan().any())


class Operations(TorchDispatchMode):
    """Counts what PyTorch's table of operations says (its own counter does not bear our passes)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket]
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def test_what_passes_cost_in_operations() -> None:
    """On a deep network, in units of an ordinary forward and backward pass."""
    model, data = feedforward(*[32] * 9, activation=nn.Tanh), classified(64, width=32, classes=32)
    one = cg.Candidate("1", ResidualLinear(32, torch.tanh))
    _, loss = virtual(model, data, one)

    def operations(work: Any) -> int:
        with Operations() as counter:
            work()
        return counter.total

    grown = splice(model, "1", one.block)
    unit = operations(lambda: mean_loss(grown, data).backward())
    v = torch.ones(loss.size)
    assert operations(lambda: loss(v)) == pytest.approx(FORWARD_PASSES * unit, rel=0.1)
    for product in (loss.hessian_product, loss.gauss_newton_product):
        work = functools.partial(product, v)
        assert 0.75 * PRODUCT_PASSES < operations(work) / unit <= PRODUCT_PASSES
    _, both = virtual(model, data, one, joint=True)
    v = torch.ones(both.num_old + both.size)
    assert operations(both.gradient) == pytest.approx(unit, rel=0.1)
    for product in (both.hessian_product, both.gauss_newton_product):
        work = functools.partial(product, v)
        assert 0.75 * JOINT_PRODUCT_PASSES < operations(work) / unit <= JOINT_PRODUCT_PASSES
    assert both.passes == 1 + 2 * JOINT_PRODUCT_PASSES
    assert loss.passes == pytest.approx(FORWARD_PASSES + 2 * PRODUCT_PASSES)


def dense_hessian(model: nn.Module, data: Any, loss_fn: Any) -> Tensor:
    """∇²_θθ L of the trainable parameters, by PyTorch."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    start = [model.get_parameter(name).detach() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in start])
        own = {n: t.view_as(p) for n, t, p in zip(names, parts, start, strict=True)}
        losses = [
            len(x) * loss_fn(torch.func.functional_call(model, own, (x,)), y) for x, y in data
        ]
        return torch.stack(losses).sum() / sum(len(x) for x, _ in data)

    found = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in start]))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [(2, 4, 3), (2, 3, 3, 2)])
def test_the_smallest_eigenvalue_is_that_of_the_dense_hessian(
    sizes: tuple[int, ...], frozen: bool
) -> None:
    model: Any = feedforward(*sizes, activation=nn.Tanh)
    model[0].requires_grad_(not frozen)
    data = classified(40, batch=16, classes=sizes[-1])
    one = cg.Candidate("1", ResidualMLP(sizes[1], 2, torch.tanh))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    with nothing_left_behind(model):
        found = cg.curvature.smallest_eigenvalue(problem)
    values = torch.linalg.eigvalsh(dense_hessian(model, data, CROSS_ENTROPY))
    assert found == pytest.approx(float(values[0]), abs=2e-3 * float(values.abs().max()))


def test_a_saddle_and_a_minimum_are_told_apart() -> None:
    x = torch.randn(50, 2)
    data = [(x, x @ torch.tensor([[1.0], [-2.0]]))]
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    model = nn.Sequential(first, nn.Identity(), last)
    one = cg.Candidate("1", ResidualMLP(2, 2, torch.tanh))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert cg.curvature.smallest_eigenvalue(cg.GrowthProblem(model, MSE, data, [one])) < -0.1
    first.requires_grad_(False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        last.weight.copy_(torch.tensor([[1.0, -2.0]]))
    problem = cg.GrowthProblem(model, MSE, data, [one])
    exact = torch.linalg.eigvalsh(2 * x.T @ x / len(x))[0]
    assert cg.curvature.smallest_eigenvalue(problem) == pytest.approx(float(exact), rel=1e-3)
    model.requires_grad_(False)
    with refused(cg.RuleError, "no trainable parameters"):
        cg.curvature.smallest_eigenvalue(problem)


def test_too_few_products_are_said() -> None:
    model, data = feedforward(2, 16, 16, 3, activation=nn.Tanh), classified(40)
    problem = cg.GrowthProblem(
        model, CROSS_ENTROPY, data, [cg.Candidate("1", ResidualMLP(16, 2, torch.tanh))]
    )
    with refused(cg.RuleError, "max_products=2", "more"):
        cg.curvature.smallest_eigenvalue(problem, max_products=2)
