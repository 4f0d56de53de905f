"""Candidates, and finding them by watching a model run."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Gain, classified, feedforward, nothing_left_behind, refused, solved
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualMLP, TanhLU


def test_name_is_that_of_the_site_unless_given() -> None:
    assert cg.Candidate("1", Gain(4)).name == "1"
    assert cg.Candidate(after="1", block=Gain(4), name="gain").name == "gain"


def test_a_batch_in_place_of_an_input() -> None:
    batch = list(classified(4)[0])
    with refused(cg.CandidateError, "example_input=list", "batch[0]"):
        cg.find_candidates(feedforward(2, 4, 3), batch)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (nn.ReLU, IdentityLinear),
        (lambda: nn.ReLU(inplace=True), IdentityLinear),
        (TanhLU, IdentityLinear),
        (nn.Tanh, ResidualMLP),
        (nn.GELU, ResidualMLP),
        (nn.ELU, ResidualMLP),
        (nn.LeakyReLU, ResidualMLP),
    ],
)
def test_activations_make_sites(activation: Any, kind: type[nn.Module]) -> None:
    """The output of the model is none, though an activation may stand there."""
    model = nn.Sequential(*feedforward(2, 4, 5, 3, activation=activation))
    found = cg.find_candidates(model, torch.randn(7, 2))
    assert [one.after for one in found] == ["1", "3"]
    assert [type(one.block) for one in found] == [kind, kind]
    assert [next(iter(one.block.parameters())).shape[1] for one in found] == [4, 5]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Mixed(nn.Module):
    """Called with keywords; one activation runs twice, one never, one on a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.twice = nn.Linear(2, 4), Residual(4), nn.ReLU()
        self.never, self.vector, self.norm = nn.ReLU(), nn.Sigmoid(), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, *, x: Tensor) -> Tensor:
        h = self.twice(self.twice(self.block(self.stem(x))))
        return self.head(self.norm(h) * self.vector(h.sum(1))[:, None])


def test_residual_blocks_make_sites_in_the_order_of_the_pass() -> None:
    model, input = Mixed(), {"x": torch.randn(7, 2)}
    with nothing_left_behind(model):
        found = cg.find_candidates(model, input)
    names = [one.after for one in found]
    assert names == ["block.branch.1", "block.branch", "block"]
    data = [(input, torch.randint(3, (7,)))]
    solution = solved(model, data, *found, rule=cg.TopK(9))
    before = model(**input)
    assert len(cg.insert(model, solution).insertions) == 3
    assert torch.equal(model(**input), before)


def test_looking_leaves_no_trace() -> None:
    model = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3)
    )
    model[4].eval()
    x = torch.randn(7, 2)
    with nothing_left_behind(model):
        found = cg.find_candidates(model, x)
    assert not {id(m) for one in found for m in one.block.modules()} & {
        id(m) for m in model.modules()
    }


def test_proposals_can_be_solved_for_and_inserted() -> None:
    model, data = feedforward(2, 4, 4, 3, activation=nn.GELU), classified(20, batch=8)
    found = cg.find_candidates(model, data[0][0])
    solution = solved(model, data, *found, rule=cg.TopK(2))
    assert len(solution.decision.chosen) == 2
    before = model(data[0][0])
    cg.insert(model, solution)
    assert torch.equal(model(data[0][0]), before)


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2), (1, 2)])
def test_sequences_are_fine(shape: tuple[int, ...]) -> None:
    found = cg.find_candidates(feedforward(2, 4, 3), torch.randn(shape))
    assert [one.after for one in found] == ["1"]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Identity(), nn.ReLU())],
    ids=["one layer", "one in a sequence", "only the output"],
)
def test_nothing_to_propose(model: nn.Module) -> None:
    model = model.double()
    with nothing_left_behind(model), refused(cg.CandidateError, "by hand", "after="):
        cg.find_candidates(model, torch.zeros(7, 2))


def test_model_that_fails_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(3, 3))
    x = torch.randn(7, 2)
    with nothing_left_behind(model), refused(cg.CandidateError, "example_input", "mat1 and mat2"):
        cg.find_candidates(model, x)
    assert np.isfinite(model.state_dict()["0.running_mean"].numpy()).all()


