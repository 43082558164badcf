"""The memory that a run takes, by estimate, and the settings that a limit has room for.

Counted are the libraries, constants that do not stay in files, the codes of all layers,
the sessions on both models, and the layer whose rounding takes most. What can give way
are the samples run at a time and the activations kept between layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.graph import input_specs
from onnx_attnround.graph.constants import constants
from onnx_attnround.ops import matrix_shape
from onnx_attnround.plan.bits import measures, moves_wide
from onnx_attnround.records import LayerPlan, QuantPlan
from onnx_attnround.samples import Samples

LIBRARIES = 350 << 20
"""The bytes that Python takes with PyTorch, ONNX Runtime and onnx."""

SLACK = 1.15
"""The ratio of the bytes that allocators hold to those that they were asked for."""

WEIGHT_COPIES = 7
"""The tensors of the size of a layer's weight that are alive while it is rounded."""

PART_COPIES = 14
"""The tensors of the size of the part of it that is rounded at a time."""

GRAM_COPIES = 7
"""The tensors of the size of its Gram matrix."""

PATCH_COPIES = 5
"""The tensors of the size of a batch's patches."""

FLOAT = 4
"""The bytes of a float32."""


def within_limit(
    limit: int,
    config: QuantConfig,
    models: tuple[ir.Model, ir.Model],
    plan: QuantPlan,
    samples: Samples | None,
) -> QuantConfig:
    """``config`` with no more samples at a time, and activations kept, than ``limit`` has room for.

    ``limit`` is in bytes, for the whole process. ``models`` are the original and the
    simplified one, which ``plan`` is for; ``samples`` those that they run on. Raises
    ``ConfigError`` if even one sample at a time is too much, by this estimate.
    """
    if config.reconstruct == "block":
        raise ConfigError(
            "option `memory_limit`: it does not hold for blocks; leave one of `memory_limit` and "
            "`reconstruct` out"
        )
    original, simplified = models
    count = None if samples is None else samples.count
    measured = measures(config) or moves_wide(plan.layers, config)
    fixed = _fixed(original, simplified, plan, count, measured=measured)
    sample = 0 if count is None else _per_sample(simplified, plan, count)
    fewest = max((spec.shape[0] or 1 for spec in input_specs(original) if spec.shape), default=1)
    least = int(SLACK * (fixed + 2 * fewest * sample))
    if limit < least:
        raise ConfigError(
            f"option `memory_limit`: got {_told(limit)}, and this model needs about "
            f"{_told(least)}, the libraries included: give more{_remedy(samples)}"
        )
    room = int(limit / SLACK) - fixed
    return config.model_copy(
        update={
            "batch_size": max(1, min(config.batch_size, room // 2 // max(sample, 1))),
            "activation_memory_mb": max(1, min(config.activation_memory_mb, room >> 22)),
        }
    )


def _remedy(samples: Samples | None) -> str:
    return "" if samples is None else ", or no samples, which leaves out runs of the float model"


def _told(size: int) -> str:
    return f"{math.ceil(size / 1e6)}MB"


def _fixed(
    original: ir.Model,
    simplified: ir.Model,
    plan: QuantPlan,
    count: int | None,
    *,
    measured: bool,
) -> int:
    """Bytes that no choice lowers: the most that any stage takes.

    Where layers are ``measured``, the float model stays at hand while they are rounded.
    """
    held = {
        id(tensor): tensor.nbytes
        for model in (original, simplified)
        for _, tensor in constants(model)
        if not isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
    }
    codes = sum(layer.parameters for layer in plan.layers)
    whole = sum(tensor.nbytes for _, tensor in constants(simplified))
    rounding = max(_rounding(layer, count) for layer in plan.layers)
    largest = FLOAT * max(layer.parameters for layer in plan.layers)
    running = codes + 2 * largest  # the quantised model, dequantised layer by layer
    verifying = running if count is None else running + whole
    most = max(rounding + whole * measured, verifying)
    return LIBRARIES + sum(held.values()) + codes + most


def _rounding(layer: LayerPlan, count: int | None) -> int:
    """Bytes that the rounding of one layer takes, whatever the batch."""
    from onnx_attnround.rounding.methods import MOST_WEIGHTS
    from onnx_attnround.rounding.moments import WIDE, WIDE_PATCHES  # with torch: takes a second

    groups, _, depth = matrix_shape(layer)
    values = WEIGHT_COPIES * layer.parameters
    values += PART_COPIES * min(layer.parameters, MOST_WEIGHTS)
    if count is not None and depth > WIDE:
        values += 3 * groups * depth * max(WIDE_PATCHES, count)
    elif count is not None:
        values += GRAM_COPIES * groups * depth * depth
    return FLOAT * values


def _per_sample(model: ir.Model, plan: QuantPlan, count: int) -> int:
    """Bytes that one sample more in a batch takes: all activations, in both models, and patches."""
    values = {value.name or "": value for node in model.graph for value in node.outputs}
    sizes = {name: _elements(value) for name, value in values.items()}
    patches = max(_patches(layer, sizes, count) for layer in plan.layers)
    return FLOAT * (2 * sum(sizes.values()) + patches)


def _patches(layer: LayerPlan, sizes: Mapping[str, int], count: int) -> int:
    """Elements of the patches of one sample that are looked at together."""
    from onnx_attnround.rounding.moments import wanted_patches

    groups, outputs, depth = matrix_shape(layer)
    positions = max(sizes.get(layer.y, 0) // max(groups * outputs, 1), 1)
    wanted = math.ceil(wanted_patches(depth) / count)
    return PATCH_COPIES * min(wanted, positions) * groups * depth


def _elements(value: ir.Value) -> int:
    """Elements of a tensor for one sample; unknown dimensions count as 1."""
    sizes = [] if value.shape is None else [d for d in list(value.shape)[1:] if isinstance(d, int)]
    return math.prod(sizes)
