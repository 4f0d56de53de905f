"""What a problem refuses, with a clear error and the model left as it was; and what it lists."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    autograd_multipliers,
    candidate,
    choose,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors, IdentityLinear, ResidualLinear, ResidualMLP

NAN, INF = float("nan"), float("inf")


@contextmanager
def refuses(model: nn.Module, error: type[cg.GrowthError], *words: str) -> Iterator[None]:
    """The error comes, and the model is as it was."""
    with nothing_left_behind(model), refused(error, *words):
        yield


def used(model: nn.Module) -> nn.Module:
    """As in the middle of training: with gradients, mixed modes, a frozen parameter, a hook."""
    for index, (parameter, module) in enumerate(
        zip(model.parameters(), list(model.modules())[1:], strict=False)
    ):
        parameter.grad = None if index % 2 else torch.randn_like(parameter)
        module.train(index % 2 == 0)
    first = next(iter(model.parameters()), None)
    if first is not None:
        first.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return model


# --- candidates and sites ---------------------------------------------------------------------


class Awkward(nn.Module):
    """Sites of every kind that cannot be served."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.unused, self.aside = nn.Linear(4, 4), nn.Linear(2, 4)
        self.pair = Returns(lambda x: (x, x))
        self.named = Returns(lambda x: {"x": x})
        self.nothing = Returns(lambda x: None)
        self.nowhere = Returns(lambda x: {"x": [None, x.long()]})
        self.whole = Returns(lambda x: x.round().long())
        self.detached = Returns(lambda x: x.detach())
        self.recurrent = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        y = self.again(self.inner(x))
        z = (
            self.pair(y)[0]
            + self.named(y)["x"]
            + self.whole(y)
            + self.recurrent(y[:, None])[0][:, 0]
        )
        self.nothing(y)
        self.nowhere(y)
        self.detached(z)
        return self.last(z)


