"""Weights alone quantised: a transformer on handwritten digits, and ONNX Runtime's own quantiser.

    python tools/weight_only.py [--bits 8,4,3,2] [--blocks none,128,32] [--model FILE.onnx]
    python tools/weight_only.py --speed 2048 [--bits 8,4,2] [--blocks none,128,32]

Trains a small vision transformer on scikit-learn's digits (half a minute; with --model the
file is kept, and taken if it is there) and prints a Markdown table, a line for each setting:
top-1 and SQNR against the float model on the held-out samples, as ONNX Runtime computes, the
size of the file and the CPU-seconds of the conversion, loading of libraries left out.
With --speed, how much faster than in float one MatMul of so many inputs and outputs runs on
one thread: medians, the models taking turns, by the number of rows that are multiplied.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from torch import Tensor, nn
from torch.nn import functional as F
from train_models import BATCH, CALIBRATION, SEED, Array, Digits, augment, digits, export

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.runtime.session import open_session

EPOCHS = 40
WIDTH, HEADS, HIDDEN, DEPTH = 128, 4, 512, 4
COLUMNS = "bits", "scales", "method", "top-1", "SQNR dB", "size", "CPU s"


class Layer(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        shares = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        x = x + self.out((shares @ v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Transformer(nn.Module):
    """Sixteen patches of 2x2, a learned place for each, four layers, their mean, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, WIDTH), nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
        x = self.layers(self.embed(patches) + self.place)
        return self.head(self.norm(x.mean(1)))


def main() -> None:
    """Train or load the model, convert it in every way, print the table."""
    options = _options()
    logging.disable(logging.INFO)
    if options.speed:
        print_speed(options)
        return
    data = digits()
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or Path(folder) / "transformer.onnx"
        if not source.exists():
            source.write_bytes(trained(data))
        exact = _logits(source.read_bytes(), data)
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        print(_line(("32", "", "float"), exact, exact, data, source, 0.0), flush=True)
        for names, convert in _ways(options, source, data.train[:CALIBRATION]):
            output = Path(folder) / "converted.onnx"
            start = time.process_time()
            convert(output)
            seconds = time.process_time() - start
            got = _logits(output.read_bytes(), data)
            print(_line(names, exact, got, data, output, seconds), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--blocks", default="none,128,32")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--speed", type=int, metavar="SIZE", help="time one MatMul instead")
    return parser.parse_args()


def trained(data: Digits) -> bytes:
    """The ONNX file of a transformer fitted to the training split."""
    torch.manual_seed(SEED)
    model = Transformer()
    images, labels = torch.from_numpy(data.train), torch.from_numpy(data.train_labels)
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, EPOCHS * batches)
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            loss = F.cross_entropy(model(augment(images[picked])), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return export(model.eval(), keep_batch_norm=False)


def _ways(
    options: argparse.Namespace, source: Path, samples: Array
) -> Iterator[tuple[tuple[str, str, str], Callable[[Path], object]]]:
    """What each line is called, and what writes its file."""
    for bits in map(int, options.bits.split(",")):
        for text in options.blocks.split(","):
            block = None if text == "none" else int(text)
            scales = "per channel" if block is None else f"block {block}"
            for method in ("nearest", "attention"):
                yield (str(bits), scales, method), _ours(source, samples, bits, block, method)
            if bits in (2, 4, 8) and block is not None:
                for name, algorithm in _algorithms(bits, block, samples).items():
                    yield (str(bits), scales, name), _peer(source, bits, block, algorithm)


def _ours(
    source: Path, samples: Array, bits: int, block: int | None, method: str
) -> Callable[[Path], object]:
    config = _settings(bits, block, method)
    return lambda output: quantize(source, {"input": samples}, config, output=output)


def _settings(bits: int, block: int | None, method: str) -> QuantConfig:
    return QuantConfig.parse({
        "act_bits": 32, "weight_bits": bits, "first_last_bits": bits, "block_size": block,
        "method": method, "weight_storage": "packed2" if bits == 2 else None, "threads": 1,
    })  # fmt: skip


def _algorithms(bits: int, block: int, samples: Array) -> dict[str, Any]:
    """The quantisers of ONNX Runtime that run with these bits, by their names in the table."""
    plain = {
        f"MatMulNBitsQuantizer, {kind}": nbits.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=symmetric, bits=bits, accuracy_level=4
        )
        for kind, symmetric in (("symmetric", True), ("zero points", False))
    }
    if bits == 8:
        return plain
    return {**plain, "…, HQQ": nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)}


def _peer(source: Path, bits: int, block: int, algorithm: Any) -> Callable[[Path], object]:
    def convert(output: Path) -> None:
        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=block, algo_config=algorithm
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(output))

    return convert


def _logits(file: bytes, data: Digits) -> Array:
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits: Array = session.run(None, {"input": data.held_out})[0]
    return logits


def print_speed(options: argparse.Namespace) -> None:
    """The table of speeds: float time over that of each form of the weights."""
    source = _matmul(options.speed)
    models = {"float": source}
    for bits in map(int, options.bits.split(",")):
        for text in options.blocks.split(","):
            settings = _settings(bits, None if text == "none" else int(text), "nearest")
            name = f"{bits} bits, " + ("per channel" if text == "none" else f"block {text}")
            models[name] = quantize(source, None, settings).model
    sessions = {name: open_session(model, threads=1) for name, model in models.items()}
    times = {rows: _times(sessions, rows, options.speed) for rows in (1, 16, 256)}
    print("| rows | " + " | ".join(map(str, times)) + " |\n" + "|---" * 4 + "|")
    for name in models:
        told = [f"{found['float'] / found[name]:.2f}" for found in times.values()]
        if name == "float":
            told = [f"{1000 * found['float']:.2f} ms" for found in times.values()]
        print(f"| {name} | " + " | ".join(told) + " |")


def _times(sessions: dict[str, ort.InferenceSession], rows: int, size: int) -> dict[str, float]:
    """Median seconds of each session, in turns."""
    x = np.random.default_rng(1).normal(size=(rows, size)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(60 if rows < 256 else 20):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(found)) for name, found in times.items()}


def _matmul(size: int) -> ir.Model:
    weight = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    text = f"g (float[N,{size}] x) => (float[N,{size}] y) {{ y = MatMul(x, w) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto)


def _line(
    names: tuple[str, str, str], exact: Array, got: Array, data: Digits, file: Path, seconds: float
) -> str:
    top1 = float((got.argmax(1) == data.held_out_labels).mean())
    noise = float(np.square(exact - got).sum())
    sqnr = f"{10 * np.log10(np.square(exact).sum() / noise):.1f}" if noise else ""
    cells = *names, f"{top1:.4f}", sqnr, f"{file.stat().st_size / 1000:.0f} kB", f"{seconds:.1f}"
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
