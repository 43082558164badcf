"""The quantised model against the float model, both run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_attnround.records import Array, Event, LayerPlan, OnEvent
from onnx_attnround.runtime.session import ACCURACY_LEVEL, exact_activations
from onnx_attnround.samples import Samples
from onnx_attnround.verify.advice import Advice, advise
from onnx_attnround.verify.collapse import slice_name
from onnx_attnround.verify.compare import (
    LAYER_SAMPLES,
    batches,
    check_labels,
    compare_layers,
    compare_outputs,
    output_sqnr,
)
from onnx_attnround.verify.gates import REMEDY, Gate, check_gates, gates, missed_gates
from onnx_attnround.verify.parting import compare_layer_pairs
from onnx_attnround.verify.results import (
    Accuracy,
    Basis,
    KernelTime,
    Latency,
    LayerPair,
    OutputComparison,
    PairComparison,
    Verification,
)
from onnx_attnround.verify.runs import BATCH, Step
from onnx_attnround.verify.shared import open_comparison
from onnx_attnround.verify.speed import (
    LONGEST,
    float_seconds,
    kernel_times,
    measure_speed,
    serialised_bytes,
    slower_note,
)

__all__ = [
    "LONGEST",
    "REMEDY",
    "Accuracy",
    "Advice",
    "Basis",
    "Gate",
    "KernelTime",
    "Latency",
    "LayerPair",
    "OutputComparison",
    "PairComparison",
    "Verification",
    "advise",
    "check_gates",
    "check_labels",
    "compare_layer_pairs",
    "float_seconds",
    "gates",
    "measure_speed",
    "missed_gates",
    "output_sqnr",
    "rounded_activations_note",
    "slice_name",
    "slower_note",
    "verify",
]

NOTABLE_DB = 0.5
"""A loss of the outputs' SQNR, in dB, that a user would want to know of."""

Layers = tuple[ir.Model, Sequence[LayerPlan]]
"""The planned layers and the simplified model that they are part of.

The output of a layer may have another name or value in the original, where a
BatchNormalization may come behind it.
"""

OUTPUT_SAMPLES = 256
"""The most calibration samples that outputs are compared on."""


def verify(  # noqa: PLR0913, each says one thing of how it is measured
    float_model: ir.Model,
    quantised: ir.Model,
    samples: Samples,
    *,
    basis: Basis = "calibration",
    labels: Array | None = None,
    layers: Layers | None = None,
    threads: int | None = None,
    speed_batch: int = BATCH,
    on_event: OnEvent = lambda event: None,
) -> Verification:
    """Run both models and compare outputs, layers, latency and size.

    Outputs are compared over all ``samples``, but only 256 of those for ``"calibration"``;
    ``labels`` (``[samples.count]``, integers) add top-1, if ``basis`` is ``"evaluation"``.
    ``layers`` are compared over 64 of ``samples``. Latency runs use one thread and
    batches of ``speed_batch``, the others up to ``threads``.

    Raises ``OutputError`` if the quantised model does not load or run, or is not
    finite where the float model is; ``ModelError`` if the float model does not
    run; ``CalibrationError`` if the labels fit neither samples nor outputs.
    """
    check_labels(labels, samples if basis == "evaluation" else None, float_model)
    models = (float_model, quantised)
    limit = OUTPUT_SAMPLES if basis == "calibration" else samples.count
    total = min(samples.count, limit) + min(samples.count, LAYER_SAMPLES) + 1
    step = _stepper(total, on_event)
    comparison = open_comparison(models, threads)
    count, outputs, accuracy = compare_outputs(
        comparison.run,
        batches(samples, BATCH, limit),
        float_model,
        labels,
        step,
    )
    apart, notes = dict(comparison.apart), tuple(comparison.notes())
    del comparison  # which holds sessions of both models, and so does what follows
    simplified, planned = layers or (float_model, ())
    layer_sqnr = compare_layers((simplified, quantised), planned, samples, threads, step)
    latency = measure_speed(models, samples, speed_batch)
    kernels = kernel_times(models, samples, latency.batch)
    step("latency", total)
    return Verification(
        samples=count,
        basis=basis,
        outputs=tuple(
            sums.result()
            for name, sums in outputs.items()
            if sums.comparable and name not in apart
        ),
        accuracy=accuracy,
        layer_sqnr=layer_sqnr,
        not_compared=(
            *apart,
            *(name for name, sums in outputs.items() if not sums.comparable),
            *(layer.node for layer in planned if layer.node not in layer_sqnr),
        ),
        notes=notes,
        latency=latency,
        kernels=kernels,
        float_bytes=serialised_bytes(float_model),
        quantised_bytes=serialised_bytes(quantised),
    )


def rounded_activations_note(
    float_model: ir.Model, quantised: ir.Model, samples: Samples, threads: int | None
) -> list[str]:
    """A note if ONNX Runtime's rounding of float activations costs more than ``NOTABLE_DB``.

    For files with MatMulNBits, by the worst float output over the first samples.
    """
    usual = output_sqnr(float_model, quantised, samples, threads, limit=LAYER_SAMPLES)
    with exact_activations():
        exact = output_sqnr(float_model, quantised, samples, threads, limit=LAYER_SAMPLES)
    if exact - usual <= NOTABLE_DB:
        return []
    return [
        "MatMulNBits rounds float activations to 8 bits, in blocks along the inputs, of which "
        f"small ones beside large ones are lost: {usual:.1f} dB where it is {exact:.1f} dB with "
        f"the session option {ACCURACY_LEVEL} set to 1; set that where the file is run"
    ]


def _stepper(total: int, on_event: OnEvent) -> Step:
    done = 0

    def step(detail: str, count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        on_event(Event(stage="verify", done=done, total=total, detail=detail))

    return step
