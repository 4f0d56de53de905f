"""Small programs of the kinds that people write: what a forward pass does with its modules."""

from collections.abc import Callable
from typing import Any

import torch
from stacks import Residual
from torch import Tensor, nn


class ConvResidual(nn.Module):
    """relu(x + BN(conv(relu(conv(x))))); the first of a stage changes the shape."""

    def __init__(self, width: int, out: int | None = None, stride: int = 1, dims: int = 2) -> None:
        super().__init__()
        out = out or width
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.main = nn.Sequential(
            conv(width, out, 3, stride, 1),
            nn.ReLU(inplace=True),
            conv(out, out, 3, 1, 1),
            norm(out),
        )
        self.skip: nn.Module = nn.Identity() if out == width else conv(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.skip(x))


class Lists(nn.Module):
    """Some lists of residual blocks, a head; how they run is up to the subclass."""

    run: Callable[..., Tensor]

    def __init__(self, *depths: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.lists = nn.ModuleList(nn.ModuleList(Residual() for _ in range(n)) for n in depths)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self.stem(x), *self.lists))


class UNet(Lists):
    """Skips in a list, taken from its end."""

    def run(self, x: Tensor, down: Any, up: Any) -> Tensor:
        skips = [x]
        for block in down:
            x = block(x)
            skips.append(x)
        for block in up:
            x = block(x + skips.pop())
        return x


class Zipped(Lists):
    """Two lists in step."""

    def run(self, x: Tensor, one: Any, other: Any) -> Tensor:
        for left, right in zip(one, other):  # noqa: B905
            x = left(x) * 0.5 + right(x.tanh())
        return x


class Enumerated(Lists):
    """The output of the second block is used again at the end."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        kept = x
        for index, block in enumerate(blocks):
            x = block(x)
            kept = x if index == 1 else kept
        return x + kept


class Indexed(Lists):
    """Blocks by their numbers."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        for index in range(2):
            x = blocks[index](x)
        return blocks[-1](x.tanh())


class Collected(Lists):
    """All outputs of the list are averaged."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        outputs = []
        for block in blocks:
            outputs.append(x := block(x))
        return torch.stack(outputs).mean(0)


class Scaled(Lists):
    """As in networks of stochastic depth: the factor of a block depends on its number."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        for index, block in enumerate(blocks):
            x = x + block(x) * index / len(blocks)
        return x


class Supervised(Lists):
    """An output for each block, each of which has a term in the loss."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x, outputs = self.stem(x), []
        for block in self.lists[0]:  # type: ignore[union-attr]
            outputs.append(self.head(x := block(x)))
        return outputs


class Reversed(Lists):
    """Down the list and up again: every block runs twice."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        for block in [*blocks, *reversed(blocks)]:
            x = block(x)
        return x


class Plain(Lists):
    """The only one in which the next element is nothing but one more layer."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


class Dense(nn.Module):
    """As in a DenseNet: each layer sees all features so far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(10, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 2, 3, padding=1))
            for n in (4, 6, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class ImageUNet(nn.Module):
    """Encoder and decoder over three sizes, in lists; a time embedding for some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.ModuleList(ConvResidual(4) for _ in range(3))
        self.middle = nn.Sequential(ConvResidual(4), ConvResidual(4))
        self.up = nn.ModuleList(ConvResidual(8, 4) for _ in range(3))
        self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block in self.down:
            skips.append(x := block(x))
            x = self.pool(x)
        x = self.middle(x)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, skips.pop()], 1))
        return self.out(x).mean((2, 3))


class WithTime(nn.Sequential):
    """As in latent diffusion: it gives the time to the layers of one class."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, time) if isinstance(layer, Timed) else layer(x)
        return x


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.time, self.outer = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x) + self.time(time)))


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(WithTime(Timed(), Residual()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        time, x = x[:, :1], self.stem(x)
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


class Stages(nn.Module):
    """A stage of one block each, all but the first halving the image."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = conv(1, 4, 3, padding=1)
        sizes = (4, 4, 1), (4, 6, 2), (6, 8, 2)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(ConvResidual(*size, dims=dims)) for size in sizes
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.stem(x)))))
        return self.head(x.flatten(2).mean(2))


class Recurrent(nn.Module):
    """A language model, or a classifier of its last state."""

    def __init__(self, kind: Any, *, last: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.recurrent, self.last = kind(4, 4, 2, batch_first=True), last

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embed(ids))
        return self.head(hidden[:, -1] if self.last else hidden.mean(1))


class Cells(nn.Module):
    """A cell that runs once for each item of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.head = nn.Linear(2, 4), nn.GRUCell(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for _ in range(3):
            h = self.cell(self.stem(x), h)
        return self.head(h)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 144), nn.ReLU(), nn.Linear(144, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + variance.exp()), mean, variance


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), Residual())
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(x), self.encoder(-x)], 1))


class Experts(nn.Module):
    """Each sample goes to the expert that the router says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(2, 4), nn.Linear(4, 3)
        self.experts, self.head = nn.ModuleList(Residual() for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        chosen, gates = self.router(x).argmax(-1), self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            out[mask] = expert(x[mask]) * gates[mask, index, None]
        return self.head(out)


class Scalar(nn.Module):
    """What comes out of the head, but for its shape."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.head(self.norm(torch.relu(self.body(x)))))


class Frozen(nn.Module):
    """A backbone that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


def feature_pyramid() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


def temporal() -> nn.Module:
    """A convolutional network over time, of residual blocks."""
    blocks = ConvResidual(4, dims=1), ConvResidual(4, dims=1)
    return nn.Sequential(
        nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def bare_temporal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3))


def vectors() -> Tensor:
    return torch.randn(6, 2)


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8)


def volumes() -> Tensor:
    return torch.randn(4, 1, 4, 4, 4)


def signals() -> Tensor:
    return torch.randn(6, 1, 8)


def tokens() -> Tensor:
    return torch.randint(9, (6, 5))
