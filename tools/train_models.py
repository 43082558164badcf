"""Train the sample models on scikit-learn's handwritten digits and write ``models/``.

    python tools/train_models.py [OUT_DIR]

Writes two ONNX files, a card for each, ``digits_calib.npz`` (512 unlabelled
training samples) and ``digits_eval.npz`` (the held-out samples with labels).
Seeded, CPU only, a minute or two. Every file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
HELD_OUT = 600
CALIBRATION = 512
EPOCHS = 60
BATCH = 64

Array = NDArray[Any]


class Digits(NamedTuple):
    """Samples ``[n, 1, 8, 8]`` float32 in 0..1 and labels ``[n]`` int64, split once."""

    train: Array
    train_labels: Array
    held_out: Array
    held_out_labels: Array


def digits() -> Digits:
    """The data set; samples of one writer stand together, so the last ones are held out."""
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    order = np.random.default_rng(SEED).permutation(len(images) - HELD_OUT)
    train, held_out = images[order], images[-HELD_OUT:]
    return Digits(train, data.target[order], held_out, data.target[-HELD_OUT:])


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[Any]:
    """A convolution that keeps the size (but for its stride), then BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3)
        )
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if changes else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3), project (1x1); a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        hidden = inputs * expand
        self.branch = nn.Sequential(
            *conv_bn(inputs, hidden, 1), nn.ReLU6(),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def resnet() -> nn.Module:
    """Stem, three residual units, pooling, classifier."""
    return nn.Sequential(
        *conv_bn(1, 16, 3), nn.ReLU(),
        ResidualUnit(16, 16), ResidualUnit(16, 32, stride=2), ResidualUnit(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )


def mobilenet() -> nn.Module:
    """Stem, four inverted residuals, a wide 1x1 convolution, pooling, classifier."""
    return nn.Sequential(
        *conv_bn(1, 24, 3), nn.ReLU6(),
        InvertedResidual(24, 24), InvertedResidual(24, 40, stride=2),
        InvertedResidual(40, 40), InvertedResidual(40, 40),
        *conv_bn(40, 128, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )


def augment(x: Tensor) -> Tensor:
    """Turn, scale and shift each sample a little, and change its contrast."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.4
    size = 1 + (torch.rand(n) - 0.5) * 0.2
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size * angle.cos()
    theta[:, 0, 1] = size * angle.sin()
    theta[:, 1, 0] = -theta[:, 0, 1]
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * 0.4
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    contrast = 1 + (torch.rand(n, 1, 1, 1) - 0.5) * 0.3
    return (moved * contrast).clamp(0, 1)


def train(model: nn.Module, data: Digits) -> None:
    """Fit ``model`` in place to the training split; it ends in evaluation mode."""
    images, labels = torch.from_numpy(data.train), torch.from_numpy(data.train_labels)
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, EPOCHS * batches)
    model.train()
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            loss = F.cross_entropy(
                model(augment(images[picked])), labels[picked], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def export(model: nn.Module, *, keep_batch_norm: bool) -> bytes:
    """The ONNX file (opset 17, dynamic batch); BatchNorm is folded unless it is to be kept."""
    modes = torch.onnx.TrainingMode
    buffer = io.BytesIO()
    # The exporter that needs no further package, and that can leave BatchNorm in the graph.
    warnings.filterwarnings("ignore", "You are using the legacy", DeprecationWarning)
    torch.onnx.export(
        model, (torch.zeros(2, 1, 8, 8),), buffer, opset_version=17, dynamo=False,
        input_names=["input"], output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        training=modes.PRESERVE if keep_batch_norm else modes.EVAL,
        do_constant_folding=not keep_batch_norm,
    )
    return buffer.getvalue()


def measure(file: bytes, model: nn.Module, data: Digits) -> float:
    """Top-1 of the ONNX file on the held-out samples; raises where it departs from torch."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input": data.held_out})[0]
    with torch.no_grad():
        np.testing.assert_allclose(
            logits, model(torch.from_numpy(data.held_out)).numpy(), rtol=1e-4, atol=1e-4
        )
    return float((logits.argmax(1) == data.held_out_labels).mean())


CARD = """# {name}

{what}

| | |
|---|---|
| File | `{name}.onnx`, FP32, opset 17, {size:.0f} KB, {parameters:,} parameters |
| Input | `input` float32 [N, 1, 8, 8], dynamic batch: grey values of 0 to 16, divided by 16 |
| Output | `logits` float32 [N, 10], one per digit |
| Float top-1 | **{top1:.4f}** on `digits_eval.npz` ({held_out} samples, never used in training) |
| BatchNormalization | {batch_norm} |
| Training | `python tools/train_models.py`: {epochs} epochs on {train} samples, seed {seed} |

Data: *Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0, in the copy of 1,797 samples that
scikit-learn ships (`sklearn.datasets.load_digits`). The last {held_out} samples in the file's order
are held out. `digits_calib.npz` holds {calibration} training samples (key `input`), without labels;
`digits_eval.npz` holds the held-out samples (`input`, `labels`).
"""

MODELS = {
    "digits_resnet": (
        resnet, False,
        "A residual network: 3x3 stem, three residual units (the second with stride 2 and a\n"
        "1x1 convolution as shortcut), global average pooling, a linear layer.",
    ),
    "digits_mobilenet": (
        mobilenet, True,
        "A network of inverted residuals: 3x3 stem, four units of expansion, depthwise\n"
        "convolution and projection, ReLU6 as Clip, global average pooling, a linear layer.",
    ),
}


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def npz(**arrays: Array) -> bytes:
    """The bytes of a compressed ``.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def make_model(name: str, data: Digits, out: Path) -> str:
    """Train one sample model, write it and its card; returns a line on the result."""
    build, keep_batch_norm, what = MODELS[name]
    torch.manual_seed(SEED)
    model = build()
    train(model, data)
    file = export(model, keep_batch_norm=keep_batch_norm)
    onnx.checker.check_model(onnx.load_from_string(file), full_check=True)
    top1 = measure(file, model, data)
    card = CARD.format(
        name=name, what=what, top1=top1, size=len(file) / 1000, epochs=EPOCHS, seed=SEED,
        parameters=sum(p.numel() for p in model.parameters()),
        batch_norm="kept as nodes" if keep_batch_norm else "folded into the convolutions",
        train=len(data.train), held_out=len(data.held_out), calibration=CALIBRATION,
    )
    write_whole(out / f"{name}.onnx", file)
    write_whole(out / f"{name}.md", card.encode())
    return f"{name}: float top-1 {top1:.4f}, {len(file) / 1000:.0f} KB"


def main() -> None:
    """Parse the arguments and write all files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "models"
    parser.add_argument("out_dir", nargs="?", type=Path, default=default)
    out: Path = parser.parse_args().out_dir
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number
    torch.use_deterministic_algorithms(True)
    data = digits()
    write_whole(out / "digits_calib.npz", npz(input=data.train[:CALIBRATION]))
    write_whole(
        out / "digits_eval.npz", npz(input=data.held_out, labels=data.held_out_labels)
    )
    for name in MODELS:
        print(make_model(name, data, out))


if __name__ == "__main__":
    main()
