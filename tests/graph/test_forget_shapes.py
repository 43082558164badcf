"""Types and shapes of inner values are written only where the input had them."""

from __future__ import annotations

import numpy as np
import onnx
from small_models import build_proto

from onnx_attnround import graph, quantize

NET = """net (float[N, 3, 8, 8] x) => (float[N, 4] y) <float[4, 3, 3, 3] k, float[144, 4] w>
{
    c = Conv(x, k)
    r = Relu(c)
    f = Flatten(r)
    y = Gemm(f, w)
}"""


def inner(model: onnx.ModelProto) -> set[str]:
    return {info.name for info in model.graph.value_info}


def written(model: onnx.ModelProto) -> onnx.ModelProto:
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    result = quantize(model, x, method="nearest")
    return onnx.load_from_string(b"".join(graph.serialised(result.model)))


def test_a_model_that_states_none_gets_none() -> None:
    proto = build_proto(NET)
    assert inner(proto) == set()
    made = written(proto)
    assert inner(made) == set()
    dims = [d.dim_value or d.dim_param for d in made.graph.output[0].type.tensor_type.shape.dim]
    assert dims == ["N", 4]


def test_those_of_the_input_stay() -> None:
    proto = onnx.shape_inference.infer_shapes(build_proto(NET))
    assert inner(proto) == {"c", "r", "f"}
    assert inner(written(proto)) <= {"c", "r", "f"}
    assert "f" in inner(written(proto))
