"""Growing on two processes against one process with the same global batches.

Starting processes takes seconds, so one start serves all cases: a case is a function of a `Rank`.
What one process gives is calculated beforehand, without any group.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CROSS_ENTROPY, Gain, candidate, choose, classified, feedforward
from processes import shard, together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import constrained_growth as cg
from constrained_growth.training import LineSearch, evaluate

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

PROCESSES = 2
Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Rank:
    """One of the processes, a folder that all of them see, and what one process gives."""

    number: int
    folder: Path
    expected: Mapping[str, Any]


ALONE = Rank(0, Path(), {})


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """One group of parameters for a module inside, one for what is left."""
    shard(model[2], model)  # type: ignore[index]
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


def prefix(model: nn.Module) -> str:
    return "module." if isinstance(model, DistributedDataParallel) else ""


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole copies, under the names in the model as it is written."""
    named = model.named_parameters()
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in named}


def assert_close(found: Any, expected: Any) -> None:
    """To rounding, through dicts and lists; the names in the same order."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def split(rank: Rank, data: list[Any]) -> list[Any]:
    """This process's half of every global batch."""
    return [(x[rank.number :: PROCESSES], y[rank.number :: PROCESSES]) for x, y in data]


# --- the same training on one process and on several -------------------------------------------


ADAM = functools.partial(torch.optim.AdamW, lr=0.05)
ADAGRAD = functools.partial(torch.optim.Adagrad, lr=0.05)
SGD = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)


def made_by(factory: Any) -> str:
    """The name of the optimizer."""
    return factory.func.__name__


def train(
    rank: Rank, wrap: Wrap, factory: Callable[..., torch.optim.Optimizer], data: list[Any]
) -> dict[str, Any]:
    """Two insertions in a loop as users write it; the blocks are drawn on every process."""
    torch.manual_seed(1)
    model = wrap(feedforward(2, 5, 5, 3, activation=nn.Tanh))
    optimizer = factory(model.parameters())

    def proposed(model: nn.Module) -> list[cg.Candidate]:
        mlp = functools.partial(cg.blocks.ResidualMLP, 5, 4, nn.Tanh())
        sites = ["1", "2", "3"] if len(grower.record.insertions) == 0 else ["1", "3"]
        return [cg.Candidate(prefix(model) + site, mlp()) for site in sites]

    grower = cg.Grower(model, optimizer, CROSS_ENTROPY, data, candidates=proposed, max_insertions=2)
    torch.manual_seed(rank.number)
    kept = []
    for _ in range(3):
        for input, target in data:
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(model(input), target)
            loss.backward()
            optimizer.step()
            grower.step(loss)
        kept.append(weights(model))
        grower.maybe_grow()
    rounds = grower.history.rounds
    return {
        "weights": [*kept, weights(model)],
        "losses": grower.history.losses,
        "chosen": [name.removeprefix("module.") for one in rounds for name in one.chosen],
        "sensitivities": [list(one.sensitivities.values()) for one in rounds],
        "validation": evaluate(model, {"loss": CROSS_ENTROPY}, data),
    }


def global_batches() -> list[Any]:
    torch.manual_seed(0)
    return classified(48, batch=12)


def same_training(rank: Rank, wrap: Wrap, factory: Callable[..., torch.optim.Optimizer]) -> None:
    found = train(rank, wrap, factory, split(rank, global_batches()))
    expected = rank.expected[made_by(factory)]
    assert found["chosen"] == expected["chosen"]
    assert len(expected["chosen"]) == 2
    for one, other in zip(found["weights"], expected["weights"], strict=True):
        assert_close(one, other)
    assert_close(found["losses"], expected["losses"])
    assert_close(found["sensitivities"], expected["sensitivities"])
    assert_close(found["validation"], expected["validation"])


def ddp_trains_as_one_process(rank: Rank) -> None:
    same_training(rank, ddp, ADAM)


def fsdp_trains_as_one_process(rank: Rank) -> None:
    same_training(rank, fsdp, ADAGRAD)  # has a state before the first step


def line_search_is_refused(rank: Rank) -> None:
    for grower in growers(rank):
        with pytest.raises(cg.TrainingError, match="one process"):
            LineSearch()(grower)


# --- what one process measures and all do -----------------------------------------------------


