"""Whether SGD stays stable once a layer is inserted: dense matrices, SciPy and real steps."""

import functools
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import classified, feedforward, nothing_left_behind, refused, splice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import constrained_growth as cg
from constrained_growth.curvature import hessian
from constrained_growth.rules import Stable, rule_for

ENOUGH = 80
"""Products that give the exact eigenvalue of the networks here."""

SGD = functools.partial(torch.optim.SGD, lr=0.3)


def candidates() -> list[cg.Candidate]:
    torch.manual_seed(3)
    return [
        cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()), name="identity"),
        cg.Candidate("1", cg.blocks.ResidualMLP(4, 3, torch.tanh), name="residual"),
    ]


def problem_of(model: nn.Module, data: Iterable[Any]) -> cg.GrowthProblem:
    return cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates())


def used(optimizer: Any, problem: cg.GrowthProblem, **options: Any) -> dict[str, float]:
    rule = Stable(optimizer, max_products=options.pop("max_products", ENOUGH), **options)
    return dict(cg.solve(problem, rule=rule).decision.evidence["stability"])


def gauss_newton(model: nn.Module, data: list[Any], names: Sequence[str]) -> Tensor:
    """JᵀHJ/N of the cross-entropy in some parameters, from the jacobians of single samples."""
    x = torch.cat([input for input, _ in data])
    values = {name: p.detach() for name, p in model.named_parameters()}

    def output(moving: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values | moving, (one[None],))[0]

    by_name = vmap(jacrev(output), (None, 0))({name: values[name] for name in names}, x)
    jacobian = torch.cat([by_name[name].flatten(2) for name in names], 2)
    p = model(x).detach().softmax(1)
    bent = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nap,nab,nbq->pq", jacobian, bent, jacobian) / len(x)


def of_grown(model: nn.Module, data: list[Any], one: cg.Candidate) -> Tensor:
    """The matrix of a copy in which the layer really stands: first its old parameters, then v."""
    grown = splice(model, one.after, one.block)
    old = [
        name.replace("1.", "1.0.", 1) if name.startswith("1.") else name for name in names(model)
    ]
    pins = [f"{one.after}.1.{pin}" for pin in cg.blocks.pinned_parameters(one.block)]
    return gauss_newton(grown, data, [*old, *pins])


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


@pytest.fixture
def model() -> nn.Sequential:
    return feedforward(2, 4, 3)


@pytest.fixture
def data() -> list[Any]:
    return classified(31, batch=10)


@pytest.mark.parametrize("which", [0, 1], ids=["identity", "residual"])
def test_it_is_that_of_the_network_with_the_layer(
    model: nn.Module, data: list[Any], which: int
) -> None:
    one = candidates()[which]
    optimizer = SGD(model.parameters(), momentum=0.8)
    with nothing_left_behind(model):
        found = used(optimizer, problem_of(model, data))
    assert not optimizer.state
    matrix = of_grown(model, data, one)
    assert found[one.name] == pytest.approx(0.3 * largest(matrix) / (2 * 1.8), rel=1e-9)
    assert found[one.name] > 0.3 * largest(gauss_newton(model, data, names(model))) / (2 * 1.8)


def test_groups_of_different_rates_weight_decay_dampening(
    model: nn.Module, data: list[Any]
) -> None:
    first, last = ([*linear.parameters()] for linear in linears(model))
    optimizer = torch.optim.SGD(
        [{"params": first, "lr": 0.1}, {"params": last, "lr": 0.5, "weight_decay": 0.7}],
        lr=1.0,
        momentum=0.6,
        dampening=0.2,
    )
    one = candidates()[0]
    count = [sum(p.numel() for p in some) for some in (first, last)]
    pins = 4 * 4 + 4  # with the larger rate, and its weight decay
    rates = torch.tensor([0.1] * count[0] + [0.5] * (count[1] + pins)) * 0.8
    decays = torch.tensor([0.0] * count[0] + [0.7] * (count[1] + pins))
    steps = rates.diag() @ (of_grown(model, data, one) + decays.diag())
    expected = float(torch.linalg.eigvals(steps).real.max()) / (2 * 1.6)
    assert used(optimizer, problem_of(model, data))["identity"] == pytest.approx(expected, rel=1e-9)


