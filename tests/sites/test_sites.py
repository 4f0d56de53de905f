"""Sites anywhere: λ is autograd's on a model in which the block really stands, wherever that is."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    assert_same,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
    state_of,
)
from standing import assert_served, hooked_multipliers, inserted_multipliers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import constrained_growth as cg
from constrained_growth.curvature import VirtualLoss
from constrained_growth.verification import kkt_residuals

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "closed form": lambda: cg.blocks.ResidualMLP(4, 3, torch.tanh),
    "two pins": lambda: cg.blocks.ResidualLinear(4, torch.tanh),
    "of one's own": lambda: Gain(4),
}
each_block = pytest.mark.parametrize("kind", BLOCKS)


# --- compiled models ------------------------------------------------------------------------------


def compiled(way: str, backend: str = "eager") -> nn.Module:
    """`feedforward(2, 4, 4, 3)`, compiled in one of the ways there are."""
    model = feedforward(2, 4, 4, 3, activation=nn.Tanh)
    if way == "wrapped":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    if way == "in place":
        model.compile(backend=backend)
    elif way == "a part":
        model[1] = torch.compile(model[1], backend=backend)  # type: ignore[assignment]
    elif way == "a part in place":
        model[1].compile(backend=backend)
    else:
        model = Methodical(model, backend)
    return model


class Methodical(nn.Sequential):
    """What is compiled is a function inside."""

    def __init__(self, layers: nn.Sequential, backend: str) -> None:
        super().__init__(*layers)
        self.run = torch.compile(self.through, backend=backend)

    def through(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)


WAYS = ("wrapped", "in place", "a part", "a part in place", "a method")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiling(test: Any) -> Any:
    """A test that compiles, in the course of which the compiler warns of its own doings."""
    warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    return pytest.mark.usefixtures("_fresh_compiler")(warns(test))


@compiling
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_measured_as_it_is_written(way: str, backend: str) -> None:
    model, data = compiled(way, backend), classified(20, batch=10)
    plain = feedforward(2, 4, 4, 3, activation=nn.Tanh)
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    model(data[0][0])  # so that it is compiled without hooks
    candidates = [cg.Candidate(after, Gain(4)) for after in "13"]
    found = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(found, one.name, hooked_multipliers(plain, data, one))
    before = model(data[0][0])
    cg.insert(model, found)
    torch.testing.assert_close(model(data[0][0]), before)
    with torch.no_grad():
        model.get_parameter(inserted_key(model)).fill_(0.5)
    moved = model(data[0][0])
    assert float((moved - before).detach().abs().max()) > 1e-3
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(moved, model(data[0][0]))


def inserted_key(model: nn.Module) -> str:
    return next(name for name, _ in model.named_parameters() if name.endswith("inserted.gain"))


@compiling
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_monitored(way: str) -> None:
    model, data = compiled(way), classified(20, batch=10)
    model(data[0][0])
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("1", Gain(4))])
    with cg.monitor(problem) as monitor:
        for input, target in data:
            CROSS_ENTROPY(model(input), target).backward()
    for key, value in cg.solve(problem).multipliers["1"].items():
        torch.testing.assert_close(monitor.multipliers()["1"][key], value, rtol=0, atol=1e-12)


@compiling
@pytest.mark.parametrize("way", ["wrapped", "a part"])
def test_names_of_a_compiled_model(way: str) -> None:
    model, data = compiled(way), classified(10)
    plain = solved(model, data, cg.Candidate("1", Gain(4))).multipliers["1"]["gain"]
    spelt = {"wrapped": "_orig_mod.1", "a part": "1._orig_mod"}[way]
    found = solved(model, data, cg.Candidate(spelt, Gain(4)))
    assert torch.equal(found.multipliers[spelt]["gain"], plain)
    with refused(cg.CandidateError, 'after="_orig_mod"', "no submodule"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("_orig_mod", Gain(4))])


# --- gradient checkpointing -----------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Three layers, the middle two of which are checkpointed; a dropout draws in them."""

    def __init__(self, reentrant: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        layers: Any = feedforward(2, 4, 4, 4, 3, activation=nn.Tanh)
        self.first, self.last = layers[:2], layers[6:]
        self.inside = nn.Sequential(*layers[2:6])
        self.dropout, self.reentrant = nn.Dropout(dropout), reentrant
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.on:
            y: Any = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        else:
            y = self.middle(x)
        return self.last(y)

    def middle(self, x: Tensor) -> Tensor:
        return self.dropout(self.inside(x))


CHECKPOINTED = ("first.1", "inside.1", "inside.3", "inside", "dropout")


@each_block
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("width", [1, 2**10])  # (x, δ) wait for more, or are worked off at once
def test_checkpointed_layers_count_once(kind: str, frozen: bool, width: int) -> None:
    model, data = Checkpointed(), classified(20, batch=7)
    if width > 1:
        data = [(x.repeat(width, 1), y.repeat(width)) for x, y in data[:1]]
    model.requires_grad_(not frozen)
    candidates = [cg.Candidate(after, BLOCKS[kind]()) for after in CHECKPOINTED]
    with nothing_left_behind(model):
        found = solved(model, data, *candidates)
    model.on = False
    assert_same(found.sensitivities.keys(), {one.name: 0 for one in candidates}.keys())
    for one in candidates:
        assert_multipliers(found, one.name, hooked_multipliers(model, data, one))
    model.on = True
    assert_multipliers(found, "inside.1", inserted_multipliers(model, data, candidates[1]))


def test_checkpointed_draws_are_drawn_again() -> None:
    model, data = Checkpointed(dropout=0.5), classified(20)
    one = cg.Candidate("inside.1", Gain(4))
    torch.manual_seed(1)
    found = solved(model, data, one)
    model.on = False
    torch.manual_seed(1)
    assert_multipliers(found, "inside.1", solved(model, data, one).multipliers["inside.1"])


@pytest.mark.parametrize("where", ["first.1", "inside.1", "inside", "dropout"])
@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpoints_are_refused(where: str, frozen: bool) -> None:
    model, data = Checkpointed(reentrant=True), classified(5)
    model.inside.requires_grad_(not frozen)
    one = cg.Candidate(where, Gain(4))
    with nothing_left_behind(model), refused(cg.CandidateError, "use_reentrant=False"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])