def measured(model: nn.Module, data: list[Any], width: int, **options: Any) -> dict[str, Any]:
    """All numbers of a solution."""
    candidates = [
        candidate("1", width, block=cg.blocks.ResidualLinear(width, nn.Tanh())),
        candidate("2", width, block=Gain(width)),
        candidate("3", width, block=cg.blocks.ResidualLinear(width, nn.Tanh())),
    ]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates, **options)
    norm = cg.norms.Frobenius()  # others take seconds at a width of 400
    quick = cg.solve(problem, norm=norm, stationarity=False)
    found = cg.solve(problem, choose("3"), norm=norm)
    assert_close(quick.multipliers["1"], found.multipliers["1"])
    return {
        "loss": found.loss,
        "stationarity": found.stationarity,
        "counts": [found.num_samples, found.num_batches],
        "baseline": found.sensitivities["1"].baseline,
        "variances": [s.variance for s in found.sensitivities.values()],
        **{name: dict(multiplier) for name, multiplier in found.multipliers.items()},
    }


WIDTHS = 6, 400  # with 400 the gradients are large enough to be taken as backward delivers them


def wide(width: int) -> nn.Module:
    torch.manual_seed(2)
    return feedforward(2, width, width, 3, activation=nn.Tanh)


def weight(input: Tensor, target: Tensor) -> Any:
    return (target != 0).sum() if len(target) > 3 else 0


def ragged() -> list[Any]:
    torch.manual_seed(3)
    return classified(38, batch=7)


def fsdp_measures_as_one_process(rank: Rank) -> None:
    """Also where a process has fewer batches, or some that do not count."""
    for width, shares in zip(WIDTHS, ((5, 1), (3, 3)), strict=True):
        model = fsdp(wide(width))
        begin = rank.number * shares[0]
        part = ragged()[begin : begin + shares[rank.number]]
        found = measured(model, part, width)
        for key, value in rank.expected[f"measured {width}"].items():
            assert_close(found[key], value)
        assert all(is_sharded(p) and p.grad is None for p in model.parameters())
    found = measured(fsdp(wide(6)), ragged()[rank.number :: 2], 6, weight=weight)
    for key, value in rank.expected["weighted"].items():
        assert_close(found[key], value)


def fsdp_module_that_is_used_twice(rank: Rank) -> None:
    model = feedforward(2, 6, 6, 3, activation=nn.Tanh)
    model.load_state_dict(wide(6).state_dict())
    model[3] = model[1]
    problem = cg.GrowthProblem(
        fsdp(model), CROSS_ENTROPY, split(rank, global_batches()), [candidate("1", block=Gain(6))]
    )
    assert_close(dict(cg.solve(problem).multipliers["1"]), rank.expected["twice"])


def used_twice() -> dict[str, Tensor]:
    model = wide(6)
    model[3] = model[1]  # type: ignore[index,operator]
    problem = cg.GrowthProblem(
        model, CROSS_ENTROPY, global_batches(), [candidate("1", block=Gain(6))]
    )
    return dict(cg.solve(problem).multipliers["1"])


def candidates_found_in_a_sharded_model(rank: Rank) -> None:
    model, (input, _) = fsdp(wide(6)), split(rank, global_batches())[0]
    assert [c.after for c in cg.find_candidates(model, input)] == [
        c.after for c in cg.find_candidates(wide(6), input)
    ]
    assert all(is_sharded(p) for p in model.parameters())


def data_that_fail_on_one_process(rank: Rank) -> None:
    """After the first batch: the other process does not wait."""

    class Failing:
        def __iter__(self) -> Any:
            yield batches[0]
            fail_on(rank, 1, "data")
            yield batches[1]

    batches = split(rank, global_batches())
    problem = cg.GrowthProblem(
        fsdp(wide(4)), CROSS_ENTROPY, Failing(), [candidate("1", block=Gain(4))]
    )
    with raised_on(rank, 1, "data"):
        cg.solve(problem)


# --- decisions ----------------------------------------------------------------------------------


def sites_of(model: nn.Module) -> list[cg.Candidate]:
    return [candidate(prefix(model) + site) for site in ("1", "3")]


