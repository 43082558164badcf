"""What a quantised file is worth: its outputs, the layers that run in integer, its weights."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnx_attnround.check.fusion import INTEGER_OPS
from onnx_attnround.runtime.session import open_session

FLOAT_OPS = frozenset({
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul",
    "FusedMatMul", "MatMulNBits",
})  # fmt: skip
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "QLinearConv": 3}
BATCH = 250


def run_file(path: Path, samples: np.ndarray) -> np.ndarray:
    """The first output of a model with one input, over all samples."""
    session = open_session(path)
    feed, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    batches = (samples[start : start + BATCH] for start in range(0, len(samples), BATCH))
    return np.concatenate([session.run([output], {feed: batch})[0] for batch in batches])


def compare(got: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, share of samples with the float model's top-1, and SQNR of the output in dB."""
    signal = expected.astype(np.float64)
    noise = np.sum((got - signal) ** 2)
    return {
        "top1": float(np.mean(got.argmax(1) == labels)),
        "agreement": float(np.mean(got.argmax(1) == expected.argmax(1))),
        "sqnr_db": float(10 * np.log10(np.sum(signal**2) / noise)) if noise else math.inf,
    }


def inspect(path: Path) -> dict[str, Any]:
    """Layers in integer in ONNX Runtime, layers by the bits of their weights, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, optimised_model=optimised)
        ops = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    integer, left = (sum(ops[op] for op in group) for group in (INTEGER_OPS, FLOAT_OPS))
    bits = Counter(bits_of(values, axis) for values, axis in _weights(path))
    return {
        "integer_layers": integer,
        "layers": integer + left,
        "layers_by_bits": {str(width): bits[width] for width in sorted(bits)},
        "bytes": path.stat().st_size,
    }


def bits_of(weights: np.ndarray, axis: int | None) -> int:
    """The bits that the widest channel of ``weights`` needs; above 8 they are as good as float.

    The step of a channel is taken to be the smallest gap between two of its values, so that this
    is a lower bound, and a tight one wherever two neighbouring codes occur.
    """
    channels = weights.reshape(1, -1)
    if axis is not None:
        channels = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    return max(_channel_bits(channel.astype(np.float64)) for channel in channels)


def _channel_bits(values: np.ndarray) -> int:
    values = np.unique(np.append(values, 0.0))  # zero is on every grid
    gaps = np.diff(values)
    gaps = gaps[gaps > 1e-4 * np.abs(values).max()]
    if not gaps.size:
        return 1
    return math.ceil(math.log2(round((values[-1] - values[0]) / gaps.min()) + 1))


def _weights(path: Path) -> list[tuple[np.ndarray, int]]:
    """The constant weights as the layers see them, each with its channel axis."""
    model = onnx.load(path)
    nodes, constant = _constant_part(model.graph)
    found = [
        (node.input[WEIGHT_INPUT[node.op_type]], _channel_axis(node))
        for node in model.graph.node
        if node.op_type in WEIGHT_INPUT and node.input[WEIGHT_INPUT[node.op_type]] in constant
    ]
    values = _evaluate(model, nodes, sorted({name for name, _ in found}))
    return [(values[name], axis) for name, axis in found]


def _constant_part(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes that depend on no input of the graph, and the names of all that is constant."""
    names, nodes = {tensor.name for tensor in graph.initializer}, []
    for node in graph.node:
        if all(name in names for name in node.input if name):
            names.update(node.output)
            nodes.append(node)
    return nodes, names


def _channel_axis(node: onnx.NodeProto) -> int:
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Gemm":
        return 0 if attributes.get("transB", 0) else 1
    return {"ConvTranspose": 1, "MatMul": -1}.get(node.op_type, 0)


def _evaluate(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], names: list[str]
) -> dict[str, np.ndarray]:
    """The values of constant tensors, computed by ONNX Runtime."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for field in ("node", "input", "output", "value_info"):
        part.graph.ClearField(field)
    part.graph.node.extend(nodes)
    # Behind an Identity, since an initialiser may be no output itself.
    for name in names:
        part.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}#value"]))
        part.graph.output.append(onnx.ValueInfoProto(name=f"{name}#value"))
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, {}), strict=True))
