"""One test for each way in which a model or a loss reads more than the output of a site."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, nothing_left_behind, refused
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import constrained_growth as cg

Make = Callable[[], tuple[Any, Callable[[Any, Any], Tensor]]]
"""A new model, always the same, and its loss."""


def residual(width: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return cg.blocks.ResidualMLP(width, 3, torch.tanh)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    widths = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*widths)


def data(width: int = 2) -> list[Any]:
    """Ragged batches `(x, (x, y))`."""
    torch.manual_seed(2)
    return [(x, (x, torch.randn(len(x), width))) for x in (torch.randn(5, 3), torch.randn(2, 3))]


def assert_inserted(
    make: Make, after: str, method: cg.Method, width: int = 2, *, site_width: int = 4
) -> cg.GrowthProblem:
    """λ of two blocks, with and without factors, is that of the layers really inserted."""
    model, loss_fn = make()
    candidates = [
        cg.Candidate(after, block, name=type(block).__name__)
        for block in (residual(site_width), Gain(site_width))
    ]
    problem = cg.GrowthProblem(model, loss_fn, data(width), candidates)
    solution = cg.solve(problem)
    assert (problem.method, solution.method) == (method, method)
    for one in candidates:
        expected = inserted(make, solution, one.name, width)
        size = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
        assert size > 1e-5
        for key, value in expected.items():
            assert (solution.multipliers[one.name][key] - value).norm() <= 1e-10 * size
    model, loss_fn = make()
    gradients = torch.autograd.grad(
        mean_loss(model, loss_fn, width), list(model.parameters()), materialize_grads=True
    )
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert solution.stationarity == pytest.approx(norm, rel=1e-10)
    return problem


def mean_loss(model: Any, loss_fn: Any, width: int) -> Tensor:
    batches = data(width)
    losses = [len(x) * loss_fn(model(x), target) for x, target in batches]
    return torch.stack(losses).sum() / sum(len(x) for x, _ in batches)


def inserted(make: Make, solution: cg.Solution, name: str, width: int) -> dict[str, Tensor]:
    model, loss_fn = make()
    record = cg.insert(model, cg.Solution(**{**vars(solution), "decision": cg.Decision((name,))}))
    layer = model.get_submodule(record.insertions[0].after).get_submodule("inserted")
    names = list(solution.multipliers[name])
    loss = mean_loss(model, loss_fn, width)
    assert loss.item() == pytest.approx(solution.loss, rel=1e-12)
    grads = torch.autograd.grad(loss, [layer.get_parameter(n) for n in names])
    return {name: -grad for name, grad in zip(names, grads, strict=True)}


def plain(output: Any, target: tuple[Tensor, Tensor]) -> Tensor:
    return mse_loss(output, target[1])


# --- other readers of the tensor ------------------------------------------------------------------


def kept_by_a_hook() -> Any:
    model, kept = net(), {}
    model[1].register_forward_hook(lambda module, args, output: kept.update(h=output))
    return model, lambda o, t: plain(o, t) + 5 * kept["h"].square().mean()


def replaced_by_a_hook() -> Any:
    model, kept = net(), {}

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept["h"] = output
        return output.cos()

    model[1].register_forward_hook(hook)
    return model, lambda o, t: plain(o, t) + 5 * kept["h"].square().mean()


class Keeping(nn.Linear):
    """Keeps what it returns, and returns a second tensor computed from it."""

    def forward(self, input: Tensor) -> Any:
        self.skip = super().forward(input).tanh()
        return self.skip, {"also": [2 * self.skip]}


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.out = Keeping(3, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.encoder(x)
        return self.out(torch.cat([first, *rest["also"], self.encoder.skip.sin()], 1))


class InPlace(nn.Module):
    """A skip connection reads what an activation in place has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.into, self.act, self.out = nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out(self.act(h).sin() + h)