def growers(rank: Rank, **options: Any) -> list[cg.Grower]:
    """One for each way of wrapping, a step after the beginning."""
    found = []
    for wrap in (ddp, fsdp):
        torch.manual_seed(1)
        model = wrap(feedforward(2, 4, 4, 3))
        data = split(rank, global_batches())
        optimizer = ADAM(model.parameters())
        grower = cg.Grower(
            model,
            optimizer,
            CROSS_ENTROPY,
            data,
            **{"candidates": sites_of, **options},
        )
        loss = CROSS_ENTROPY(model(data[0][0]), data[0][1])
        loss.backward()
        optimizer.step()
        grower.step(loss)
        found.append(grower)
    return found


def the_first_decides(rank: Rank) -> None:
    """A schedule and a rule that answer differently everywhere."""

    def contrary(sensitivities: Mapping[str, cg.Sensitivity]) -> cg.Decision:
        name = list(sensitivities)[rank.number]
        return cg.Decision((name,), "", {name: {"bias": torch.full((4,), 0.1 + rank.number)}})

    for grower in growers(rank, rule=contrary, when=lambda losses: rank.number == 0):
        one = grower.maybe_grow()
        assert one is not None
        assert one.chosen == (prefix(grower.model) + "1",)
        bias = weights(grower.model)["1.inserted.bias"]
        assert_close(bias, torch.full((4,), 0.1))


def raised_on(rank: Rank, number: int, word: str) -> AbstractContextManager[Any]:
    error = OSError if rank.number == number else cg.GrowthError
    return pytest.raises(error, match=word)


def fail_on(rank: Rank, number: int, word: str, otherwise: Any = None) -> Any:
    if rank.number == number:
        raise OSError(word)
    return otherwise


def failures_on_one_process(rank: Rank) -> None:
    """Of the user's parts of a decision: the others do not wait, and nothing was changed."""

    class Broken(Gain):
        def forward(self, x: Tensor) -> Tensor:
            if breaks:
                fail_on(rank, 0, "block")
            return super().forward(x)

    def breaking(solution: cg.Solution) -> cg.rules.When:
        nonlocal breaks
        breaks = True
        return cg.rules.When.NOW

    def proposed(model: nn.Module) -> list[cg.Candidate]:
        return [candidate(prefix(model) + "2", block=Broken(4))]

    parts: list[tuple[str, dict[str, Any]]] = [
        ("rule", {"rule": lambda _: fail_on(rank, 1, "rule", cg.Decision())}),
        ("when", {"when": lambda _: fail_on(rank, 1, "when", True)}),
        ("confirm", {"confirm": lambda _: fail_on(rank, 0, "confirm", cg.rules.When.NOW)}),
        ("block", {"confirm": breaking, "candidates": proposed}),
        ("propose", {"candidates": lambda model: fail_on(rank, 1, "propose", sites_of(model))}),
        (
            "solver",
            {"solver": lambda problem, rule: fail_on(rank, 1, "solver") or cg.solve(problem)},
        ),
    ]
    for word, options in parts:
        for grower in growers(rank, **options):
            breaks, before = False, weights(grower.model)
            sharded = is_sharded(next(grower.model.parameters()))
            if sharded and word != "rule":
                continue  # where the model runs it has to end: it does not know where others wait
            groups = copy.copy(grower.optimizer.param_groups[0]["params"])
            error = cg.BlockError if word == "block" else None
            with (
                pytest.raises(error, match=word)
                if error
                else raised_on(rank, {"confirm": 0}.get(word, 1), word)
            ):
                grower.maybe_grow()
            assert_close(weights(grower.model), before)
            now = grower.optimizer.param_groups[0]["params"]
            assert [id(p) for p in now] == [id(p) for p in groups]
            assert not grower.record.insertions


def failure_after_an_insertion(rank: Rank) -> None:
    for grower in growers(rank, after_insertion=lambda *_: fail_on(rank, 1, "policy")):
        if is_sharded(next(grower.model.parameters())):
            continue
        with raised_on(rank, 1, "policy"):
            grower.maybe_grow()


# --- wrappers -----------------------------------------------------------------------------------