class Returns(nn.Module):
    """What a function of the input returns."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("7", ['after="7"', "no submodule of Awkward", "inner"]),
        ("inner.weight", ['after="inner.weight"', "no submodule"]),
        ("", ['after=""', "no submodule"]),
        ("unused", ['after="unused"', "never reached", "choose another"]),
        ("nothing", ['after="nothing"', "NoneType", "floating-point"]),
        ("nowhere", ['after="nowhere"', "dict without a floating-point tensor", "output="]),
        ("whole", ['after="whole"', "torch.int64", "floating-point"]),
        ("aside", ['after="aside"', "loss does not depend"]),
        ("detached", ['after="detached"', "loss does not depend"]),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_sites_that_cannot_be_served(after: str, words: list[str], frozen: bool) -> None:
    model = used(Awkward())
    if frozen:
        model.requires_grad_(False)
    data, block = classified(5), Gain(4)
    with refuses(model, cg.CandidateError, *words):
        candidates = [cg.Candidate(site, block) for site in ("inner", after)]
        cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], ["candidates is empty", "find_candidates"]),
        ([candidate(), candidate()], ['the name "1" occurs twice', "name=..."]),
        (
            [candidate(name="a"), candidate("0", block=Gain(4), name="a")],
            ['the name "a" occurs twice'],
        ),
        (candidate(), ["single Candidate", "[candidate]"]),
        (["1"], ["candidates='1'", "no Candidate", "cg.Candidate"]),
        ("1", ["candidates='1'", "not a sequence"]),
        (None, ["candidates=None", "not a sequence"]),
        ({"1": candidate()}, ["not a sequence"]),
    ],
)
def test_lists_of_candidates_that_make_no_sense(candidates: object, words: list[str]) -> None:
    model, data = used(feedforward(2, 4, 3)), classified(5)
    with refuses(model, cg.CandidateError, *words):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)  # type: ignore[arg-type]


def test_candidates_that_are_none() -> None:
    with refused(cg.CandidateError, "after=3 is no str", "name of a submodule"):
        cg.Candidate(3, Gain(4))  # type: ignore[arg-type]
    with refused(cg.BlockError, "is no Module; give an instance", "IdentityLinear(64"):
        cg.Candidate("1", IdentityLinear)  # type: ignore[arg-type]


# --- blocks -----------------------------------------------------------------------------------


class Halves(nn.Module):
    pinned = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :2] + self.weight


class Unhooked(nn.Module):
    """A pin that the output does not depend on."""

    pinned = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Product(nn.Module):
    """x (1 + u v) with both factors zero."""

    pinned = ("u", "v")

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.u * self.v)


class LowRank(nn.Module):
    """x (1 + a b) with b at zero, and a closed form of something else."""

    pinned = ("b",)

    def __init__(self, name: str, *, swapped: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 4))
        self.name, self.swapped = name, swapped

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.a @ self.b

    def factors(self, x: Tensor, delta: Tensor) -> Iterator[AffineFactors]:
        psi, phi = x @ self.a, delta
        psi, phi = (phi, psi) if self.swapped else (psi, phi)
        yield AffineFactors(self.name, None, psi, phi)


def off_its_pins() -> nn.Module:
    block = Gain(4)
    nn.init.constant_(block.gain, 1e-3)
    return block


@pytest.mark.parametrize(
    ("after", "block", "words"),
    [
        ("1", IdentityLinear(5, nn.ReLU()), ["(12, 4)", "width", "IdentityLinear", '"c"']),
        ("1", ResidualMLP(3, 4, nn.ReLU()), ["(12, 4)", "width", "ResidualMLP"]),
        ("1", Gain(3), ["(12, 4)", "width", "Gain"]),
        ("1", Halves(), ["(12, 4)", "(12, 2)", "width must match"]),
        ("1", nn.Linear(4, 4), ["pinned", "Linear"]),
        ("0", IdentityLinear(4, nn.ReLU()), ["not the identity", '"c"', "ResidualMLP"]),
        ("1", off_its_pins(), ["not the identity at its pins", "Gain"]),
        ("1", Unhooked(), ["vanish identically", "Unhooked"]),
        ("1", Product(), ["vanish identically", "both factors"]),
        ("1", LowRank("b", swapped=True), ["factors", "(4, 2)", "(2, 4)", '"c"']),
        ("1", LowRank("a", swapped=False), ["factors", "'a'", "'b'"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_blocks_that_do_not_fit_their_site(after: str, block: nn.Module, words: list[str]) -> None:
    model, data = used(feedforward(2, 4, 3)), classified(12)
    block = block.double()
    with nothing_left_behind(block), refuses(model, cg.BlockError, *words):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate(after, block, name="c")])


def test_block_moved_to_another_dtype_is_a_copy() -> None:
    block = IdentityLinear(4, nn.ReLU(), dtype=torch.float32)
    solution = solved(feedforward(2, 4, 3), classified(10), cg.Candidate("1", block))
    assert solution.multipliers["1"]["weight"].dtype == torch.float64
    assert solution.candidates["1"].block is not block
    assert block.weight.dtype == torch.float32


# --- data and loss ----------------------------------------------------------------------------


def generated() -> Iterator[Any]:
    yield from classified(10)


class Once:
    """Looks like data, but its iterator is used up after the first pass."""

    def __init__(self) -> None:
        self.batches = iter(classified(10))

    def __iter__(self) -> Iterator[Any]:
        return self.batches


X, Y = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (list, ["no batches"]),
        (generated, ["one-shot", "list(data)"]),
        (lambda: iter([(X, Y)]), ["one-shot"]),
        (lambda: zip([X], [Y], strict=True), ["one-shot"]),
        (lambda: X, ["Tensor", "not an iterable of batches"]),
        (lambda: {"x": X}, ["dict"]),
        (lambda: "data", ["str"]),
        (lambda: 3, ["int", "not iterable"]),
        (lambda: [X], ["batch 0", "Tensor", "(input, target) pair"]),
        (lambda: [(X, Y, Y)], ["batch 0", "(input, target) pair"]),
        (lambda: [(X, Y), X], ["batch 1", "(input, target) pair"]),
        (lambda: [(X, Y), (X[:0], Y[:0])], ["no samples"]),
        (Once, ["iterated more than once"]),
    ],
)
def test_data_that_cannot_be_used(data: Callable[[], Any], words: list[str]) -> None:
    model, given = used(feedforward(2, 4, 3)), data()
    with refuses(model, cg.DataError, *words):
        cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, given, [candidate()]))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_numbers_in_the_data_that_are_not_finite(bad: float, index: int) -> None:
    model, data = used(feedforward(2, 4, 3)), classified(12, batch=5)
    data[index][0][0, 0] = bad
    with refuses(model, cg.DataError, "NaN or Inf"):
        solved(model, data, candidate())


@pytest.mark.parametrize("bad", [NAN, INF])
def test_parameters_that_are_not_finite(bad: float) -> None:
    model, data = used(feedforward(2, 4, 3)), classified(12)
    nn.init.constant_(model.get_parameter("2.bias"), bad)
    with refuses(model, cg.DataError, "NaN or Inf", "parameters"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])


def from_second_batch_on(value: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """The cross-entropy on batches of five, something else on the last one, of two."""
    return lambda output, target: (
        CROSS_ENTROPY(output, target) if len(target) == 5 else value(output)
    )


LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[cg.GrowthError], list[str]]] = {
    "no scalar": (lambda o: o.sum(1), cg.DataError, ["loss_fn", "shape", 'reduction="mean"']),
    "one element": (lambda o: o.sum().reshape(1), cg.DataError, ["loss_fn", "(1,)"]),
    "number": (lambda o: 1.0, cg.DataError, ["loss_fn", "float", "scalar tensor"]),
    "none": (lambda o: None, cg.DataError, ["loss_fn", "NoneType"]),
    "constant": (lambda o: torch.ones(()), cg.DataError, ["loss_fn", "depend"]),
    "detached": (lambda o: o.detach().mean(), cg.DataError, ["loss_fn", "depend"]),
    "nan": (lambda o: o.mean() * NAN, cg.DataError, ["NaN or Inf"]),
    "inf": (lambda o: o.mean() + INF, cg.DataError, ["NaN or Inf"]),
    "gradient nan": (lambda o: ((o - o.detach()) ** 2).sum().sqrt(), cg.DataError, ["NaN or Inf"]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the last batch"])
def test_losses_that_cannot_be_used(name: str, late: bool) -> None:
    value, error, words = LOSSES[name]
    loss_fn = from_second_batch_on(value) if late else lambda output, target: value(output)
    model, data = used(feedforward(2, 4, 3)), classified(12, batch=5)
    with refuses(model, error, *words):
        solved(model, data, candidate(), loss_fn=loss_fn)


def test_answer_that_is_not_finite_can_be_had_as_a_status() -> None:
    data = classified(12, batch=5)
    data[1][0][0, 0] = NAN
    solution = solved(feedforward(2, 4, 3), data, candidate(), throw=False)
    assert solution.status is cg.Status.NOT_FINITE
    assert solution.decision.chosen == ()


def test_arguments_of_the_wrong_kind() -> None:
    with refused(cg.GrowthError, "model='x'", "nn.Module"):
        cg.GrowthProblem("x", CROSS_ENTROPY, classified(5), [candidate()])  # type: ignore[arg-type]
    with refused(cg.GrowthError, "loss_fn='x'", "nn.CrossEntropyLoss()"):
        cg.GrowthProblem(feedforward(2, 4, 3), "x", classified(5), [candidate()])  # type: ignore[arg-type]


class Lazy(nn.Module):
    pinned = ("outer.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.LazyLinear(5), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning", "ignore::UserWarning")
def test_what_is_no_number_or_not_ready() -> None:
    model, data = feedforward(2, 4, 3), classified(8)
    one = candidate("1")

    def problem(loss_fn: Any = nn.functional.cross_entropy, **options: Any) -> cg.GrowthProblem:
        return cg.GrowthProblem(options.pop("model", model), loss_fn, data, [one], **options)

    with refused(cg.DataError, "complex", ".real"):
        problem(lambda output, target: nn.functional.cross_entropy(output, target) * (1 + 0j))
    weights: list[Any] = [lambda x, y: None, lambda x, y: y != -100, lambda x, y: "some"]
    for weight in weights:
        with refused(cg.DataError, "weight=", "over how many items"):
            problem(weight=weight)
    with refused(cg.BlockError, "Lazy", "not initialised"):
        cg.Candidate("1", Lazy())
    with refused(cg.CandidateError, 'after="1"', "torch.jit.script"):
        problem(model=torch.jit.script(model))


def test_a_loss_of_one_argument() -> None:
    with refused(cg.DataError, "loss_fn=<function", "called as loss_fn(output, target)"):
        solved(feedforward(2, 4, 3), classified(5), candidate(), loss_fn=lambda y: y.sum())

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        solved(feedforward(2, 4, 3), classified(5), candidate(), loss_fn=broken)


def test_a_loss_that_does_not_depend_on_the_model() -> None:
    model, data = used(feedforward(2, 4, 3)), classified(12, batch=5)
    other = torch.ones((), requires_grad=True)
    with refuses(model, cg.CandidateError, "does not depend"):
        solved(model, data, candidate(), loss_fn=lambda output, target: other * 2)


@pytest.mark.parametrize("own", [False, True], ids=["closed form", "own block"])
def test_batches_that_reach_a_site_more_often_or_not_at_all(own: bool) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.site, self.last = nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range({5: 1, 3: 0, 2: 2}[len(x)]):
                x = self.site(x)
            return self.last(x)

    model = Sometimes()
    one = candidate("site", block=Gain(4)) if own else candidate("site")
    data = [classified(size)[0] for size in (5, 3, 2, 5)]
    solution = solved(model, data, one)
    assert_multipliers(solution, "site", autograd_multipliers(model, data, one))
    assert solution.sensitivities["site"].variance > 0


def test_no_inputs_with_samples() -> None:
    model = used(nn.Sequential(Returns(lambda x: x * torch.ones(6, 2)), *feedforward(2, 4, 3)))
    data = [(torch.tensor(1.0), "target")]
    with refuses(model, cg.DataError, "data", "no tensor with a batch dimension"):
        solved(model, data, candidate("2"), loss_fn=lambda output, target: output.mean())


@pytest.mark.parametrize("rule", [choose("3"), choose("1", "3")])
def test_rule_that_returns_an_unknown_candidate(rule: Any) -> None:
    model, data = used(feedforward(2, 4, 3)), classified(12)
    with refuses(model, cg.RuleError, "'3'", "the candidates are ('1',)"):
        solved(model, data, candidate(), rule=rule)


# --- what is fine -------------------------------------------------------------------------------


def test_frozen_model_is_fine() -> None:
    model, data = feedforward(2, 4, 3), classified(12, batch=5)
    free = solved(model, data, candidate())
    frozen = solved(model.requires_grad_(False), data, candidate())
    for name, value in free.multipliers["1"].items():
        assert torch.equal(frozen.multipliers["1"][name], value)
    assert frozen.stationarity == 0.0
    assert not any(p.requires_grad for p in model.parameters())


def test_model_without_parameters_is_fine() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Softmax(-1))
    x = torch.randn(5, 4)
    one = cg.Candidate("0", ResidualLinear(4, torch.tanh))
    solution = solved(model, [(x, x.argmax(1))], one)
    assert solution.sensitivities["0"].value > 0
    assert solution.sensitivities["0"].baseline is None


def test_constraints_list_the_pins_in_order() -> None:
    candidates = [
        candidate(),
        cg.Candidate("1", ResidualMLP(4, 2, torch.tanh, "inner"), name="more"),
        cg.Candidate("0", Gain(4)),
    ]
    model, data = feedforward(2, 4, 3), classified(12)
    one = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    assert one.constraints == (
        cg.Constraint("1", "weight", (4, 4)),
        cg.Constraint("1", "bias", (4,)),
        cg.Constraint("more", "inner.weight", (2, 4)),
        cg.Constraint("more", "inner.bias", (2,)),
        cg.Constraint("0", "gain", (4,)),
        cg.Constraint("0", "scale", ()),
    )
    assert one.candidates == tuple(candidates)
    assert (one.model, one.data) == (model, data)
    solution = cg.solve(one)
    for pin in one.constraints:
        assert solution.dual_value(pin) is solution.multipliers[pin.candidate][pin.parameter]
        assert solution.dual_value(pin).shape == pin.shape
    with refused(cg.CandidateError, "constraint=", "problem.constraints"):
        solution.dual_value(cg.Constraint("1", "scale", ()))


def test_candidates_of_one_site_may_have_names_of_their_own() -> None:
    solution = solved(
        feedforward(2, 4, 3), classified(12), candidate(), candidate(name="twin"), rule=cg.TopK(2)
    )
    assert solution.decision.chosen == ("1", "twin")
    assert torch.equal(solution.multipliers["1"]["bias"], solution.multipliers["twin"]["bias"])


# --- models as they are ---------------------------------------------------------------------------


class Fourier(nn.Module):
    """A layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=4)