def test_a_site_under_no_grad_is_refused() -> None:
    model, data = Checkpointed(), classified(5)
    model.first.forward = torch.no_grad()(model.first.forward)
    with refused(cg.CandidateError, 'after="first.1"', "torch.no_grad()"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("first.1", Gain(4))])


def test_a_monitor_of_checkpointed_layers_leaves_training_alone() -> None:
    model, data = Checkpointed(dropout=0.5), classified(20, batch=7)
    twin = copy.deepcopy(model)
    candidates = [cg.Candidate(after, Gain(4)) for after in CHECKPOINTED]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    torch.manual_seed(1)
    expected = cg.solve(problem).multipliers
    with cg.monitor(problem) as monitor:
        train(model, data)
    for name, multiplier in monitor.multipliers().items():
        for key, value in multiplier.items():
            torch.testing.assert_close(value, expected[name][key], rtol=0, atol=1e-12)
    torch.manual_seed(1)
    train(twin, data)
    assert_same(state_of(model)["grads"], state_of(twin)["grads"])


def train(model: nn.Module, data: list[Any]) -> None:
    for input, target in data:
        CROSS_ENTROPY(model(input), target).backward()


# --- modules that are used several times ----------------------------------------------------------


class Shared(nn.Module):
    """One layer and one activation, used again and again, under two names."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.into, self.step, self.out = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.activation, self.alias, self.times = nn.Tanh(), self.step, times

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.into(x))
        for _ in range(self.times):
            x = x + self.activation(self.step(x))
        return self.out(x)


@each_block
@pytest.mark.parametrize("site", ["step", "alias", "activation"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_shared_module_counts_at_each_of_its_uses(kind: str, site: str, frozen: bool) -> None:
    model, data = Shared().requires_grad_(not frozen), classified(20, batch=7)
    assert_served(model, data, cg.Candidate(site, BLOCKS[kind]()))


@each_block
def test_uses_are_summed_and_do_not_count_as_samples(kind: str) -> None:
    """The standard error is that of λ summed over the uses, sample by sample."""
    model, data = Shared(), classified(30, batch=1 if kind == "of one's own" else 10)
    one = cg.Candidate("step", BLOCKS[kind]())
    found = solved(model, data, one)
    single = [(x[None], y[None]) for xs, ys in data for x, y in zip(xs, ys, strict=True)]
    rows = [
        torch.cat([v.flatten() for v in hooked_multipliers(model, [pair], one).values()])
        for pair in single
    ]
    variance = torch.stack(rows).var(0).sum().item() / len(single)
    assert found.sensitivities["step"].variance == pytest.approx(variance, rel=1e-9)
    assert found.num_samples == len(single)


def test_shared_and_other_sites_go_together() -> None:
    model, data = Shared(), classified(20, batch=7)
    sites = ("into", "step", "activation")
    candidates = [cg.Candidate(site, cg.blocks.ResidualMLP(4, 3, torch.tanh)) for site in sites]
    found = solved(model, data, *candidates)
    for one in candidates:
        assert_multipliers(found, one.name, hooked_multipliers(model, data, one))


def test_a_shared_module_may_be_used_more_or_less_often_later() -> None:
    class Counting(Shared):
        def forward(self, x: Tensor) -> Tensor:
            self.times = len(x) // 2
            return super().forward(x)

    model, data = Counting(), [classified(size)[0] for size in (4, 7, 2)]
    assert_served(model, data, cg.Candidate("step", Gain(4)))


def test_a_use_of_no_consequence() -> None:
    class Aside(Shared):
        def forward(self, x: Tensor) -> Tensor:
            self.step(self.into(x))
            return super().forward(x)

    assert_served(Aside(), classified(20, batch=7), cg.Candidate("step", Gain(4)))


def test_a_block_that_fits_one_use_only_is_refused() -> None:
    activation = nn.Tanh()
    model = nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 5), activation, nn.Linear(5, 3))
    data = classified(6)
    with nothing_left_behind(model), refused(cg.BlockError, "the width there is 5"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1", block=Gain4)])


Gain4 = Gain(4)


def test_a_monitor_sums_over_the_uses() -> None:
    model, data = Shared(), classified(20, batch=7)
    candidates = [cg.Candidate("step", make(), name=kind) for kind, make in BLOCKS.items()]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    expected = cg.solve(problem)
    with cg.monitor(problem) as monitor:
        train(model, data)
        model(data[0][0])
        train(model, data)
    assert monitor.num_batches == 6
    for name, multiplier in monitor.multipliers().items():
        for key, value in multiplier.items():
            torch.testing.assert_close(value, expected.multipliers[name][key], rtol=0, atol=1e-12)
    with cg.monitor(problem) as monitor:
        train(model, data)
    for name, sensitivity in monitor.sensitivities().items():
        assert sensitivity.variance == pytest.approx(expected.sensitivities[name].variance)


def test_two_names_of_one_module_are_one_site() -> None:
    model, data = Shared(1), classified(20, batch=7)
    pair = [cg.Candidate(name, Gain(4)) for name in ("step", "alias")]
    found = solved(model, data, *pair)
    assert torch.equal(found.multipliers["step"]["gain"], found.multipliers["alias"]["gain"])
    assert_multipliers(found, "alias", hooked_multipliers(model, data, pair[1]))


def test_verification_follows_everywhere() -> None:
    model, data = Shared(), classified(20, batch=7)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("alias", Gain(4))])
    assert kkt_residuals(problem, cg.solve(problem)).dual < 1e-14


# --- tensors that are known elsewhere -------------------------------------------------------------


class Forked(nn.Module):
    """What comes out of a module that changes nothing is known under another name too."""

    def __init__(self, same: Any) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 4), nn.Linear(4, 3)
        self.same: Any = same

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out(h + self.same(h).sin())


class Stored(nn.Module):
    """Gives out what it was given before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.kept