def test_parameters_that_stay_do_not_count(model: nn.Module, data: list[Any]) -> None:
    matrix, problem = of_grown(model, data, candidates()[0]), problem_of(model, data)
    kept = torch.ones(len(matrix), dtype=torch.bool)
    kept[: 2 * 4 + 4] = False
    expected = 0.3 * largest(matrix[kept][:, kept]) / 2
    left_alone = SGD([*linears(model)[1].parameters()])
    assert used(left_alone, problem)["identity"] == pytest.approx(expected, rel=1e-9)
    linears(model)[0].requires_grad_(False)
    frozen = used(SGD(model.parameters()), problem_of(model, data))
    assert frozen["identity"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.3, False), (0.5, 0.3, False), (0.9, 0.0, False), (0.9, 0.0, True)],
)
def test_real_steps_shrink_below_the_limit_and_grow_above_it(
    momentum: float, dampening: float, nesterov: bool
) -> None:
    rate = 0.1 / (1 - dampening * (momentum > 0))
    model = feedforward(2, 4, 3)

    def sgd(parameters: Any, curvature: float) -> torch.optim.SGD:
        """Steps on a quadratic, a quarter of whose curvature is weight decay."""
        return torch.optim.SGD(
            parameters,
            rate,
            momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=curvature / 4,
        )

    def part(curvature: float) -> float:
        """Which part of the limit is used, if that is the curvature of the loss everywhere."""
        return used(
            sgd(model.parameters(), curvature),
            problem_of(model, classified(10)),
            curvature=lambda loss, vector: 0.75 * curvature * vector,
        )["identity"]

    def after(share: float) -> float:
        curvature = share / part(1.0)
        assert part(curvature) == pytest.approx(share)
        w = nn.Parameter(torch.ones(1))
        optimizer = sgd([w], curvature)
        for _ in range(3000):
            w.grad = 0.75 * curvature * w.detach()
            optimizer.step()
        return abs(w.item())

    assert after(0.99) < 1e-6
    assert not after(1.01) < 1e6


def ordered(num: int) -> list[Any]:
    """Batches of ten samples that grow from the first to the last."""
    ((x, y),) = classified(num)
    x = x * torch.linspace(0.1, 2, num)[:, None]
    return list(zip(x.split(10), y.split(10), strict=True))