class Image(nn.Module):
    """A small ResNet: a stem, two stages of two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBlock(a, b), ConvBlock(b, b)) for a, b in ((4, 4), (4, 8))
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class ConvBlock(nn.Module):
    """As in ResNet: relu(x + BN(conv(relu(BN(conv(x)))))), one ReLU used twice."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.skip(x))


def test_images_copies_of_blocks_and_convolutions() -> None:
    """Blocks that repeat are copied; after the one that widens comes a copy of the next."""
    torch.manual_seed(0)
    model = Image()
    images = torch.randn(6, 1, 5, 5)
    with nothing_left_behind(model):
        found = cg.find_candidates(model, images)
    proposed = {one.after: type(one.block).__name__ for one in found}
    assert proposed == {
        "stem.2": "IdentityConv2d",
        "stages.0.0": "CopiedBlock",
        "stages.0.1": "CopiedBlock",
        "stages.1.0": "CopiedBlock",
        "stages.1.1": "CopiedBlock",
    }
    assert found.reasons["stages.1.0"] == "one more ConvBlock, a copy of the next"
    data = [(images, torch.randint(3, (6,)))]
    solution = solved(model, data, *found, rule=cg.TopK(9))
    before = model(images)
    record = cg.insert(model, solution)
    assert torch.allclose(model(images), before, rtol=0, atol=1e-12)
    again = cg.replay(Image(), cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        4, 2, 8, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    return nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), Head())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


@pytest.mark.parametrize(("norm_first", "block"), [(True, "CopiedBlock"), (False, "ResidualMLP")])
def test_transformers_copy_their_layers_where_they_can(norm_first: bool, block: str) -> None:
    model = encoder(norm_first)
    found = cg.find_candidates(model, torch.randn(2, 5, 4))
    assert [(one.after, type(one.block).__name__) for one in found] == [
        (f"0.layers.{i}", block) for i in range(3)
    ]
    assert ("no copy, as" in found.reasons["0.layers.0"]) is not norm_first
    assert ("as above" in str(found)) is not norm_first
    assert max(map(len, str(found).splitlines())) <= 100


@pytest.mark.parametrize("biased", [False, True])
def test_proposals_under_autocast_are_those_without(biased: bool) -> None:
    """Rounded sums are not the identity, and the graph would be one of casts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, None, False)).float()
    if biased:
        for parameter in model.parameters():
            parameter.data += 0.1
    x = torch.randn(4, 5, 3, dtype=torch.float32)
    plain: list[Any] = [candidate.block for candidate in cg.find_candidates(model, x)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found: list[Any] = [candidate.block for candidate in cg.find_candidates(model, x)]
    assert [type(block) for block in found] == [cg.blocks.CopiedBlock]
    assert [block.pinned for block in found] == [block.pinned for block in plain]


def test_the_table_shows_proposals_reasons_and_skipped_modules() -> None:
    model = nn.Sequential(*feedforward(2, 4, 4, 3), nn.Softmax(1), nn.Linear(3, 3))
    found = cg.find_candidates(model, torch.randn(7, 2))
    table = str(found).splitlines()
    assert table[0].split() == ["after", "block", "parameters", "pinned", "why"]
    assert [line.split()[:4] for line in table[1:3]] == [
        ["1", "IdentityLinear", "20", "20"],
        ["3", "IdentityLinear", "20", "20"],
    ]
    assert "5  Softmax is not an elementwise activation" in table


def test_proposals_are_a_tuple_that_can_be_copied() -> None:
    found = cg.find_candidates(feedforward(2, 4, 3), torch.randn(7, 2))
    again = copy.deepcopy(found)
    assert isinstance(again, tuple)
    assert again.reasons == found.reasons
    assert [one.after for one in again] == ["1"]


class Plain(nn.Module):
    """Activations as functions, and one module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.outer = nn.Conv2d(1, 4, 3), nn.Linear(4, 5), nn.Linear(5, 3)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.sigmoid(self.conv(x)).relu().mean((2, 3))
        return self.outer(self.sigmoid(self.inner(h)))


