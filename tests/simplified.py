"""What every simplified model must have in common with its original."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from small_models import random_feeds, run

from onnx_attnround import graph
from onnx_attnround.simplify import simplify

NORM = "float[6] gamma, float[6] beta, float[6] mean, float[6] variance"
BATCH_NORM = "BatchNormalization(c, gamma, beta, mean, variance)"


def signature(model: ir.Model) -> list[tuple[str | None, object, str]]:
    return [
        (value.name, value.dtype, str(value.shape))
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.name not in model.graph.initializers
    ]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check(model: ir.Model, *, exact: bool = False) -> tuple[ir.Model, list[str]]:
    """Simplify ``model`` and compare everything that must not change."""
    before = ir.to_proto(model).SerializeToString()
    result, lines = simplify(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert signature(result) == signature(model)
    assert result.metadata_props == model.metadata_props
    assert result.opset_imports == model.opset_imports
    names = [node.name for node in result.graph.all_nodes()]
    assert all(names) and len(set(names)) == len(names)
    onnx.checker.check_model(ir.to_proto(graph.in_memory(result)), full_check=True)
    for seed in (1, 2):
        feeds = random_feeds(model, seed)
        for old, new in zip(run(model, feeds), run(result, feeds), strict=True):
            atol = 0 if exact else 1e-6 * np.abs(old).max()
            np.testing.assert_allclose(new, old, rtol=0 if exact else 1e-5, atol=atol)
    assert not [line for line in lines if "failed" in line]
    return result, lines