class Stream:
    """Batches in a fixed order, without a length, all in the same memory."""

    def __init__(self, data: list[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        x, y = torch.empty_like(self._data[0][0]), torch.empty_like(self._data[0][1])
        for input, target in self._data:
            yield x.copy_(input), y.copy_(target)


def loader(data: list[Any], **options: Any) -> DataLoader[Any]:
    samples = TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
    if options.pop("nested", False):
        drawn = RandomSampler(samples, generator=torch.Generator())
        return DataLoader(samples, sampler=BatchSampler(drawn, 10, False), batch_size=None)
    return DataLoader(samples, batch_size=10, **options)


READ = {
    "list": lambda data: data,
    "stream": Stream,
    "shuffled": functools.partial(loader, shuffle=True),
    "generator of its own": functools.partial(loader, shuffle=True, generator=torch.Generator()),
    "nested samplers": functools.partial(loader, nested=True),
}


@pytest.mark.parametrize("kind", READ)
def test_some_samples_are_enough_in_whatever_order_they_come(model: nn.Module, kind: str) -> None:
    data, optimizer, read = ordered(300), SGD(model.parameters()), 0

    def counted(module: nn.Module, args: Any) -> None:
        nonlocal read
        read += len(args[0])

    problem = problem_of(model, READ[kind](data))
    generators = [
        generator
        for holder in (problem.data, getattr(problem.data, "sampler", None))
        for inner in (holder, getattr(holder, "sampler", None))
        if isinstance(generator := getattr(inner, "generator", None), torch.Generator)
    ]
    assert bool(generators) == (kind in ("generator of its own", "nested samplers"))
    solution = cg.solve(problem)
    with nothing_left_behind(model, *generators):
        handle = model.register_forward_pre_hook(counted)
        decision = Stable(optimizer).decide(problem, solution)
        handle.remove()
    assert read == 2 * (1 + 3) * 100
    assert decision.evidence["passes"] == pytest.approx(2 * (1 + 3 * 3) * 100 / 300)
    whole = used(optimizer, problem, max_samples=None, max_products=3)
    assert decision.evidence["stability"] == pytest.approx(whole, rel=0.25)


def test_every_product_is_of_the_same_batches(model: nn.Module) -> None:
    data = ordered(1000)

    class Shuffled:
        def __iter__(self) -> Iterator[Any]:
            return iter(random.sample(data, len(data)))

    problem = problem_of(model, Shuffled())
    solution, drawn = cg.solve(problem), list[Tensor]()

    def noted(module: nn.Module, args: Any) -> None:
        if not any(torch.equal(args[0], x) for x in drawn):
            drawn.append(args[0].clone())

    handle = model.register_forward_pre_hook(noted)
    rule = Stable(SGD(model.parameters()), max_products=ENOUGH, max_samples=30)
    found = rule.decide(problem, solution).evidence["stability"]
    handle.remove()
    assert len(drawn) == 3
    some = [pair for pair in data if any(torch.equal(pair[0], x) for x in drawn)]
    for one in candidates():
        expected = 0.15 * largest(of_grown(model, some, one))
        assert found[one.name] == pytest.approx(expected, rel=1e-9)


def test_batches_without_weight_are_not_drawn(model: nn.Module) -> None:
    data = [
        (x, torch.full_like(y, -100)) if i % 20 else (x, y)
        for i, (x, y) in enumerate(ordered(1000))
    ]
    problem = cg.GrowthProblem(
        model, nn.CrossEntropyLoss(), data, candidates(), weight=lambda i, t: (t != -100).sum()
    )
    found = used(SGD(model.parameters()), problem, max_samples=500, max_products=3)
    assert found == used(SGD(model.parameters()), problem, max_samples=None, max_products=3)


def test_refused_is_what_would_diverge(model: nn.Module, data: list[Any]) -> None:
    problem = problem_of(model, data)
    part = used(SGD(model.parameters()), problem)
    between = 0.3 / math.sqrt(part["identity"] * part["residual"])
    tamer = min(part, key=lambda name: part[name])
    rule = Stable(SGD(model.parameters(), lr=between), factor=1.0, max_products=ENOUGH)
    decision = cg.solve(problem, rule=rule).decision
    assert decision.chosen == (tamer,)
    assert decision.reason == "1 of 2 use at most 1 of the stability limit"
    few = cg.solve(problem, rule=Stable(SGD)).decision
    assert few.evidence["passes"] == 2 * (1 + 3 * 3)
    chained = cg.rules.then(cg.TopK(1), Stable(SGD(model.parameters(), lr=1e4)))
    assert cg.solve(problem, rule=chained).decision.chosen == ()
    loose = Stable(SGD(model.parameters(), lr=between), factor=1e6)
    assert cg.solve(problem, rule=loose).decision.chosen == ("identity", "residual")


def test_of_an_optimizer_its_settings_for_the_model_count(
    model: nn.Module, data: list[Any]
) -> None:
    few = functools.partial(used, problem=problem_of(model, data), max_products=3)
    optimizer = SGD(model.parameters())
    before = few(optimizer)
    assert few(SGD) == before
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)  # the settings are the current
    assert few(optimizer) == {n: pytest.approx(p / 2) for n, p in before.items()}
    others = {"params": [nn.Parameter(torch.ones(1))], "lr": 50.0, "momentum": 0.5}
    assert few(torch.optim.SGD([{"params": model.parameters()}, others], lr=0.3)) == before
    with torch.inference_mode():
        assert few(SGD) == before


def test_a_few_products_are_never_too_much_and_nearly_enough(
    model: nn.Module, data: list[Any]
) -> None:
    problem, optimizer = problem_of(model, data), SGD(model.parameters())
    exact = used(optimizer, problem)
    parts = [used(optimizer, problem, max_products=n) for n in (1, 2, 4, 6)]
    for fewer, more in zip(parts, [*parts[1:], exact], strict=True):
        assert all(fewer[name] <= more[name] * (1 + 1e-9) for name in exact)
    assert all(parts[-1][name] > 0.97 * exact[name] for name in exact)


def test_without_a_slope_it_begins_somewhere(data: list[Any]) -> None:
    model = feedforward(2, 4, 3)
    last = linears(model)[1]
    nn.init.zeros_(last.weight)
    balanced = [(x, torch.full((len(x), 3), 1 / 3)) for x, _ in data]
    problem = problem_of(model, balanced)
    nn.init.zeros_(last.bias)
    assert float(cg.solve(problem).stationarity or 0.0) < 1e-12
    expected = 0.3 * largest(of_grown(model, data, candidates()[0])) / 2
    assert used(SGD, problem)["identity"] == pytest.approx(expected, rel=1e-9)


def test_what_is_not_finite_is_refused(model: nn.Module, data: list[Any]) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:  # finite, with an infinite bend
        return output.abs().pow(1.5).mean()

    for parameter in linears(model)[1].parameters():
        nn.init.zeros_(parameter)
    problem = cg.GrowthProblem(model, loss_fn, data, candidates())
    decision = cg.solve(problem, rule=Stable(SGD)).decision
    assert decision.chosen == ()
    assert set(decision.evidence["stability"].values()) == {None}


@settings(max_examples=12)
@given(st.integers(0, 3), st.integers(1, 30), st.integers(0, 2**31 - 1))
def test_the_eigenvalue_is_scipys(frozen: int, rank: int, seed: int) -> None:
    """With a matrix of any rank for the curvature, in more or fewer parameters."""
    model = feedforward(2, 4, 3)
    for parameter in [*model.parameters()][:frozen]:
        parameter.requires_grad_(False)
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), classified(5), candidates()[:1])
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) + 4 * 4 + 4
    factor = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, rank)))
    matrix = factor @ factor.mT
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def found(max_products: int) -> float:
        options = {"max_products": max_products, "curvature": lambda loss, v: matrix @ v}
        return used(optimizer, problem, **options)["identity"]  # the limit of 2, over a rate of 2

    exact = found(size)
    assert exact == pytest.approx(largest(matrix), rel=1e-9)
    theirs = scipy.sparse.linalg.eigsh(matrix.numpy(), k=1, which="LA", return_eigenvectors=False)
    assert exact == pytest.approx(theirs[0], rel=1e-9)
    parts = [found(number) for number in (1, 2, 5)]
    assert all(few <= more * (1 + 1e-12) for few, more in itertools.pairwise([*parts, exact]))


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.Adam, ("optimizer=Adam", "torch.optim.SGD")),
        (
            functools.partial(torch.optim.SGD, lr=0.1, maximize=True),
            ("torch.optim.SGD", "minimise"),
        ),
        (
            lambda some: torch.optim.SGD(
                [{"params": some[:1], "momentum": 0.5}, {"params": some[1:]}], lr=0.1
            ),
            ("groups", "(0.0, False), (0.5, False)", "one momentum"),
        ),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=1.0), ("(1.0, False)", "below 1")),
        (SGD([nn.Parameter(torch.ones(1))]), ("no parameters of the model",)),
    ],
)
def test_optimizers_without_a_known_limit(
    model: nn.Module, data: list[Any], optimizer: Any, words: tuple[str, ...]
) -> None:
    problem = problem_of(model, data)
    with nothing_left_behind(model), refused(cg.RuleError, *words):
        cg.solve(problem, rule=Stable(optimizer))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "SGD"},
        {"factor": 0.0},
        {"factor": math.inf},
        {"factor": math.nan},
        {"max_products": 0},
        {"max_products": 1.5},
        {"max_products": True},
        {"max_samples": 0},
        {"max_samples": 0.25},
        {"factor": "1"},
        {"curvature": "hessian"},
    ],
)
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    with refused(cg.RuleError, f"{next(iter(options))}="):
        Stable(**{"optimizer": SGD, **options})


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop"])
def test_the_rule_for_an_optimizer_is_the_best_candidate_if_its_steps_stay_stable(
    model: nn.Module, kind: str
) -> None:
    problem = problem_of(model, classified(400, batch=10))
    norm = cg.norms.KroneckerFisher()
    best = cg.solve(problem, cg.TopK(1), norm=norm).decision.chosen
    for lr, chosen in ((1e-3, best), (1e3, () if kind == "SGD" else best)):
        rule = rule_for(getattr(torch.optim, kind)(model.parameters(), lr=lr))
        decision = cg.solve(problem, rule, norm=norm).decision
        assert decision.chosen == chosen
        assert decision.evidence.get("passes", 0.0) == (2.5 if kind == "SGD" else 0.0)


