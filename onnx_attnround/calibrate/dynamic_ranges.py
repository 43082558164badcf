"""Which activations had better find their range in each run.

A range that is found in each run clips nothing and fits small samples as well as large ones; a
fixed one leaves out what is rare. Which is better for the layers that read a tensor is measured,
and so is whether the outputs of the model gain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.calibrate import observed
from onnx_attnround.calibrate.output_error import JUDGED_SAMPLES, RoundedModel
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import tensor_value
from onnx_attnround.ops import weight_matrix
from onnx_attnround.qdq.arithmetic import dequantize, dynamically, quantize
from onnx_attnround.records import Array, LayerPlan, QuantParams, QuantPlan
from onnx_attnround.samples import Samples

WORTH = 0.8
"""The share of the error that may remain; a smaller gain may be chance."""
LEAST_OUTPUTS = 128
"""Products that each element must serve, beside which the search for its range is short."""
MOST_OUTPUTS = 256
"""Outputs of a layer that are judged ..."""
MOST_ROWS = 32
"""... on so many rows of a sample."""

_DB = 10 / math.log(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRanges:
    """Tensors whose range is found in each run, and what the outputs gain by it in dB."""

    tensors: tuple[str, ...] = ()
    gain_db: float = 0.0


def choose_dynamic(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    candidates: Collection[str],
    samples: Samples,
    config: QuantConfig,
) -> DynamicRanges:
    """The ``candidates`` whose layers gain by a range in each run, if the outputs do, too.

    ``params`` are the fixed ranges that they are compared with; they had better come from
    samples other than those that the choice is judged on, ``JUDGED_SAMPLES`` spread over all.
    Samples run one at a time. Raises ``CalibrationError`` where ONNX Runtime fails on them.
    """
    readers = {
        name: [layer for layer in plan.layers if layer.x == name] for name in candidates
    }
    served = [name for name, layers in readers.items() if _outputs(layers) >= LEAST_OUTPUTS]
    alone = samples.at_most(1)
    gaining = _gaining(model, {name: readers[name] for name in served}, params, alone, config)
    if not gaining:
        return DynamicRanges()
    own = plan.own(params)
    fixed = RoundedModel(model, list(own), alone, config).error(own)
    rest = {name: found for name, found in own.items() if name not in gaining}
    found = RoundedModel(model, list(rest), alone, config, dynamic=gaining).error(rest)
    if found - fixed > math.log(WORTH):
        return DynamicRanges()
    return DynamicRanges(tensors=tuple(gaining), gain_db=_DB * (fixed - found))


def _outputs(layers: Sequence[LayerPlan]) -> int:
    """The products that each element of what MatMul ``layers`` read takes part in."""
    return sum(layer.weight_shape[1] for layer in layers)


def _gaining(
    model: ir.Model,
    readers: Mapping[str, Sequence[LayerPlan]],
    params: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> list[str]:
    """The tensors whose readers have less error at their outputs with a range in each run."""
    weights = {name: _weights(model, layers) for name, layers in readers.items()}
    errors = {name: np.zeros(2) for name in readers}
    parted = samples.split(JUDGED_SAMPLES)
    judged = samples if parted is None else parted[1]
    for name, x in observed(model, list(readers), judged, config, "", lambda event: None):
        errors[name] += _errors(x, weights[name], params[name])
    return [name for name, (fixed, found) in errors.items() if found < WORTH * fixed]


def _weights(model: ir.Model, layers: Sequence[LayerPlan]) -> Array:
    """Some rows of the weights of ``layers``, ``[o, d]``."""
    rows = [weight_matrix(layer, tensor_value(model, layer.weight))[0] for layer in layers]
    return np.concatenate([each[:: -(-len(each) // MOST_OUTPUTS)] for each in rows])


def _errors(x: Array, weights: Array, params: QuantParams) -> Array:
    """The squared error of some outputs, with the range of ``params`` and with that of ``x``."""
    spec, scale, zero = params.spec, params.scale, params.zero_point.astype(np.float32)
    rows = x.reshape(-1, x.shape[-1])
    chosen = slice(None, None, -(-len(rows) // MOST_ROWS))
    fixed = dequantize(quantize(rows[chosen], scale, zero, spec.qmin, spec.qmax), scale, zero)
    found = dynamically(rows)[chosen]
    return np.array(
        [np.square((each - rows[chosen]) @ weights.T).sum() for each in (fixed, found)]
    )
