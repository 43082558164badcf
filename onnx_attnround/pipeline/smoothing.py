"""The stage in which range moves from activations to weights, and what the work dir keeps of it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnx_attnround.context import Run
from onnx_attnround.plan import make_plan
from onnx_attnround.records import QuantPlan, Smoothing
from onnx_attnround.samples import Samples


def smooth_model(
    run: Run, model: ir.Model, plan: QuantPlan, samples: Samples | None
) -> tuple[ir.Model, QuantPlan, Mapping[str, str]]:
    """The smoothed model, its plan, and the observers of tensors that need another than usual.

    Without samples, or where the config turns it off, ``model`` and ``plan`` themselves.
    """
    if samples is None or run.config.smooth == "never":
        return model, plan, {}
    from onnx_attnround.smooth import find_smoothing, smoothed  # with torch: takes a second

    with run.stage("smooth"):
        found: Mapping[str, Smoothing] | None = run.checkpoint.get("smooth")
        if found is None:
            found = find_smoothing(model, plan, samples, run.config, run.on_event)
            run.checkpoint.put(found, "smooth")
        result, observers = smoothed(model, plan, found)
        plan = make_plan(result, run.config, quantise_activations=True)
    return result, plan, observers
