"""What is quantised, with which spec; and for all else, the reason why not.

Everything is judged here, before any slow work: each weighted node becomes a
``LayerPlan`` or an entry of ``skipped``, and each activation that the target
runs in integer gets a ``QuantSpec``.
"""

from __future__ import annotations

from difflib import get_close_matches

import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, ModelError
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.plan.activations import Activations, is_dilated_pool
from onnx_attnround.plan.dynamic import check_dynamic
from onnx_attnround.plan.layers import find_layers, is_weighted, mark_ends
from onnx_attnround.plan.patterns import chosen, node_names, tensor_names
from onnx_attnround.plan.scale_groups import check_blocks, with_blocks
from onnx_attnround.plan.stored import find_stored
from onnx_attnround.plan.tables import find_tables
from onnx_attnround.plan.weight_range import with_limits
from onnx_attnround.records import QuantPlan, QuantSpec
from onnx_attnround.targets import Target, get_target


def make_plan(model: ir.Model, config: QuantConfig, *, quantise_activations: bool) -> QuantPlan:
    """The plan for ``model``; with ``quantise_activations`` false only weights are quantised.

    Raises ``ModelError`` if no weight can be quantised or the target does not read
    the model's opset, ``ConfigError`` if it does not take the settings or a
    pattern of ``include``, ``exclude``, ``layer_bits`` or ``activation_bits`` matches nothing.
    """
    target = get_target(config.target)
    integer = quantise_activations and config.act_bits < 32
    _check_target(target, model, config, integer_activations=integer)
    _check_patterns(model, config, target)
    layers, skipped = find_layers(model, config, target)
    tables, kept = find_tables(model, config, target)
    stored = find_stored(model, config, target)
    if not layers and not stored:
        reasons = "; ".join(f"{node}: {why}" for node, why in list(skipped.items())[:3])
        raise ModelError(
            "nothing to quantise: the model has no Conv, ConvTranspose, Gemm or MatMul with a "
            f"constant float32 weight that is not excluded ({reasons or 'none found'})"
        )
    marked = mark_ends(model, layers, skipped)
    planned, unblocked = with_blocks(marked, config.block_size, target)
    activations: dict[str, QuantSpec] = {}
    same_range: dict[str, str] = {}
    shared: dict[str, frozenset[str]] = {}
    if integer:
        activations, same_range, shared = Activations(model, marked, target, config).find()
    # What a code may be depends on the activation that it is multiplied with, so this comes last.
    if config.weight_range == "safe":
        planned = with_limits(planned, activations, target)
    return QuantPlan(
        target=target,
        layers=planned,
        activations=activations,
        same_range=same_range,
        shared=shared,
        skipped={node: why for node, why in (skipped | kept).items() if node not in stored},
        unblocked=unblocked,
        tables=tables,
        stored=stored,
    )


def _check_target(
    target: Target, model: ir.Model, config: QuantConfig, *, integer_activations: bool
) -> None:
    bits, storage = config.act_bits, config.weight_storage
    if target.placement == "everything" and not integer_activations:
        raise ConfigError(
            f"target '{target.name}' takes no float activations: give calibration samples "
            "(`calibration`), and `act_bits` of 8 or 16"
        )
    if bits != 32:
        _check_bits(target, bits, "`act_bits`")
    if config.activations == "dynamic" and bits != 32:
        check_dynamic(target, bits)
    if config.block_size is not None:
        check_blocks(config.block_size, target, integer_activations=integer_activations)
    storages = target.storages(blocks=config.block_size is not None)
    if storage is not None and storage not in storages:
        known = ", ".join(storages)
        raise ConfigError(
            f"option `weight_storage`: target '{target.name}' takes {known}, got {storage}"
        )
    if unknown := sorted(target.weighted - WEIGHTED_OPS.keys()):
        raise ConfigError(
            f"target '{target.name}': weighted ops: got {', '.join(unknown)}, expected some of "
            f"{', '.join(WEIGHTED_OPS)}"
        )
    if target.placement == "everything" and (lacking := [*filter(is_dilated_pool, model.graph)]):
        raise ModelError(
            f"node '{lacking[0].name}': target '{target.name}' takes no float activations, and "
            f"there is no integer {lacking[0].op_type} with dilations: choose another `target`"
        )
    opset = model.opset_imports.get("", 0)
    if target.max_opset is not None and opset > target.max_opset:
        raise ModelError(
            f"the model has opset {opset}, target '{target.name}' reads opsets up to "
            f"{target.max_opset}; export it with that opset"
        )


def _check_patterns(model: ir.Model, config: QuantConfig, target: Target) -> None:
    """Raise ``ConfigError`` for a pattern that means nothing here."""
    nodes, tensors = node_names(model), tensor_names(model)
    for option in ("include", "exclude", "layer_bits", "activation_bits"):
        kind, names = ("tensor", tensors) if option == "activation_bits" else ("node", nodes)
        for pattern in getattr(config, option):
            if not chosen([pattern], names):
                near = [f"the nearest is '{name}'" for name in get_close_matches(pattern, names, 1)]
                raise ConfigError(
                    f"option `{option}`: pattern '{pattern}' matches no {kind}; "
                    f"{', '.join([*near, '`make_plan` lists the layers'])}"
                )
    for pattern, bits in config.activation_bits.items():
        _check_bits(target, bits, f"`activation_bits`, '{pattern}'")
    if target.placement == "everything":
        weighted = {node.name or "" for node in model.graph.all_nodes() if is_weighted(node)}
        for pattern in config.exclude:
            if weighted.isdisjoint(chosen([pattern], nodes)):
                raise ConfigError(
                    f"option `exclude`: pattern '{pattern}' matches no node with weights, and "
                    f"target '{target.name}' takes no float activations; give what it computes "
                    "16 bits (`activation_bits`), or choose another `target`"
                )


def _check_bits(target: Target, bits: int, option: str) -> None:
    """Raise ``ConfigError`` for a width of activations that the target does not take."""
    floats = target.placement != "everything"
    if bits in target.activation_bits or (bits == 32 and floats):
        return
    known = ", ".join(map(str, sorted(target.activation_bits)))
    raise ConfigError(
        f"option {option}: target '{target.name}' takes {known}{' or 32 (float)' * floats}, "
        f"got {bits}"
    )
