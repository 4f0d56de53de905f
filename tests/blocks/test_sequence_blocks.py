"""Transformer blocks and gated layers that start as the identity."""

from collections.abc import Callable

import pytest
import torch
from helpers import (
    assert_multipliers,
    autograd_multipliers,
    choose,
    label,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import (
    GatedMLP,
    TransformerBlock,
    has_factors,
    pinned_parameters,
)

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: TransformerBlock(8, 2),
    "transformer, causal": lambda: TransformerBlock(8, 4, 5, torch.tanh, causal=True),
    "transformer, ReLU": lambda: TransformerBlock(8, 1, activation=nn.ReLU()),
    "gated": lambda: GatedMLP(8, 6),
    "gated, sigmoid": lambda: GatedMLP(8, 3, nn.Sigmoid(), eps=1e-5),
}


class Reader(nn.Module):
    """Tokens to vectors, something between the positions, and a class for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.tokens(tokens).tanh())
        return self.head((x + x.cumsum(1)).tanh())


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def sentences(*sizes: int, length: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(11, (n, length)), torch.randint(5, (n, length))) for n in sizes]


# --- the identity at the pins -------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 1, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_they_are_the_identity_to_the_last_bit(kind: str, shape: tuple, training: bool) -> None:
    x = torch.randn(shape) * 10.0 ** torch.randint(-8, 9, shape)
    assert torch.equal(BLOCKS[kind]().train(training)(x), x)


def moved(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 2, 8)], ids=label)
def test_a_moved_block_is_the_pre_norm_block_of_pytorch(causal: bool, shape: tuple) -> None:
    block = moved(TransformerBlock(8, 2, 6, nn.ReLU(), causal=causal))
    theirs = nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True, norm_first=True)
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "proj.weight",
        "self_attn.out_proj.bias": "proj.bias",
        **{f"linear{i}.{p}": f"fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")},
        **{f"norm{i}.{p}": f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")},
    }
    theirs.load_state_dict({key: block.get_parameter(ours) for key, ours in names.items()})
    x = torch.randn(shape)
    flat = x.flatten(1, -2)
    mask = nn.Transformer.generate_square_subsequent_mask(flat.shape[1]) if causal else None
    expected = theirs(flat, src_mask=mask).view_as(x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_a_moved_gated_layer_written_out() -> None:
    block = moved(GatedMLP(3, 4))
    x = torch.randn(2, 3)
    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.get_parameter("norm.weight")
    gate, up = (n @ block.get_parameter(f"{name}_proj.weight").T for name in ("gate", "up"))
    hidden = gate * torch.sigmoid(gate) * up
    expected = x + hidden @ block.get_parameter("down_proj.weight").T
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


# --- multipliers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
def test_multipliers_are_the_gradient_with_the_block_in_the_model(kind: str) -> None:
    model, data = Reader(), sentences(5, 5, 3)
    one = cg.Candidate("mix", BLOCKS[kind]())
    assert has_factors(one.block)
    with nothing_left_behind(model), nothing_left_behind(one.block):
        solution = solved(model, data, one, loss_fn=token_loss)
    for value in solution.multipliers["mix"].values():
        assert value.abs().max() > 1e-6
    expected = autograd_multipliers(model, data, one, token_loss)
    assert_multipliers(solution, "mix", expected)


@pytest.mark.parametrize("length", [1, 4, 12])
@pytest.mark.parametrize("kind", BLOCKS)
def test_standard_errors_are_those_of_single_samples(kind: str, length: int) -> None:
    """√tr Cov(λ) from the gradient of each sample."""
    model, data = Reader(), sentences(5, 5, length=length)
    one = cg.Candidate("mix", BLOCKS[kind]())
    solution = solved(model, data, one, loss_fn=token_loss)
    rows = torch.stack(
        [
            torch.cat([t.flatten() for t in autograd_multipliers(*args, token_loss).values()])
            for x, y in data
            for i in range(len(x))
            for args in [(model, [(x[i : i + 1], y[i : i + 1])], one)]
        ]
    )
    error = (rows.var(0).sum() / len(rows)).sqrt().item()
    assert solution.sensitivities["mix"].variance ** 0.5 == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("kind", BLOCKS)
def test_inserted_recorded_and_replayed(kind: str) -> None:
    model, data = Reader(), sentences(6)
    before = model(data[0][0])
    one = cg.Candidate("mix", BLOCKS[kind]())
    record = cg.insert(model, solved(model, data, one, loss_fn=token_loss, rule=choose("mix")))
    assert torch.equal(model(data[0][0]), before)
    moved(model)
    again = cg.replay(Reader(), cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data[0][0]), model(data[0][0]))
    assert repr(again) == repr(model)


# --- parameters and refusals ----------------------------------------------------------------------


def test_names_shapes_and_pins() -> None:
    block = TransformerBlock(8, 2, 5)
    assert tuple(pinned_parameters(block)) == ("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if "norm" not in name}
    assert shapes == {
        **{"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8), "proj.bias": (8,)},
        **{"fc1.weight": (5, 8), "fc1.bias": (5,), "fc2.weight": (8, 5), "fc2.bias": (8,)},
    }
    assert TransformerBlock(8, 2).fc1.out_features == 32
    gated = GatedMLP(8, 5)
    assert tuple(pinned_parameters(gated)) == ("down_proj.weight",)
    assert {name: tuple(p.shape) for name, p in gated.named_parameters()} == {
        "norm.weight": (8,),
        "gate_proj.weight": (5, 8),
        "up_proj.weight": (5, 8),
        "down_proj.weight": (8, 5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [TransformerBlock, GatedMLP], ids=label)
def test_dtype_is_the_one_asked_for(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    block = make(8, 4, dtype=dtype)
    assert {p.dtype for p in block.parameters()} == {dtype}
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert torch.equal(block(x), x)
    assert {p.device.type for p in make(8, 4, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TransformerBlock(8, 3), ["heads=3", "width=8", "divisor"]),
        (lambda: TransformerBlock(8, 0), ["heads=0"]),
        (lambda: TransformerBlock(8, 2, -1), ["hidden=-1"]),
        (lambda: TransformerBlock(8, 2, activation=nn.Softmax(-1)), ["Softmax", "elementwise"]),
        (lambda: GatedMLP(0, 4), ["width=0"]),
        (lambda: GatedMLP(4, 2.5), ["hidden=2.5"]),  # type: ignore[arg-type]
        (lambda: GatedMLP(4, 2, nn.Linear(4, 4)), ["Linear", "not elementwise"]),
        (lambda: TransformerBlock(4, 2)(torch.randn(3, 4)), ["(3, 4)", "ResidualMLP"]),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], object], words: list[str]) -> None:
    with refused(cg.BlockError, *words):
        make()


def test_attention_between_samples_is_refused() -> None:
    """Without positions the samples would attend to each other."""
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(6, 2), torch.randint(3, (6,)))]
    one = cg.Candidate("1", TransformerBlock(8, 2))
    with nothing_left_behind(model), refused(cg.BlockError, "(samples, positions, width)"):
        solved(model, data, one)


def test_a_dead_gate_is_refused() -> None:
    model, data = Reader(), sentences(6)
    one = cg.Candidate("mix", GatedMLP(8, 4, torch.zeros_like))
    with nothing_left_behind(model), refused(cg.BlockError, "vanish identically"):
        solved(model, data, one, loss_fn=token_loss)