@each_block
@pytest.mark.parametrize(
    "same", [nn.Identity(), nn.Dropout(0.5).eval(), nn.Sequential(), nn.Flatten(), nn.Tanh()]
)
def test_only_the_branch_through_the_site_counts(kind: str, same: nn.Module) -> None:
    model, data = Forked(same), classified(20, batch=7)
    assert_served(model, data, cg.Candidate("same", BLOCKS[kind]()))


def test_a_module_that_gives_out_a_tensor_made_before() -> None:
    class Skipping(Forked):
        def forward(self, x: Tensor) -> Tensor:
            self.same.kept = self.into(x)
            return self.out(self.same.kept + self.same(x).sin())

    model, data = Skipping(Stored()), classified(20, batch=7)
    one = cg.Candidate("same", Gain(4))
    found = solved(model, data, one)
    model.same.kept = None
    assert_multipliers(found, "same", hooked_multipliers(model, data, one))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    model.same.kept = None
    with cg.monitor(problem) as monitor:
        train(model, data)
    torch.testing.assert_close(monitor.multipliers()["same"], dict(found.multipliers["same"]))


class Offset(nn.Module):
    """Gives out its parameter, which is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_a_module_that_gives_out_a_parameter() -> None:
    class Positional(Forked):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.into(x) + self.same.value * self.same(x))

    model, data = Positional(Offset()), classified(10, batch=5)
    assert_served(model, data, cg.Candidate("same", Gain(4)))


# --- containers, memory formats, losses -----------------------------------------------------------


class Nested(nn.Module):
    """Sites in a ModuleDict in a ModuleList, and an activation in place after each."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 4), nn.Linear(4, 3)
        self.stages = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(4, 4), "act": nn.ReLU(inplace=True)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for stage in self.stages:
            x = stage["act"](stage["mix"](x))  # type: ignore[index]
        return self.out(x)


