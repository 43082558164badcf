"""Simplification: fewer nodes, constants where constants can be, the same numbers out.

onnxsim folds what is constant and fuses. Before and after it run passes that
tidy the graph, and folds of our own: into weights, in float64, and under the
old names. A pass edits a model in place and returns the number of nodes
that it folded or removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import onnx
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.simplify.affine import fold_affine
from onnx_attnround.simplify.batch_norm import fold_batch_norm
from onnx_attnround.simplify.gemm_scale import fold_gemm_scale
from onnx_attnround.simplify.hard_sigmoid import (
    expand_hard_swish,
    fold_hard_sigmoid,
    fold_layer_hard_sigmoid,
)
from onnx_attnround.simplify.layer_bias import give_own_bias
from onnx_attnround.simplify.matmul_bias import fold_matmul_bias
from onnx_attnround.simplify.moved_constants import fold_moved_constants
from onnx_attnround.simplify.onnxsim_pass import run_onnxsim
from onnx_attnround.simplify.tidy import (
    drop_defaults,
    drop_identities,
    drop_stale_shapes,
    drop_unused,
    freeze_inputs,
    inline_functions,
    lift_constants,
    sort_nodes,
)
from onnx_attnround.simplify.widen import widen_half

__all__ = ["simplify"]

_PREPARE: dict[str, Callable[[ir.Model], int]] = {
    "inline-functions": inline_functions,
    "freeze-inputs": freeze_inputs,
    "drop-stale-shapes": drop_stale_shapes,
    "widen-half": widen_half,
}
_PASSES: dict[str, Callable[[ir.Model], int]] = {
    "lift-constants": lift_constants,
    "drop-identities": drop_identities,
    "drop-defaults": drop_defaults,
    "fold-moved-constants": fold_moved_constants,
    "fold-matmul-bias": fold_matmul_bias,
    "fold-gemm-scale": fold_gemm_scale,
    "fold-batch-norm": fold_batch_norm,
    "expand-hard-swish": expand_hard_swish,
    "fold-hard-sigmoid": fold_hard_sigmoid,
    "fold-layer-hard-sigmoid": fold_layer_hard_sigmoid,
    "fold-affine": fold_affine,
    "give-own-bias": give_own_bias,
    "drop-unused": drop_unused,
    "sort-nodes": sort_nodes,
}


def simplify(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """An equivalent model with fewer nodes, and a line on each pass that had work or failed.

    Inputs and outputs keep names, types and dimensions; inputs with a default
    value become constants. Subgraphs are tidied; nothing in them is folded but moved constants.

    Raises:
        ModelError: a function of the model cannot be inlined.
    """
    counts: Counter[str] = Counter()
    result = model.clone()
    _run(_PREPARE, result, counts)
    prepared = result.clone()
    _run(_PASSES, result, counts)
    if any(value.shape is None for value in result.graph.outputs):
        result, _ = _infer_shapes(result)  # onnxsim wants a shape of every output
    result, note = run_onnxsim(result)
    _run(_PASSES, result, counts)
    result, failure = _infer_shapes(result)
    graph.copy_signature(prepared, result)
    graph.name_nodes(result)
    done = [f"{name}: {number} nodes" for name, number in counts.items() if number]
    return result, [*done, *filter(None, (note, failure))]


def _run(
    passes: dict[str, Callable[[ir.Model], int]], model: ir.Model, counts: Counter[str]
) -> None:
    for name, edit in passes.items():
        counts[name] += edit(model)


def _infer_shapes(model: ir.Model) -> tuple[ir.Model, str]:
    """The model with the types and shapes of all values that onnx can derive, or why not."""
    infer = partial(onnx.shape_inference.infer_shapes, data_prop=True)
    try:
        return graph.through_proto(model, infer), ""
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        return model, f"infer-shapes: failed ({graph.reason(error)})"
