"""The plan and the ranges of activations, and both once more where some stay float."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_attnround.calibrate import Calibration, calibrate
from onnx_attnround.calibrate.dynamic_ranges import DynamicRanges, choose_dynamic
from onnx_attnround.calibrate.float_tensors import (
    ACCURATE,
    FloatTensors,
    find_float_tensors,
)
from onnx_attnround.calibrate.output_error import JUDGED_SAMPLES, choose_ranges
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
    kept: tuple[FloatTensors, dict[str, QuantParams]] | None = run.checkpoint.get("float")
    if kept is None:
        kept = _float_tensors(model, plan, ranges, samples, config)
        run.checkpoint.put(kept, "float")
    found, params = kept
    if not params:
        return model, plan, ranges, ()
    run.notes.append(found.note)
    return *_without(model, config, found.tensors), replace(ranges, params=params), found.tensors


def _without(
    model: ir.Model, config: QuantConfig, tensors: Collection[str]
) -> tuple[ir.Model, QuantPlan]:
    """Model and plan with these tensors in float."""
    bits = dict.fromkeys(tensors, 32) | config.activation_bits
    changed = config.model_copy(update={"activation_bits": bits})
    return plan_parted(model, changed, quantise_activations=True)


def _float_tensors(
    model: ir.Model, plan: QuantPlan, ranges: Calibration, samples: Samples, config: QuantConfig
) -> tuple[FloatTensors, dict[str, QuantParams]]:
    """Which tensors stay float, and the parameters of the others; none where all are rounded.

    The ranges of the others are chosen again: what stays float now has drowned what they cost.
    """
    none = FloatTensors(), dict[str, QuantParams]()
    if ranges.error < ACCURATE:  # as it was measured while ranges were chosen
        return none
    found = find_float_tensors(model, plan, ranges.params, samples, config)
    if not found.tensors:
        return none
    parted, new = _without(model, config, found.tensors)
    params = _params_of(parted, new, ranges.params)
    if not params or not ranges.extrema:  # the new plan rounds what was not observed, or no choice
        return found, params
    observed, extrema = (
        new.own(_params_of(parted, new, each)) for each in (ranges.observed, ranges.extrema)
    )
    chosen = choose_ranges(parted, observed, extrema, samples, config)
    return found, _params_of(parted, new, chosen.params)


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


def _params_of(
    model: ir.Model, plan: QuantPlan, params: Mapping[str, QuantParams]
) -> dict[str, QuantParams]:
    """The parameters of the activations of ``plan``; none where one was not observed.

    A tensor that has none has those of what it is a copy of, or whose codes it moves.
    """
    makers = {value.name: node for node in model.graph for value in node.outputs}

    def found(name: str) -> QuantParams | None:
        if name in params:
            return params[name]
        if name in plan.same_range:
            return found(plan.same_range[name])
        node = makers.get(name)
        source = node.inputs[0] if node is not None and node.op_type == "Identity" else None
        return None if source is None else found(source.name or "")

    of_all = {name: found(name) for name in plan.activations}
    known = {name: each for name, each in of_all.items() if each is not None}
    return known if len(known) == len(of_all) else {}
