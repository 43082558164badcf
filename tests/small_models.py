"""Small models from ONNX text, and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround import graph


def build_proto(text: str, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """A checked model; values that are declared but not computed get random constants."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "own" : 1]>\n'
    proto = onnx.parser.parse_model(head + text)
    rng = np.random.default_rng(0)
    computed = {name for node in proto.graph.node for name in node.output}
    computed |= {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.value_info:
        if info.name not in computed:
            shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            data = rng.normal(size=shape).astype(np.float32)
            data = np.abs(data) + 0.1 if info.name == "variance" else data
            proto.graph.initializer.append(onnx.numpy_helper.from_array(data, info.name))
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    return proto


def build(text: str, opset: int = 17, ir_version: int = 8) -> ir.Model:
    """The same in memory, with a name for each node."""
    model = ir.from_proto(build_proto(text, opset, ir_version))
    graph.name_nodes(model)
    return model


def random_feeds(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    """Normal noise for each input, dynamic dimensions 2."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in graph.input_specs(model):
        data = np.asarray(rng.normal(size=[dim or 2 for dim in spec.shape]))
        feeds[spec.name] = np.asarray(data > 0 if spec.dtype == bool else data, spec.dtype)
    return feeds


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, without ONNX Runtime's own optimiser."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(graph.in_memory(model)).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)