def test_functions_as_activations_leave_the_layers_as_sites() -> None:
    found = cg.find_candidates(Plain(), torch.randn(6, 1, 5, 5))
    assert [(one.after, type(one.block).__name__) for one in found] == [
        ("conv", "ResidualConv2d"),
        ("inner", "ResidualMLP"),
    ]
    assert found.skipped == {
        "sigmoid": "it runs 2 times in one pass",
        "outer": "its output is that of the model",
    }


class ChannelsAtTheEnd(nn.Module):
    """As in ConvNeXt: a residual block on images that works on the last dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x.permute(0, 2, 3, 1) + 1)).permute(0, 3, 1, 2)


def test_a_module_that_keeps_the_shape_keeps_the_channel_dimension() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), ChannelsAtTheEnd(), nn.Flatten(), nn.LazyLinear(3))
    images = torch.randn(6, 1, 5, 7)
    model(images)
    (found,) = cg.find_candidates(model, images)
    assert (found.after, type(found.block).__name__) == ("1", "ResidualConv2d")


class Stages(nn.Module):
    """Stages in a list, blocks in a list in each, sublayers of different kinds in each of them."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(inner) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Stage(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(inner() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(h=x)
        return x


class Sublayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList([Residual(4), AlsoResidual(4)])

    def forward(self, h: Tensor) -> Tensor:
        return self.sublayers[-1](self.sublayers[0](h))


class AlsoResidual(Residual):
    pass


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual, self.norm = Residual(4), nn.LayerNorm(4)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.residual(h))


@pytest.mark.parametrize(
    ("inner", "block"), [(Sublayers, "CopiedBlock"), (PostNorm, "ResidualMLP")]
)
def test_the_innermost_stack_counts(inner: Any, block: str) -> None:
    """Not the stages, which repeat too, nor what a block consists of; called with a keyword."""
    model, x = Stages(inner), torch.randn(6, 4)
    found = cg.find_candidates(model, x)
    assert [(one.after, type(one.block).__name__) for one in found] == [
        (f"stages.{i}.blocks.{j}", block) for i in range(2) for j in range(2)
    ]
    solution = solved(model, [(x, torch.randint(3, (6,)))], *found, rule=cg.TopK(4))
    before = model(x)
    cg.insert(model, solution)
    assert torch.equal(model(x), before)


class Named(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, *, h: Tensor) -> Tensor:
        return h + self.branch(h)


class NamedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Named(4), Named(4)]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(h=x)
        return self.head(x)


def test_blocks_that_take_x_by_its_name_alone() -> None:
    """A copy is called with x in first place, so a residual block is proposed."""
    x = torch.randn(6, 4)
    found = cg.find_candidates(NamedStack(), x)
    assert [type(one.block) for one in found] == [ResidualMLP, ResidualMLP]
    with refused(cg.BlockError, "module=Named", "in first place", "TypeError"):
        cg.blocks.CopiedBlock(Named(4), args=(x,))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_in_an_encoder_in_eval_mode() -> None:
    """On its fast path PyTorch nests the tensors and fills the padding with zeros."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Masked(nn.TransformerEncoder(layer, 2)).eval()
    x, padding = torch.randn(3, 5, 4), torch.arange(5) > torch.tensor([[4], [2], [3]])
    fast = torch.backends.mha.get_fastpath_enabled()
    with nothing_left_behind(model):
        found = cg.find_candidates(model, (x, padding))
    assert torch.backends.mha.get_fastpath_enabled() is fast
    data = [((x, padding), torch.randint(3, (3,)))]
    solution = solved(model, data, *found, rule=cg.TopK(2))
    before = model(x, padding)
    assert cg.insert(model, solution).difference == {"train": 0.0, "eval": 0.0}
    assert torch.equal(model(x, padding), before)
    with torch.no_grad():
        assert torch.allclose(model(x, padding), before, rtol=0, atol=1e-12)


class Masked(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(4, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding[..., None], 0.0).sum(1))