def wrapper_keeps_its_settings(rank: Rank) -> None:
    """The same object, hooks and all."""

    def reduction(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[reportPrivateImportUsage]
        state.append(1)
        future: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        future = future.get_future()
        return future.then(lambda done: done.value()[0] / PROCESSES)

    torch.manual_seed(1)
    model = DistributedDataParallel(
        feedforward(2, 4, 4, 3),
        bucket_cap_mb=1,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    reductions: list[int] = []
    model.register_comm_hook(reductions, reduction)
    outputs: list[Any] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.broadcast_buffers = False
    model.eval()
    data = split(rank, global_batches())
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("module.1")])
    with pytest.warns(UserWarning, match=r"cg\.rewrap"):
        cg.insert(model, cg.solve(problem))
    reductions.clear()
    cg.rewrap(model)
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    assert len(outputs) == 1
    assert reductions
    assert not model.training
    assert not model.broadcast_buffers
    assert model.find_unused_parameters
    assert model.gradient_as_bucket_view
    assert model.bucket_bytes_cap == 2**20
    grads = [p.grad for p in model.parameters()]
    assert len(grads) == 8
    mine = torch.cat([g.flatten() for g in grads if g is not None])
    others = [torch.empty_like(mine) for _ in range(PROCESSES)]
    dist.all_gather(others, mine)
    assert torch.equal(*others)


def a_wrapper_is_given_or_missed(rank: Rank) -> None:
    """The model given is what is inside of it; gradients of new layers are averaged if it is."""
    data = split(rank, global_batches())
    for told in (True, False):
        model = wide(6)
        wrapper = ddp(model) if told else None
        grower = cg.Grower(
            model,
            SGD(model.parameters()),
            CROSS_ENTROPY,
            data,
            candidates=[candidate("1", block=cg.blocks.ResidualMLP(6, 4, nn.Tanh()))],
            wrapper=wrapper,
        )
        with nullcontext() if told else pytest.warns(UserWarning, match="wrapper="):
            grower.ask()
        CROSS_ENTROPY((wrapper or model)(data[0][0]), data[0][1]).backward()
        grad = model.get_parameter("1.inserted.outer.weight").grad
        assert grad is not None
        others = [torch.empty_like(grad) for _ in range(PROCESSES)]
        dist.all_gather(others, grad)
        assert torch.equal(*others) == told


def wrappers_that_cannot_be_initialised_again(rank: Rank) -> None:
    model = ddp(feedforward(2, 4, 3))
    model.mixed_precision = object()  # type: ignore[assignment]
    with pytest.raises(cg.CandidateError, match="cannot be initialised again"):
        cg.rewrap(model)


def new_layers_are_sharded(rank: Rank) -> None:
    (_, grower) = growers(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = grower.maybe_grow()
    assert one is not None
    named = dict(grower.model.named_parameters())
    assert len(named) == 8
    assert all(is_sharded(p) for p in named.values())
    trained = {id(p) for group in grower.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in named.values()}
    assert set(one.new_parameters) <= named.keys()
    assert len(one.new_parameters) == 2


# --- what is refused ----------------------------------------------------------------------------


def sharded(**options: Any) -> nn.Module:
    model = feedforward(2, 4, 3)
    shard(model, **options)
    return model


def sharded_in_other_ways(rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    data = split(rank, global_batches())

    def problem(model: nn.Module, after: str = "1") -> None:
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate(after)])

    mesh = init_device_mesh("cpu", (PROCESSES,))
    parallel = parallelize_module(feedforward(2, 4, 3), mesh, {"0": ColwiseParallel()})
    with pytest.raises(cg.CandidateError, match="tensor parallelism"):
        problem(parallel)
    hybrid = init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(cg.CandidateError, match="one dimension"):
        problem(sharded(mesh=hybrid))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(feedforward(2, 4, 3), device_id=torch.device("cpu"))
    with pytest.raises(cg.CandidateError, match="one flat tensor"):
        problem(flat)


def what_sharded_models_cannot(rank: Rank) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    data = split(rank, global_batches())
    model = fsdp(feedforward(2, 4, 4, 3))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1")])
    with pytest.raises(cg.RuleError, match="sharded"):
        cg.solve(problem, rule=cg.TrustRegion())
    with pytest.raises(cg.DataError, match="no batches"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data[: rank.number], [candidate("1")])
    reduced = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    with pytest.raises(cg.CandidateError, match="MixedPrecisionPolicy"):
        cg.GrowthProblem(reduced, CROSS_ENTROPY, data, [candidate("1")])
    block = cg.blocks.ResidualLinear(4, nn.Tanh())
    shard(block)
    copied = cg.Candidate("1", block)
    with pytest.raises(cg.CandidateError, match="sharded parameters of its own"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [copied])