def test_a_rule_for_what_makes_an_optimizer(model: nn.Module, data: list[Any]) -> None:
    problem = problem_of(model, data)
    rules = [rule_for(SGD), rule_for(SGD(model.parameters()))]
    found = [cg.solve(problem, rule).decision for rule in rules]
    assert found[0].evidence == found[1].evidence != {}
    assert rule_for(torch.optim.AdamW) == cg.TopK(1)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_the_rule_for_an_optimizer_with_a_step(model: nn.Module, kind: str) -> None:
    """With Adam the layer starts where the loss is lower; with SGD the flag changes nothing."""
    problem = problem_of(model, classified(400, batch=10))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    found = cg.solve(problem, rule_for(optimizer, step=True)).decision
    plain = cg.solve(problem, rule_for(optimizer)).decision
    assert found.chosen == plain.chosen != ()
    if kind == "SGD":
        assert found == plain
        return
    region = cg.rules.then(cg.Fixed(found.chosen[0]), cg.TrustRegion(max_products=10))
    step = cg.solve(problem, region).decision
    assert found.evidence["actual"] == step.evidence["actual"] > 0
    (values,), (expected,) = found.values.values(), step.values.values()
    torch.testing.assert_close(dict(values), dict(expected), rtol=0, atol=0)
    assert 1 < found.evidence["passes"] <= 18


