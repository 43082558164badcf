"""Build a ResNet-18 with random weights, and generated images, to measure time and memory.

    python tools/build_resnet18.py OUT_DIR [--images N] [--seed N]

Writes ``resnet18.onnx`` (opset 17, about 47 MB, BatchNorm folded into biases)
and ``calib.npy``, float32 ``[N, 3, 224, 224]``, normalised like photographs.
The network predicts nothing: only its shape and its costs are those of the
real one. Memory stays small whatever the number of images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

SIZE = 224
CLASSES = 1000


class Builder:
    """Collects nodes and initialisers; each method returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, shape: tuple[int, ...], std: float) -> str:
        """A normally distributed initialiser."""
        values = (self.rng.standard_normal(shape) * std).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node whose output has its name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def conv(
        self, name: str, x: str, shape: tuple[int, int, int], *, stride: int = 1, gain: float = 2.0
    ) -> str:
        """A convolution of ``shape`` (outputs, inputs, kernel) with variance ``gain / fan_in``."""
        outputs, inputs, kernel = shape
        full = (outputs, inputs, kernel, kernel)
        weight = self.weight(f"{name}.weight", full, (gain / (inputs * kernel**2)) ** 0.5)
        bias = self.weight(f"{name}.bias", (outputs,), 0.1)
        return self.node(
            "Conv", name, x, weight, bias,
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4,
        )

    def unit(self, name: str, x: str, inputs: int, outputs: int, stride: int) -> str:
        """A residual unit; its branch and its shortcut each carry half of the variance."""
        a = self.conv(f"{name}.conv1", x, (outputs, inputs, 3), stride=stride)
        a = self.node("Relu", f"{name}.relu1", a)
        a = self.conv(f"{name}.conv2", a, (outputs, outputs, 3), gain=0.5)
        if stride > 1 or inputs != outputs:
            x = self.conv(f"{name}.shortcut", x, (outputs, inputs, 1), stride=stride, gain=1.0)
        return self.node("Relu", f"{name}.relu2", self.node("Add", f"{name}.add", a, x))


def resnet18(seed: int) -> onnx.ModelProto:
    """The model: ``input`` [N, 3, 224, 224] to ``logits`` [N, 1000]."""
    b = Builder(seed)
    x = b.node("Relu", "stem.relu", b.conv("stem.conv", "input", (64, 3, 7), stride=2))
    x = b.node("MaxPool", "stem.pool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        x = b.unit(f"stage{stage}.0", x, inputs, outputs, stride=2 if stage else 1)
        x = b.unit(f"stage{stage}.1", x, outputs, outputs, stride=1)
        inputs = outputs
    x = b.node("Flatten", "flatten", b.node("GlobalAveragePool", "pool", x))
    weight = b.weight("fc.weight", (CLASSES, inputs), inputs**-0.5)
    b.node("Gemm", "logits", x, weight, b.weight("fc.bias", (CLASSES,), 0.1), transB=1)
    graph = helper.make_graph(
        b.nodes, "resnet18",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        b.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int, seed: int) -> Iterator[Array]:
    """``count`` images ``[3, 224, 224]``: noise with the 1/f spectrum of photographs.

    The channels share most of their content. Each has mean 0 and standard
    deviation 1, as after the usual preprocessing; an image depends on the seed
    and its index only.
    """
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / SIZE)
    mix = np.array([[1.0, 0.4, 0.0, 0.0], [1.0, 0.0, 0.4, 0.0], [1.0, 0.0, 0.0, 0.4]])
    for index in range(count):
        noise = np.random.default_rng((seed, index)).standard_normal((4, SIZE, SIZE))
        smooth = np.fft.irfft2(np.fft.rfft2(noise) * falloff, s=(SIZE, SIZE))
        image = np.tensordot(mix, smooth, axes=1)
        image -= image.mean(axis=(1, 2), keepdims=True)
        yield (image / image.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def write_images(path: Path, count: int, seed: int) -> None:
    """Stream the images into a ``.npy`` file, one at a time, then rename it."""
    part = path.with_name(path.name + ".part")
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, 3, SIZE, SIZE)}
    with part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for image in images(count, seed):
            file.write(image.astype("<f4", copy=False).tobytes())
    part.replace(path)


def main() -> None:
    """Parse the arguments and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    model = resnet18(args.seed)
    onnx.checker.check_model(model, full_check=True)
    part = args.out_dir / "resnet18.onnx.part"
    onnx.save(model, part)
    part.replace(args.out_dir / "resnet18.onnx")
    write_images(args.out_dir / "calib.npy", args.images, args.seed)


if __name__ == "__main__":
    main()
