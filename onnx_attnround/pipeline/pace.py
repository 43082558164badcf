"""Codes of activations must buy time: no file for ONNX Runtime is slower than the float model.

Integer kernels are not always the faster ones: depthwise layers of odd widths, floats between
layers that go to codes and back, nodes too small for what they cost to start. The file is made with
weights rounded to nearest, before anything slow begins, and timed against the float model, which is
as simplified as itself. Where it gains nothing at any batch, or loses at one, a file with quantised
weights alone is timed too. It is as small and closer to float, so it is what is made unless integer
activations are faster than that.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from onnx_attnround import qdq
from onnx_attnround.calibrate import Calibration
from onnx_attnround.context import Run
from onnx_attnround.errors import AttnRoundError
from onnx_attnround.pipeline.activations import plan_parted
from onnx_attnround.records import BitAllocation, QuantPlan
from onnx_attnround.samples import Samples
from onnx_attnround.verify import LONGEST, Latency, float_seconds, measure_speed
from onnx_attnround.verify.runs import sample_count

LEAST_SECONDS = 2e-4
"""Of a float run of one sample: below, what a run costs to start and noise decide, not kernels."""

MARGIN = 0.03
"""So much faster must a file be with integer activations, for what they cost in accuracy."""

Variant = tuple[ir.Model, QuantPlan, Calibration]


def with_pace(run: Run, variant: Variant, samples: Samples | None) -> Variant:
    """``variant``: model, plan and ranges, or the same with float activations if that is faster.

    It is held against its own model in float, simplified as it is. Nothing is timed that runs
    in another runtime or on another CPU, nor where float activations are no choice.
    """
    config, plan = run.config, variant[1]
    here = plan.target.runtime == "onnxruntime" and not plan.target.activation_signed
    asked = config.keep_integer or config.act_bits != 8
    if samples is None or asked or not here or not plan.activations:
        return variant
    kept: dict[str, str] | None = run.checkpoint.get("pace")
    if kept is None:
        kept = _judged(run, variant, samples)
        run.checkpoint.put(kept, "pace")
    if kept["note"]:
        run.notes.append(kept["note"])
    return _in_float(run, variant) if kept["activations"] == "float" else variant


def _judged(run: Run, variant: Variant, samples: Samples) -> dict[str, str]:
    """Whether activations are ``integer`` or ``float`` in the end, and a note if there is need."""
    model, integer = variant[0], {"activations": "integer", "note": ""}
    try:
        seconds = float_seconds(model, samples)
        if seconds < LEAST_SECONDS:
            return integer
        batches = _batches(run, samples, seconds)
        as_planned = _timed(model, variant, samples, batches)
        gains = any(latency.faster_than(1 + MARGIN) for latency in as_planned)
        if gains and not any(latency.slower for latency in as_planned):
            return integer
        alone = _timed(model, _in_float(run, variant), samples, batches)
    except AttnRoundError:  # a file that does not run: the check says so, and what helps
        return integer
    told = f"in integer the file runs at {_told(as_planned)} times the speed of the same in float"
    if min(_speeds(as_planned)) > (1 + MARGIN) * min(_speeds(alone)):
        if not any(latency.slower for latency in as_planned):
            return integer
        return integer | {
            "note": f"{told}, and with quantised weights alone at {_told(alone)} times: "
            "it stays in integer; `act_bits` 32 leaves activations float"
        }
    return {
        "activations": "float",
        "note": f"activations stay float: {told}, with quantised weights alone at {_told(alone)} "
        "times; `keep_integer` quantises them all the same",
    }


def _batches(run: Run, samples: Samples, seconds: float) -> list[int]:
    """The batches to time, as far as the samples make them, given the time of a single one."""
    wide = run.config.speed_batch
    if wide == 1 or wide * seconds > LONGEST or sample_count(next(samples.batches(wide))) == 1:
        return [1]
    return [1, wide]


def _in_float(run: Run, variant: Variant) -> Variant:
    """The same with quantised weights alone, unpacked once: as fast as the float model.

    MatMulNBits, which multiplies by low-bit weights, is slower than that but for few rows.
    """
    model, _, ranges = variant
    config = run.config.model_copy(update={"act_bits": 32, "activation_bits": {}})
    model, plan = plan_parted(model, config, quantise_activations=True)
    return model, replace(plan, unpacked=True), replace(ranges, params={})


def _timed(
    reference: ir.Model, variant: Variant, samples: Samples, batches: list[int]
) -> list[Latency]:
    """The latency of the file of ``variant``; its speed does not depend on the codes."""
    from onnx_attnround.reconstruct.layerwise import round_plain  # with torch: takes a second

    model, plan, ranges = variant
    bits = {layer.node: layer.weight_spec.bits for layer in plan.layers}
    allocation = BitAllocation(bits=bits, coding_length={}, mean_bits=8.0)
    rounded = round_plain(model, plan, ranges.params, allocation)
    storage = plan.target.storages(blocks=False)[0]
    made = qdq.insert(model, plan, ranges.params, rounded, storage)
    qdq.fold_weights(made, plan)
    return [measure_speed((reference, made), samples, batch) for batch in batches]


def _speeds(found: list[Latency]) -> list[float]:
    return [latency.speedup for latency in found]


def _told(found: list[Latency]) -> str:
    return " and ".join(f"{each.speedup:.2f} (batch {each.batch})" for each in found)