# --- checkpoints --------------------------------------------------------------------------------


class StoppedError(Exception):
    """The end of a run, as far as the run can tell."""


def run(rank: Rank, wrap: Wrap, path: Path | None, steps: int = 1000) -> nn.Module:
    """Dropout draws other numbers on every process; the data come in a random order."""
    left = steps

    def stop(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StoppedError

    def factory(parameters: Any) -> torch.optim.Optimizer:
        optimizer = ADAM(parameters)
        optimizer.register_step_pre_hook(stop)
        return optimizer

    torch.manual_seed(1)
    model = feedforward(2, 5, 5, 3, activation=nn.Tanh)
    model[3] = nn.Sequential(nn.Tanh(), nn.Dropout(0.2))
    model = wrap(model)
    torch.manual_seed(10 + rank.number)
    data = split(rank, global_batches())
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    generator = torch.Generator().manual_seed(20 + rank.number)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=6, shuffle=True, generator=generator
    )
    cg.grow(
        model,
        factory,
        CROSS_ENTROPY,
        loader,
        epochs=4,
        candidates=lambda model: [
            candidate(prefix(model) + site, block=cg.blocks.ResidualMLP(5, 4, nn.Tanh()))
            for site in ("1", "2")
        ],
        max_insertions=2,
        checkpoint=path,
        checkpoint_every=3,
        progress=False,
    )
    return model


def resumed_runs(rank: Rank) -> None:
    """Bit for bit, and in a file that one process can read."""
    for wrap in (ddp, fsdp):
        expected = run(rank, wrap, None)
        path = rank.folder / f"{wrap.__name__}.safetensors"
        for _ in range(2):
            with pytest.raises(StoppedError):
                run(rank, wrap, path, steps=6)
        found = run(rank, wrap, path)
        for name, value in weights(expected).items():
            assert torch.equal(weights(found)[name], value)
        kept = cg.checkpoint.load(path)
        assert kept.num_processes == PROCESSES
        assert len(kept.record.insertions) == 2
        for name, value in kept.weights.items():
            assert torch.equal(value, weights(expected)[name.removeprefix("module.")])


CASES: list[Callable[[Rank], None]] = [
    ddp_trains_as_one_process,
    fsdp_trains_as_one_process,
    line_search_is_refused,
    fsdp_measures_as_one_process,
    fsdp_module_that_is_used_twice,
    candidates_found_in_a_sharded_model,
    data_that_fail_on_one_process,
    the_first_decides,
    failures_on_one_process,
    failure_after_an_insertion,
    wrapper_keeps_its_settings,
    a_wrapper_is_given_or_missed,
    wrappers_that_cannot_be_initialised_again,
    new_layers_are_sharded,
    sharded_in_other_ways,
    what_sharded_models_cannot,
    resumed_runs,
]


# --- the processes ----------------------------------------------------------------------------


def run_cases(number: int, folder: Path) -> None:
    rank = Rank(number, folder, torch.load(folder / "expected", weights_only=True))
    for case in CASES:
        case(rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def test_processes_grow_as_one(folder: Path) -> None:
    data = global_batches()
    expected: dict[str, Any] = {
        made_by(factory): train(ALONE, plain, factory, data) for factory in (ADAM, ADAGRAD)
    }
    for width in WIDTHS:
        expected[f"measured {width}"] = measured(wide(width), ragged(), width)
    expected["weighted"] = measured(wide(6), ragged(), 6, weight=weight)
    expected["twice"] = used_twice()
    torch.save(expected, folder / "expected")
    together(run_cases, folder, folder, processes=PROCESSES)
    for name in ("ddp", "fsdp"):  # what several have written one can read, and not take up
        path = folder / f"{name}.safetensors"
        assert len(cg.checkpoint.load(path).weights) == 12
        with pytest.raises(cg.CheckpointError, match="saved by 2 processes, and there are 1"):
            cg.checkpoint.resume(path, feedforward(2, 5, 5, 3), ADAM)