class Wrapper(torch.optim.Optimizer):
    """An unknown optimizer around another one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize(
    "optimizer",
    [
        "SGD",
        torch.optim.LBFGS([nn.Parameter(torch.ones(1))]),
        torch.optim.ASGD([nn.Parameter(torch.ones(1))]),
        Wrapper(SGD([nn.Parameter(torch.ones(1))])),
    ],
    ids=["str", "LBFGS", "ASGD", "Wrapper"],
)
def test_optimizers_without_a_known_rule(optimizer: Any) -> None:
    with refused(cg.RuleError, "optimizer=", "torch.optim.SGD"):
        rule_for(optimizer)


def test_what_the_rules_of_a_chain_remember_is_saved() -> None:
    rule: Any = cg.rules.then(cg.TopK(1), cg.TrustRegion(radius=0.5), Stable(SGD))
    assert rule.state_dict() == {"1": {"radius": 0.5}}
    other: Any = cg.rules.then(cg.TopK(1), cg.TrustRegion(), Stable(SGD))
    other.load_state_dict({"1": {"radius": 0.25}})
    assert other.rules[1].current_radius == 0.25
    with refused(cg.RuleError, "state_dict=", "['1']"):
        other.load_state_dict({"0": {"radius": 0.25}})


def test_a_loss_that_is_linear_in_the_outputs(data: list[Any]) -> None:
    torch.manual_seed(1)
    plain = feedforward(2, 4, 3)
    model = nn.Sequential(*plain, nn.LogSoftmax(1))
    problem = cg.GrowthProblem(model, nn.NLLLoss(), data, candidates())
    with nothing_left_behind(model), refused(cg.RuleError, "NLLLoss", "curvature=cg.curvature"):
        cg.solve(problem, Stable(SGD))
    found = used(SGD, problem, curvature=hessian, max_products=5)
    bent = used(SGD, problem_of(plain, data), curvature=hessian, max_products=5)
    assert found == {name: pytest.approx(part, rel=1e-9) for name, part in bent.items()}


def test_a_site_within_what_is_checkpointed(model: nn.Module, data: list[Any]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.net, x, use_reentrant=False)

    one = cg.Candidate("net.1", cg.blocks.IdentityLinear(4, nn.ReLU()), name="identity")
    problem = cg.GrowthProblem(Checkpointed(), nn.CrossEntropyLoss(), data, [one])
    expected = used(SGD, problem_of(model, data), max_products=3)["identity"]
    found = used(SGD, problem, max_products=3)["identity"]
    assert found == pytest.approx(expected, rel=1e-9)
    plain = cg.solve(cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates()[:1]))
    decision = cg.solve(problem, cg.TrustRegion()).decision
    assert decision.evidence["predicted"] > 0
    assert cg.solve(problem).sensitivities["identity"].value == pytest.approx(
        plain.sensitivities["identity"].value, rel=1e-12
    )


def test_a_frozen_model(model: nn.Module, data: list[Any]) -> None:
    model.requires_grad_(False)
    matrix = of_grown(model, data, candidates()[0])[-20:, -20:]
    assert used(SGD, problem_of(model, data))["identity"] == pytest.approx(
        0.3 * largest(matrix) / 2, rel=1e-9
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_growing_by_the_rule_for_what_makes_the_optimizer(data: list[Any], kind: Any) -> None:
    model, factory = feedforward(2, 4, 3), functools.partial(kind, lr=0.02)
    history = cg.grow(
        model,
        factory,
        nn.CrossEntropyLoss(),
        data,
        epochs=3,
        rule=rule_for(factory),
        solver=functools.partial(cg.solve, norm=cg.norms.KroneckerFisher()),
        when=cg.rules.Plateau(patience=1, tolerance=0.9),
        max_insertions=2,
        progress=False,
    )
    (inserted,) = history.insertions
    assert ("stability" in inserted.evidence) == (kind is torch.optim.SGD)
    assert inserted.layers == 3