class States(nn.Module):
    """Returns its hidden states too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
            x = x.tanh()
        return x, states


def side_channel() -> Any:
    model, balance = net(), []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        balance.append(output.softmax(-1).mean(0).square().sum())

    def loss(output: Tensor, target: Any) -> Tensor:
        extra = balance[-1]  # insert has run the model without the loss
        return plain(output, target) + 6 * extra

    model[2].register_forward_hook(hook)
    return model, loss


def run_again() -> Any:
    model = net()
    return model, lambda o, t: plain(o, t) + mse_loss(model(t[0] + 0.3), o)


def own_target() -> Any:
    model = net()
    return model, lambda o, t: plain(o, t) + mse_loss(o, torch.no_grad()(model)(t[0] + 0.3))


def of_states(output: Any, target: Any) -> Tensor:
    return plain(output[0], target) + output[1][1].sin().mean() + output[1][0].square().mean()


CLOSED: dict[str, tuple[Make, str]] = {
    "a hook keeps the tensor": (kept_by_a_hook, "1"),
    "a hook keeps it and replaces it": (replaced_by_a_hook, "1"),
    "an attribute and a second output": (lambda: (Reading(), plain), "encoder"),
    "an activation in place": (lambda: (InPlace(), plain), "act"),
    "hidden states in the loss": (lambda: (States(), of_states), "layers.1"),
    "a list that the loss reads": (side_channel, "1"),
    "a loss that runs the model again": (run_again, "1"),
    "a target of the model's own": (own_target, "1"),
}


@pytest.mark.parametrize("kind", CLOSED)
def test_in_closed_form(kind: str) -> None:
    make, after = CLOSED[kind]
    assert_inserted(make, after, cg.Method.CLOSED_FORM)


def test_a_tensor_changed_in_place_and_read_elsewhere_is_refused() -> None:
    """The layer would have an output of its own, and the hook would no longer see the change."""
    model, kept = InPlace(), {}
    model.into.register_forward_hook(lambda module, args, output: kept.update(h=output))
    batches, one = data(), cg.Candidate("into", residual())
    with nothing_left_behind(model), refused(cg.CandidateError, "into", "in place"):
        cg.GrowthProblem(model, lambda o, t: plain(o, t) + kept["h"].mean(), batches, [one])


@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_full_backward_pre_hook_is_refused(factor: float | None) -> None:
    """It changes the gradient that leaves the layer, not that of the layer's own parameters."""
    model = net()
    model[1].register_full_backward_pre_hook(
        lambda module, grads: None if factor is None else (factor * grads[0],)
    )
    batches, one = data(), cg.Candidate("1", residual())
    with nothing_left_behind(model), refused(cg.CandidateError, '"1"', "backward pre-hook"):
        cg.GrowthProblem(model, plain, batches, [one])


def test_other_backward_hooks_do_not_matter() -> None:
    def doubling(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: 2 * grad)

    def make() -> Any:
        model = net()
        model[1].register_full_backward_hook(lambda module, into, out: (3 * into[0],))
        model[1].register_forward_hook(doubling)
        return model, plain

    assert_inserted(make, "1", cg.Method.CLOSED_FORM)


class Halved(nn.Module):
    """Halves the gradient between its two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.5 * gradient)
        return self.other(hidden)


def test_a_hook_on_the_tensor_after_the_site() -> None:
    """PyTorch passes it over where the gradient of that tensor is asked for with others."""
    assert_inserted(lambda: (Halved(), plain), "one", cg.Method.CLOSED_FORM)


# --- derivatives ----------------------------------------------------------------------------------


class Potential(nn.Module):
    """An energy and its force, which is a derivative taken in forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        position = position.detach().requires_grad_()
        energy = self.net(position)
        (slope,) = torch.autograd.grad(energy.sum(), position, create_graph=True)
        return energy, -slope