@pytest.mark.parametrize("norm", [cg.norms.Frobenius(), cg.norms.Entrywise1(), cg.norms.Nuclear()])
def test_complex_parameters(norm: Any) -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(12, batch=5)
    model.insert(1, Fourier())
    one = candidate("2", block=ResidualMLP(4, 3, torch.tanh))
    solution = solved(model, data, one, norm=norm)
    assert_multipliers(solution, "2", autograd_multipliers(model, data, one), atol=1e-12)
    grads = torch.autograd.grad(mean_loss(model, data), list(model.parameters()))
    size = sum(float(grad.abs().square().sum()) for grad in grads) ** 0.5
    assert solution.stationarity == pytest.approx(size, rel=1e-12)
    optimizer = torch.optim.Adam(model.parameters())
    cg.insert(model, solution, optimizer=optimizer)
    mean_loss(model, data).backward()
    optimizer.step()


def test_models_without_values_are_refused() -> None:
    with torch.device("meta"):
        meta = feedforward(2, 4, 3)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))
    for model, words in ((meta, ["meta", '"0.weight"']), (lazy, ["not initialised", "lazy"])):
        with refused(cg.CandidateError, *words):
            cg.GrowthProblem(model, CROSS_ENTROPY, classified(5), [candidate()])
        with refused(cg.CandidateError, *words):
            cg.find_candidates(model, classified(5)[0][0])


