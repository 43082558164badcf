"""The record of a run as JSON, for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import onnx
import onnxruntime as ort

from onnx_attnround.check import Checked
from onnx_attnround.qdq.arithmetic import range_of
from onnx_attnround.records import BitAllocation, LayerPlan, QuantParams, QuantPlan
from onnx_attnround.report.result import Compared, Point, QuantizeResult
from onnx_attnround.verify import Advice, Verification
from onnx_attnround.version import version

SCHEMA = 1
"""Raised when a key of the report changes its meaning or vanishes."""


def report_dict(result: QuantizeResult) -> dict[str, Any]:
    """All that is known of a run, ready for JSON.

    A figure that does not exist is ``None``, and so is one that is not finite:
    an SQNR without any error, for one. Shares lie between 0 and 1, SQNR is in
    dB, sizes in bytes, ``seconds`` per stage.
    """
    report = {
        "schema": SCHEMA,
        "versions": versions(),
        "config": result.config.model_dump(mode="json"),
        "target": result.plan.target.name,
        "samples": _samples(result),
        "mean_bits": result.allocation.mean_bits,
        "layers": [_layer(result, layer) for layer in result.plan.layers],
        "activations": [_activation(result, *each) for each in result.ranges.params.items()],
        "blocks": [asdict(block) for block in result.blocks],
        "check": _checked(result.checked),
        "skipped": dict(result.plan.skipped),
        "verification": None if result.verification is None else _verified(result.verification),
        "search": None if result.search is None else asdict(result.search),
        "advice": None if result.advice is None else _advice(result.advice),
        "seconds": dict(result.seconds),
        "notes": list(result.notes),
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def text(report: Mapping[str, Any]) -> str:
    """``report`` as JSON."""
    return f"{json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)}\n"


def points_dict(points: Sequence[Point]) -> dict[str, Any]:
    """The points of a trade-off, each with its file, size in bytes, and the report of its run."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "points": [
            {
                "mean_bits": point.config.mean_bits,
                "file": None if point.output is None else str(point.output),
                "bytes": point.size,
                "on_front": point.on_front,
                "gates_missed": point.missed or None,
                "report": report_dict(point.result),
            }
            for point in points
        ],
    }


def plans_dict(
    plans: Sequence[tuple[QuantPlan, BitAllocation]], notes: Sequence[str]
) -> dict[str, Any]:
    """What would be quantised, once for each of several mean bits, and what is noted of it."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "plans": [
            {
                "target": plan.target.name,
                "mean_bits": _finite(allocation.mean_bits),
                "layers": [_planned(layer, allocation) for layer in plan.layers],
                "activations": {name: spec.bits for name, spec in plan.activations.items()},
                "tables": dict(plan.tables),
                "stored": {node: list(names) for node, names in plan.stored.items()},
                "skipped": dict(plan.skipped),
                "without_blocks": dict(plan.unblocked),
            }
            for plan, allocation in plans
        ],
        "notes": list(notes),
    }


def _planned(layer: LayerPlan, allocation: BitAllocation) -> dict[str, Any]:
    return {
        "node": layer.node,
        "op": layer.op_type,
        "weight": layer.weight,
        "shape": list(layer.weight_shape),
        "parameters": layer.parameters,
        "macs": layer.macs,
        "bits": allocation.bits.get(layer.node),
        "coding_length": allocation.coding_length.get(layer.node),
    }


def compared_dict(compared: Compared) -> dict[str, Any]:
    """What a comparison found, layer by layer too; SQNR that is not finite is ``None``."""
    found = compared.found
    report = {
        "schema": SCHEMA,
        "versions": versions(),
        "float_model": compared.names[0],
        "quantised_model": compared.names[1],
        "verification": _verified(found.verification),
        "layers": [asdict(layer) for layer in found.layers],
        "alone": list(found.alone),
        "parts_first_at": None if found.first is None else found.first.node,
        "seconds": dict(compared.seconds),
        "notes": list(compared.notes),
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def versions() -> dict[str, str]:
    """Versions of the package and of the libraries that decide its results."""
    return {
        "onnx_attnround": version(),
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "torch": version("torch"),
    }


def check_dict(checked: Checked) -> dict[str, Any]:
    """What a check found."""
    report = {"schema": SCHEMA, "versions": versions(), "check": _checked(checked)}
    finite: dict[str, Any] = _finite(report)
    return finite


def _layer(result: QuantizeResult, layer: LayerPlan) -> dict[str, Any]:
    rounding = result.roundings.get(layer.node)
    checked, fusion = result.verification, result.checked.fusion
    return {
        **_planned(layer, result.allocation),
        "mse_nearest": None if rounding is None else rounding.mse_nearest,
        "mse_final": None if rounding is None else rounding.mse_final,
        "changed": None if rounding is None else rounding.changed,
        "sqnr_db": None if checked is None else checked.layer_sqnr.get(layer.node),
        "block_size": None if rounding is None else rounding.spec.block_size,
        "runs_in_integer": layer.node in fusion.integer,
        "weight_only_kernel": fusion.weight_only.get(layer.node),
        "in_float_because": fusion.fallen.get(layer.node),
    }


def _advice(advice: Advice) -> dict[str, Any]:
    """The remedies, with the lines of a config that they come to."""
    return {**asdict(advice), "config": advice.block}


def _activation(result: QuantizeResult, tensor: str, params: QuantParams) -> dict[str, Any]:
    """What the codes of a tensor can hold, and what it held on the samples that were fitted to.

    A dynamic range is another in each run.
    """
    stats = result.ranges.stats.get(tensor)
    return {
        "tensor": tensor,
        "bits": params.spec.bits,
        "signed": params.spec.signed,
        "dynamic": params.spec.dynamic,
        "range": None if params.spec.dynamic else list(range_of(params)),
        "observed": None if stats is None else [stats.lo, stats.hi],
        "shares_range_of": result.plan.same_range.get(tensor),
    }


def _samples(result: QuantizeResult) -> dict[str, Any]:
    """How many were fitted to and judged by; of all, the share that was kept apart to judge by."""
    found = result.verification
    judged = 0 if found is None else found.samples
    apart = judged if found is not None and found.basis == "held out" else 0
    total = result.fitted + apart
    return {
        "fitted": result.fitted,
        "judged": judged,
        "held_out_share": apart / total if total else None,
    }


def _verified(verification: Verification) -> dict[str, Any]:
    """The fields, with what follows from them; what is told per layer is left out."""
    fields = asdict(verification)
    del fields["layer_sqnr"]
    fields["held_out"] = verification.held_out
    fields["outputs"] = [
        {**asdict(output), "agreement": output.agreement} for output in verification.outputs
    ]
    if (accuracy := verification.accuracy) is not None:
        fields["accuracy"] |= {
            "float_top1": accuracy.float_top1,
            "quantised_top1": accuracy.quantised_top1,
            "drop_points": accuracy.drop_points,
        }
    return fields


def _checked(checked: Checked) -> dict[str, Any]:
    """The fields, with the share of multiply-accumulates in integer."""
    return {**asdict(checked), "integer_share": checked.fusion.integer_share}


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