class Derivative(Potential):
    """The force alone."""

    def forward(self, position: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(position)[1]


class Physics(nn.Sequential):
    """Keeps the input and a hidden tensor that a loss differentiates by."""

    def __init__(self) -> None:
        super().__init__(*net())

    def forward(self, input: Tensor) -> Tensor:
        self.x = input.detach().requires_grad_()
        self.hidden = self[0](self.x)
        y = self.hidden
        for layer in list(self)[1:]:
            y = layer(y)
        return y


def slope(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of, create_graph=True)[0]


def penalising(of: Callable[[Physics, Tensor], Tensor]) -> Make:
    def make() -> Any:
        model = Physics()
        return model, lambda o, t: plain(o, t) + of(model, o).square().mean()

    return make


def hessian_vector(model: Physics, output: Tensor) -> Tensor:
    return slope(slope(output.square().sum(), model.x).tanh().sum(), model.x)


def through_func(of: Callable[[nn.Module, Tensor], Tensor]) -> Make:
    def make() -> Any:
        model = net()
        return model, lambda o, t: plain(o, t) + of(model, t[0]).square().mean()

    return make


IN_GRAPH: dict[str, tuple[Make, str, int]] = {
    "du/dx in the loss": (penalising(lambda m, o: slope(o.sum(), m.x)), "1", 2),
    "a penalty on a hidden tensor": (
        penalising(lambda m, o: slope(o.square().sum(), m.hidden)),
        "1",
        2,
    ),
    "a Hessian-vector product": (penalising(hessian_vector), "1", 2),
    "the slope by a weight": (
        penalising(lambda m, o: slope(o.sum(), m.get_parameter("0.weight"))),
        "1",
        2,
    ),
    "forces": (lambda: (Potential(), lambda o, t: plain(o[1], t) + o[0].sin().mean()), "net.1", 3),
    "a derivative alone": (lambda: (Derivative(), plain), "net.1", 3),
    "the first layer of a derivative alone": (lambda: (Derivative(), plain), "net.0", 3),
    "torch.func.grad": (
        through_func(lambda m, x: torch.func.grad(lambda x: m(x).sum())(x)),
        "1",
        2,
    ),
    "torch.func.jvp": (
        through_func(lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1]),
        "1",
        2,
    ),
    "vmap of jacrev": (through_func(lambda m, x: torch.func.vmap(torch.func.jacrev(m))(x)), "1", 2),
    "vmap of a Hessian": (
        through_func(lambda m, x: torch.func.vmap(torch.func.hessian(lambda x: m(x).sum()))(x)),
        "1",
        2,
    ),
    "torch.autograd.functional.jacobian": (
        through_func(
            lambda m, x: torch.autograd.functional.jacobian(
                lambda x: m(x).sum(0), x, create_graph=True
            )
        ),
        "1",
        2,
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("kind", IN_GRAPH)
def test_in_the_graph(kind: str) -> None:
    make, after, width = IN_GRAPH[kind]
    assert_inserted(make, after, cg.Method.IN_GRAPH, width)


def test_forces_that_the_loss_does_not_see() -> None:
    """The model differentiates itself, so it cannot run without gradients; δ is the loss's own."""

    def make() -> Any:
        return Potential(), lambda o, t: mse_loss(o[0][:, 0], t[1][:, 0])

    problem = assert_inserted(make, "net.1", cg.Method.CLOSED_FORM)
    solution = cg.solve(problem)
    with cg.monitor(problem) as monitor:
        for x, target in problem.data:
            problem.loss_fn(problem.model(x), target).backward()
    for name, multiplier in monitor.multipliers().items():
        for key, value in multiplier.items():
            torch.testing.assert_close(value, solution.multipliers[name][key])
    step = {"outer.weight": torch.randn(4, 3)}
    along = (solution.multipliers["ResidualMLP"]["outer.weight"] * step["outer.weight"]).sum()
    found = cg.directional_derivative(problem, "ResidualMLP", step)
    assert found == pytest.approx(-along.item(), rel=1e-10)


def test_a_module_that_runs_inside_vmap_alone_is_refused() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(self.net)(x)

    model, batches, one = Mapped(), data(), cg.Candidate("net.1", residual())
    with nothing_left_behind(model), refused(cg.CandidateError, "net.1", "torch.func"):
        cg.GrowthProblem(model, plain, batches, [one])


# --- what follows from the method -----------------------------------------------------------------


def physics() -> cg.GrowthProblem:
    make, after, width = IN_GRAPH["du/dx in the loss"]
    model, loss_fn = make()
    return cg.GrowthProblem(model, loss_fn, data(width), [cg.Candidate(after, residual())])


def test_the_method_is_a_sentence() -> None:
    problem = physics()
    solution = cg.solve(problem)
    assert "derivatives of the model's output" in solution.method.value
    ordinary = cg.GrowthProblem(net(), plain, data(), [cg.Candidate("1", residual())])
    assert "agrees with autograd" in cg.solve(ordinary).method.value
    assert cg.solve(ordinary).method is ordinary.method is cg.Method.CLOSED_FORM


def test_several_candidates_at_a_site_and_dropout_see_the_same_random_numbers() -> None:
    """Each is measured in a pass of its own, and λ of each is what it is alone."""

    def make() -> Any:
        model = Physics()
        model[3] = nn.Sequential(nn.Tanh(), nn.Dropout(0.4))
        return model, lambda o, t: plain(o, t) + slope(o.sum(), model.x).square().mean()

    model, loss_fn = make()
    pair = [cg.Candidate("1", residual(), name="a"), cg.Candidate("1", Gain(4), name="b")]
    torch.manual_seed(7)
    together = cg.solve(cg.GrowthProblem(model, loss_fn, data(), pair))
    assert together.method is cg.Method.IN_GRAPH
    for one in pair:
        torch.manual_seed(7)
        alone = cg.solve(cg.GrowthProblem(model, loss_fn, data(), [one]))
        assert alone.loss == together.loss
        for key, value in alone.multipliers[one.name].items():
            torch.testing.assert_close(together.multipliers[one.name][key], value)


def test_monitor_and_directional_derivative_refuse_in_words() -> None:
    problem = physics()
    with (
        nothing_left_behind(problem.model),
        refused(cg.DataError, "derivatives of the output", "cg.solve"),
        cg.monitor(problem),
    ):
        pass
    with refused(cg.CandidateError, "derivatives of the output", "⟨λ, step⟩"):
        cg.directional_derivative(problem, "1", {"outer.weight": torch.ones(4, 3)})


@pytest.mark.parametrize("norm", [None, cg.norms.KroneckerFisher()], ids=str)
def test_norms_of_second_moments_have_them_in_the_graph_too(norm: Any) -> None:
    problem = physics()
    for sensitivity in cg.solve(problem, norm=norm).sensitivities.values():
        assert math.isfinite(sensitivity.value)
        assert sensitivity.value > 0


@pytest.mark.parametrize(
    ("kind", "curvature"),
    [
        ("du/dx in the loss", cg.curvature.hessian),
        ("vmap of jacrev", cg.curvature.hessian),
        ("forces", cg.curvature.hessian),
        ("forces", cg.curvature.gauss_newton),
    ],
)
def test_a_trust_region_works_with_derivatives(kind: str, curvature: Any) -> None:
    """The decrease it reports is that of the layer really inserted at its step."""
    make, after, width = IN_GRAPH[kind]
    model, loss_fn = make()
    problem = cg.GrowthProblem(model, loss_fn, data(width), [cg.Candidate(after, residual())])
    solution = cg.solve(problem, cg.TrustRegion(0.3, curvature=curvature))
    assert solution.decision.chosen == (after,)
    cg.insert(model, solution)
    assert solution.loss - mean_loss(model, loss_fn, width).item() > 1e-4


def test_gauss_newton_is_refused_where_the_loss_differentiates_the_outputs() -> None:
    rule = cg.TrustRegion(0.3, curvature=cg.curvature.gauss_newton)
    with refused(cg.RuleError, "gauss_newton", "function of the model's outputs", "hessian"):
        cg.solve(physics(), rule)


def test_the_curvature_of_a_loss_with_derivatives() -> None:
    """Against second differences of the loss with the layer standing at its step."""
    problem = physics()
    solution = cg.solve(problem)
    loss = cg.curvature.VirtualLoss(problem, solution.candidates["1"])
    step, small = torch.randn(loss.size), 1e-4
    differences = (loss(small * step) - 2 * loss(loss.zero()) + loss(-small * step)) / small**2
    assert float(loss.hessian_product(step) @ step) == pytest.approx(differences, rel=1e-4)
    torch.testing.assert_close(
        -loss.gradient(), solution.multipliers["1"]["outer.weight"].flatten()
    )


def test_an_identity_layer_inside_vmap() -> None:
    """It is tried on every batch, which vmap does not let it be."""

    def make() -> Any:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        return (
            model,
            lambda o, t: (
                plain(o, t) + torch.func.vmap(torch.func.jacrev(model))(t[0]).square().mean()
            ),
        )

    model, loss_fn = make()
    one = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
    solution = cg.solve(cg.GrowthProblem(model, loss_fn, data(), [one]))
    assert solution.method is cg.Method.IN_GRAPH
    expected = inserted(make, solution, "1", 2)
    for key, value in expected.items():
        torch.testing.assert_close(solution.multipliers["1"][key], value)


def test_plain_models_have_a_closed_form() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    batch = (torch.randn(6, 3), torch.randint(3, (6,)))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, [batch], [cg.Candidate("1", residual())])
    assert problem.method is cg.Method.CLOSED_FORM