def image_model() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


def test_batch_norm_in_eval_mode_that_has_seen_nothing() -> None:
    data = [(torch.randn(6, 1, 4, 4), torch.randint(3, (6,)))]
    block = cg.blocks.ResidualConv2d(4, nn.ReLU())
    cells = [cg.Candidate("1", block), cg.Candidate("1", Gain(4), name="other")]
    with pytest.warns(UserWarning, match=r"\['1'\].*eval mode.*running statistics"):
        cg.GrowthProblem(image_model().eval(), CROSS_ENTROPY, data, cells[:1])
    cg.GrowthProblem(image_model(), CROSS_ENTROPY, data, cells[:1])
    block(torch.randn(6, 4, 4, 4))
    cg.GrowthProblem(image_model().eval(), CROSS_ENTROPY, data, cells[:1])
    own = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), *list(image_model())[1:])
    with pytest.warns(UserWarning, match=r"^model, \['1'\].*eval mode.*running statistics"):
        cg.GrowthProblem(own.eval(), CROSS_ENTROPY, data, [cg.Candidate("2", Gain(4))])
    own.train()(data[0][0])
    cg.GrowthProblem(own.eval(), CROSS_ENTROPY, data, [cg.Candidate("2", Gain(4))])


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.LSTM])
def test_data_of_another_precision_than_the_model(kind: Any) -> None:
    first = kind(2, 2, 1) if kind is nn.Conv1d else kind(2, 2)
    model, x = nn.Sequential(first, nn.Identity()), torch.randn(5, 2, 2, dtype=torch.float32)
    words = "data", "example_input", "torch.float32", "torch.float64"
    with refused(cg.GrowthError, *words):
        cg.find_candidates(model, x)
    with refused(cg.GrowthError, *words):
        cg.GrowthProblem(model, lambda y, _: y.mean(), [(x, None)], [candidate("0", 2)])


class BecomesNaN(nn.Module):
    """The identity where the input is positive, and NaN elsewhere."""

    pinned = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + 0 * (x.sum() + 1e-3).log()


def test_nan_is_no_identity() -> None:
    model, data = feedforward(2, 4, 3), classified(12, batch=4)
    with refused(cg.BlockError, "not the identity"):
        with torch.no_grad():
            model.get_parameter("0.bias").fill_(-100)
        model[1] = nn.Identity()
        solved(model, data, candidate(block=BecomesNaN()))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(100)
    data[2] = (data[2][0] - 1e6, data[2][1])
    with refused(cg.BlockError, "not on a later one"):
        solved(model, data, candidate(block=BecomesNaN()), throw=False)


def test_a_layer_without_which_alone_the_model_can_be_differentiated() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.LeakyReLU(0.2, inplace=True)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.site, x.detach(), use_reentrant=False)

    model = nn.Sequential(nn.Linear(2, 4), Changing(), nn.Linear(4, 3))
    with refused(cg.CandidateError, "cannot be differentiated", "in place"):
        solved(model, classified(5), candidate("1.site", block=ResidualMLP(4, 3, torch.tanh)))
