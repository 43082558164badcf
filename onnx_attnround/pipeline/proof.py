"""The last stages: the output is held against its target's rules, and against the float model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from onnx_attnround.check import UNPACKING_OP, Checked, check
from onnx_attnround.context import Run
from onnx_attnround.errors import ModelError, OutputError
from onnx_attnround.pipeline.prepared import Prepared
from onnx_attnround.records import LayerRounding, QuantParams, QuantPlan
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import Samples
from onnx_attnround.verify import (
    Advice,
    Verification,
    advise,
    missed_gates,
    rounded_activations_note,
    verify,
)

CHECKED_SAMPLES = 4
"""The samples that a file is run on when it is checked."""


def checked_output(model: ir.Model, plan: QuantPlan, samples: Samples | None) -> Checked:
    """The output held against its target's rules; raises ``OutputError`` if it is refused."""
    feed = None if samples is None else next(samples.batches(CHECKED_SAMPLES))
    checked = check(model, plan.target, feed)
    if checked.refused:
        advice = _advice(checked.refused[0].node, plan)
        raise OutputError(f"the output {checked.verdict}; {advice}")
    return checked


def _advice(node: str, plan: QuantPlan) -> str:
    """A remedy for a finding on ``node``, which may be one that the writer added."""
    other = "choose another `target`"
    if node.startswith("("):  # the model, or one of its ends
        return f"`exclude` layers, or {other}"
    tensor = node.removesuffix("/quantize").removesuffix("/dequantize")
    if plan.target.placement == "everything" and node not in {one.node for one in plan.layers}:
        return other
    if tensor != node and tensor in plan.activations:
        return f"give '{tensor}' 32 bits, float, in `activation_bits`, or {other}"
    return f"`exclude` that node, or {other}"


def compare(run: Run, prepared: Prepared, quantised: ir.Model) -> Verification | None:
    """The comparison with the float model; without samples, only whether the model loads."""
    given = prepared.given
    if given.judged_on is None:
        open_session(quantised, threads=run.config.threads)
        return None
    return verify(
        _reference(run, given.original, prepared.simplified),
        quantised,
        given.judged_on,
        basis=given.basis,
        labels=given.labels,
        layers=(prepared.simplified, prepared.plan.layers),
        threads=run.config.threads,
        speed_batch=run.config.speed_batch,
        on_event=run.on_event,
    )


def advice(
    run: Run,
    prepared: Prepared,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    verification: Verification | None,
) -> Advice | None:
    """What would help, where a gate was missed or an output has collapsed."""
    samples = prepared.given.judged_on
    if verification is None or samples is None:
        return None
    if not (verification.collapsed or missed_gates(verification, run.config)):
        return None
    with run.stage("advise"):
        return advise(
            prepared.simplified,
            prepared.plan,
            replace(prepared.ranges, params=params),
            roundings,
            samples,
            run.config.threads,
        )


def _reference(run: Run, original: ir.Model, simplified: ir.Model) -> ir.Model:
    """The float model to compare with: the original, if ONNX Runtime has all its kernels."""
    try:
        open_session(original, threads=run.config.threads)
    except ModelError as error:
        run.notes.append(f"compared with the simplified model: {error}")
        return simplified
    return original


def rounded_note(run: Run, prepared: Prepared, quantised: ir.Model, checked: Checked) -> list[str]:
    """A note on activations that the kernel of low-bit weights rounds, if it is at work."""
    samples, kernels = prepared.given.judged_on, checked.fusion.weight_only.values()
    if samples is None or UNPACKING_OP not in kernels:
        return []
    models = prepared.simplified, quantised
    return rounded_activations_note(*models, samples, run.config.threads)
