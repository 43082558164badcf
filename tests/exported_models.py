"""Small networks of the kinds that people export, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """Residual blocks with BatchNorm, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.max_pool2d(functional.relu(self.body(x) + x), 2)
        return self.head(x.mean((2, 3)))


class Detector(nn.Module):
    """A pyramid of two scales, each with a head of boxes and one of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)])
        self.lateral = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)])
        self.boxes = nn.Conv2d(8, 4, 3, 1, 1)
        self.classes = nn.Conv2d(8, 6, 3, 1, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = functional.silu(self.down[0](image))
        coarse = functional.silu(self.down[1](fine))
        top = self.lateral[1](coarse)
        both = self.lateral[0](fine) + functional.interpolate(top, scale_factor=2.0)
        levels = [both, top]  # the heads are shared: one weight for two nodes
        boxes = torch.cat([self.boxes(level).flatten(2) for level in levels], 2)
        classes = torch.cat([self.classes(level).flatten(2) for level in levels], 2)
        return boxes.permute(0, 2, 1), classes.permute(0, 2, 1).sigmoid()


class UNet(nn.Module):
    """Down, up by ConvTranspose, and Concat with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(1, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.after = nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.relu(self.before(x))
        inner = functional.relu(self.inner(functional.max_pool2d(skip, 2)))
        return self.after(torch.cat([skip, functional.relu(self.up(inner))], 1))


class Recurrent(nn.Module):
    """LSTM and GRU, whose weights stay float, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(functional.relu(self.embed(x)))
        x, _ = self.gru(x)
        return self.head(x)


class Encoder(nn.Module):
    """Token embedding, then two transformer layers written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        shares = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        x = x + self.out((shares @ v).transpose(1, 2).reshape(batch, length, 16))
        return x + self.narrow(functional.gelu(self.wide(self.norms[1](x))))


class Audio(nn.Module):
    """Dilated, grouped 1-D convolutions over a wave form."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 8, 9, 4, 4), nn.LeakyReLU(0.1),
            nn.Conv1d(8, 8, 3, dilation=2, padding=2, groups=8), nn.Conv1d(8, 8, 1), nn.GELU(),
            nn.ConvTranspose1d(8, 1, 8, 4, 2),
        )  # fmt: skip

    def forward(self, wave: Tensor) -> Tensor:
        return torch.tanh(self.layers(wave))


class Volume(nn.Module):
    """3-D convolutions over a short clip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, 2, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, clip: Tensor) -> Tensor:
        x = functional.relu(self.second(functional.relu(self.first(clip))))
        return self.head(x.mean((2, 3, 4)))


class SuperResolution(nn.Module):
    """Twice the size by DepthToSpace, on top of an interpolated image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        detail = functional.pixel_shuffle(self.last(functional.relu(self.first(x))), 2)
        smooth = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return detail + smooth


class Mobile(nn.Module):
    """Hard-swish, squeeze-and-excitation, depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.norm(self.expand(x)))
        x = functional.relu6(self.depth(x))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1))))
        x = self.project(x * functional.hardsigmoid(gate))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Siamese(nn.Module):
    """One backbone on two inputs: every weight is read by two nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.ReLU()
        )
        self.head = nn.Linear(12, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        both = [self.backbone(image).mean((2, 3)) for image in (left, right)]
        return self.head(torch.cat(both, 1))


def _normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


# Each with a maker of one batch of two samples.
NETWORKS: dict[str, tuple[type[nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "classifier": (Classifier, _normal(2, 3, 16, 16)),
    "detector": (Detector, _normal(2, 3, 16, 16)),
    "u-net": (UNet, _normal(2, 1, 12, 12)),
    "recurrent": (Recurrent, _normal(2, 5, 4)),
    "transformer": (Encoder, lambda: (torch.randint(0, 20, (2, 6)),)),
    "audio": (Audio, _normal(2, 1, 64)),
    "volume": (Volume, _normal(2, 1, 6, 8, 8)),
    "super-resolution": (SuperResolution, _normal(2, 1, 10, 10)),
    "mobile": (Mobile, _normal(2, 3, 12, 12)),
    "two inputs": (Siamese, lambda: (torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))),
}


def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network in inference mode, its BatchNorms with statistics, and a batch for it."""
    torch.manual_seed(0)
    kind, batch = NETWORKS[name]
    model = kind()
    with torch.no_grad():
        for _ in range(3):
            model(*batch())
    return model.eval(), batch()
