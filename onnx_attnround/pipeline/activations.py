"""The plan and the ranges of activations, and both once more where some stay float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_attnround.calibrate import Calibration, calibrate
from onnx_attnround.calibrate.dynamic_ranges import DynamicRanges, choose_dynamic
from onnx_attnround.calibrate.float_tensors import (
    ACCURATE,
    FloatTensors,
    find_float_tensors,
)
from onnx_attnround.calibrate.output_error import JUDGED_SAMPLES
from onnx_attnround.checkpoint import TAKEN
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.pipeline.notes import dynamic_note
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.dynamic import can_be_dynamic, with_dynamic
from onnx_attnround.plan.products import as_products
from onnx_attnround.plan.split_inputs import part_floats, part_layers
from onnx_attnround.records import Event, QuantParams, QuantPlan
from onnx_attnround.samples import Samples


def plan_parted(
    model: ir.Model, config: QuantConfig, *, quantise_activations: bool
) -> tuple[ir.Model, QuantPlan]:
    """The plan, and the model that it is for, whose layers may read tensors of their own."""
    plan = make_plan(model, config, quantise_activations=quantise_activations)
    for part in (as_products, part_layers, part_floats):
        parted = part(model, plan, config)
        if parted is not model:
            model, plan = parted, make_plan(parted, config, quantise_activations=True)
    return model, plan


def ranges_of(
    run: Run,
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples | None,
    observers: Mapping[str, str],
) -> Calibration:
    """The ranges of the activations, observed or from the checkpoint; none without samples.

    ``observers`` has the observer of each tensor that is not given the config's.
    """
    if samples is None:
        return Calibration(stats={}, params={})
    kept: Calibration | None = run.checkpoint.get("calibrate")
    if kept is not None:
        count, detail = samples.count, f"samples{TAKEN}"
        run.on_event(Event(stage="calibrate", done=count, total=count, detail=detail))
        return kept
    found = calibrate(
        model,
        plan.activations,
        samples,
        run.config,
        same_range=plan.same_range,
        on_event=run.on_event,
        observers=observers,
    )
    run.checkpoint.put(found, "calibrate")
    return found


def with_float_tensors(
    run: Run, model: ir.Model, plan: QuantPlan, ranges: Calibration, samples: Samples | None
) -> tuple[ir.Model, QuantPlan, Calibration, tuple[str, ...]]:
    """Model, plan and ranges once more, where some activations had better stay float: which."""
    config = run.config
    floats = plan.target.placement != "everything"
    if samples is None or config.float_tensors == "never" or config.act_bits != 8 or not floats:
        return model, plan, ranges, ()
    found: FloatTensors | None = run.checkpoint.get("float")
    if found is None:
        accurate = ranges.error < ACCURATE  # as it was measured while ranges were chosen
        found = FloatTensors()
        if not accurate:
            found = find_float_tensors(model, plan, ranges.params, samples, config)
        run.checkpoint.put(found, "float")
    if not found.tensors:
        return model, plan, ranges, ()
    bits = dict.fromkeys(found.tensors, 32) | config.activation_bits
    changed = config.model_copy(update={"activation_bits": bits})
    parted, new = plan_parted(model, changed, quantise_activations=True)
    kept = {name: _params_of(parted, name, ranges) for name in new.activations}
    if None in kept.values():  # the new plan rounds what was not observed
        return model, plan, ranges, ()
    run.notes.append(found.note)
    params = {name: params for name, params in kept.items() if params is not None}
    return parted, new, replace(ranges, params=params), found.tensors


def with_dynamic_ranges(
    run: Run,
    model: ir.Model,
    plan: QuantPlan,
    ranges: Calibration,
    samples: Samples | None,
    observers: Mapping[str, str],
) -> tuple[QuantPlan, Calibration]:
    """Plan and ranges once more, where some activations have a range in each run.

    ``observers`` as :func:`ranges_of` takes them.
    """
    if samples is None or run.config.activations == "static":
        return plan, ranges
    found = DynamicRanges(tensors=can_be_dynamic(model, plan))
    if found.tensors and run.config.activations == "auto":
        found = _chosen(run, model, plan, found.tensors, samples, observers)
    if not found.tensors:
        return plan, ranges
    plan = with_dynamic(plan, found.tensors)
    params = {
        name: replace(kept, spec=plan.activations[name]) for name, kept in ranges.params.items()
    }
    run.notes.append(dynamic_note(plan, found.gain_db))
    return plan, replace(ranges, params=params)


def _chosen(
    run: Run,
    model: ir.Model,
    plan: QuantPlan,
    candidates: Sequence[str],
    samples: Samples,
    observers: Mapping[str, str],
) -> DynamicRanges:
    """Which of the ``candidates`` had better be dynamic, measured or from the checkpoint.

    They are compared with the fixed ranges that samples have which they are not judged on.
    """
    kept: DynamicRanges | None = run.checkpoint.get("dynamic")
    if kept is not None:
        return kept
    parted = samples.split(JUDGED_SAMPLES)
    fixed = calibrate(
        model,
        plan.activations,
        samples if parted is None else parted[0],
        run.config,
        same_range=plan.same_range,
        on_event=run.on_event,
        observers=observers,
    )
    found = choose_dynamic(model, plan, fixed.params, candidates, samples, run.config)
    run.checkpoint.put(found, "dynamic")
    return found


def _params_of(model: ir.Model, name: str, ranges: Calibration) -> QuantParams | None:
    """The parameters of a tensor, or of what an Identity makes it from."""
    found = ranges.params.get(name)
    if found is not None:
        return found
    made = next((node for node in model.graph if name in (v.name for v in node.outputs)), None)
    if made is None or made.op_type != "Identity" or made.inputs[0] is None:
        return None
    return _params_of(model, made.inputs[0].name or "", ranges)