@each_block
@pytest.mark.parametrize("site", ["stages.0.mix", "stages.1.act", "stages.1.mix"])
def test_sites_in_dicts_in_lists(kind: str, site: str) -> None:
    def copied(output: Tensor, block: nn.Module, args: Any, kwargs: Any) -> Tensor:
        return block(output).clone()  # as the activation goes on in place

    assert_served(Nested(), classified(20, batch=7), cg.Candidate(site, BLOCKS[kind]()), copied)


class ChannelGain(nn.Module):
    """A block for images: a convolution on a branch, pinned at zero."""

    pinned = ("branch.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x.tanh())


@pytest.mark.parametrize("site", ["0", "1", "2"])
def test_channels_last(site: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = [
        (torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last), torch.randint(3, (5,)))
        for _ in range(2)
    ]
    one = cg.Candidate(site, ChannelGain())
    solution = assert_served(model, data, one, lambda o, b, a, k: b(o).clone())
    contiguous = [(x.contiguous(), y) for x, y in data]
    assert_multipliers(solution, site, solved(model, contiguous, one).multipliers[site])


IGNORED = -100


class Tagger(nn.Module):
    """A class for every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(tokens)).tanh())


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED)


def counted(input: object, target: Tensor) -> Tensor:
    return (target != IGNORED).sum()


def sequences(*shapes: tuple[int, int]) -> list[Any]:
    """Batches of (samples, positions) tokens, padded at random with what is to be ignored."""
    batches = []
    for shape in shapes:
        target = torch.randint(5, shape)
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1))
        target[torch.arange(shape[1]) >= lengths] = IGNORED
        batches.append((torch.randint(7, shape), target))
    return batches


def masked_error(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of the squares over what a mask leaves."""
    values, mask = target
    return ((output.mean(-1) - values).square() * mask).sum() / mask.sum()


@each_block
def test_losses_of_sequences(kind: str) -> None:
    one = cg.Candidate("mix", BLOCKS[kind]())
    assert_served(Tagger(), sequences((3, 6), (2, 6)), one, loss_fn=token_loss)
    masked = [
        (tokens, (torch.randn(tokens.shape), (target != IGNORED).double()))
        for tokens, target in sequences((3, 6), (2, 4))
    ]
    assert_served(Tagger(), masked, one, loss_fn=masked_error)


@each_block
def test_counted_tokens_however_they_are_batched(kind: str) -> None:
    """λ, the loss and ∇L over ragged batches are those of one big batch."""
    model, one = Tagger(), cg.Candidate("mix", BLOCKS[kind]())
    ragged = sequences((3, 6), (5, 6), (1, 6))
    ragged.insert(1, (torch.randint(7, (4, 6)), torch.full((4, 6), IGNORED)))
    whole = [tuple(torch.cat(each) for each in zip(*ragged, strict=True))]
    big = solved(model, whole, one, loss_fn=token_loss)
    problem = cg.GrowthProblem(model, token_loss, ragged, [one], weight=counted)
    found = cg.solve(problem)
    assert_multipliers(found, "mix", big.multipliers["mix"], atol=1e-14)
    assert found.loss == pytest.approx(big.loss, rel=1e-14)
    assert found.stationarity == pytest.approx(big.stationarity, rel=1e-12)
    assert found.num_samples == 9
    expected = inserted_multipliers(model, ragged, one, token_loss, counted)
    assert_multipliers(found, "mix", expected)
    unweighted = solved(model, [ragged[0], *ragged[2:]], one, loss_fn=token_loss)
    difference = unweighted.sensitivities["mix"].value - found.sensitivities["mix"].value
    assert abs(difference) > 1e-6
    assert kkt_residuals(problem, found).dual < 1e-14
    loss = VirtualLoss(problem, found.candidates["mix"])
    assert loss(loss.zero()) == pytest.approx(found.loss, rel=1e-14)


def test_weights_that_are_the_sizes_change_nothing() -> None:
    model, data = feedforward(2, 4, 3), classified(25, batch=10)
    ones = [candidate("1"), cg.Candidate("1", Gain(4), name="gain")]
    plain = solved(model, data, *ones, norm=cg.norms.Frobenius())
    for factor in (1, 3):
        problem = cg.GrowthProblem(
            model, CROSS_ENTROPY, data, ones, weight=lambda x, y, by=factor: by * len(x)
        )
        found = cg.solve(problem)
        assert found.loss == pytest.approx(plain.loss, rel=1e-14)
        for name in ("1", "gain"):
            assert_multipliers(found, name, plain.multipliers[name], atol=1e-15)
            assert found.sensitivities[name].variance == pytest.approx(
                plain.sensitivities[name].variance, rel=1e-9
            )


def test_moments_are_weighted_too() -> None:
    model, data = feedforward(2, 4, 3), classified(25, batch=10)
    norm = cg.norms.KroneckerFisher()
    plain = solved(model, data, candidate("1"), norm=norm)
    problem = cg.GrowthProblem(
        model, CROSS_ENTROPY, data, [candidate("1")], weight=lambda x, y: 2 * len(x)
    )
    found = cg.solve(problem, norm=norm)
    assert found.sensitivities["1"].value == pytest.approx(plain.sensitivities["1"].value)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (3, ["weight=3", "cannot be called", "None"]),
        (lambda x, y: -1, ["gives -1 ", "0 or more"]),
        (lambda x, y: torch.nan, ["gives nan"]),
        (lambda x, y: 0, ["no batches"]),
    ],
)
def test_weights_that_make_no_sense(weight: Any, words: list[str]) -> None:
    model, data = feedforward(2, 4, 3), classified(6)
    with refused(cg.DataError, *words):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1")], weight=weight)


def test_what_does_not_go_with_weights_says_so() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=2)
    problem = cg.GrowthProblem(
        model, CROSS_ENTROPY, data, [candidate("1")], weight=lambda x, y: len(x)
    )
    with refused(cg.DataError, "weight="), cg.monitor(problem):
        pass


# --- models in parts ------------------------------------------------------------------------------


@pytest.fixture
def _alone(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_a_sharded_model_is_measured_as_it_was() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, data = feedforward(2, 4, 3), classified(6)
    whole = solved(model, data, candidate("1")).multipliers["1"]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for name, found in solved(model, data, candidate("1")).multipliers["1"].items():
        torch.testing.assert_close(found, whole[name])


def test_the_chosen_site_of_a_shared_module_grows_everywhere() -> None:
    model, data = Shared(), classified(20, batch=7)
    one = cg.Candidate("alias", Gain(4))
    before = model(data[0][0])
    record = cg.insert(model, solved(model, data, one, rule=choose("alias")))
    assert torch.equal(model(data[0][0]), before)
    assert model.step is model.alias
    assert record.insertions[0].after == "step"
