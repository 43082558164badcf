"""A float model beside a quantised file of any make: what was lost, where, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.errors import CalibrationError, ModelError
from onnx_attnround.pipeline.log import logged
from onnx_attnround.pipeline.open_inputs import open_evaluation
from onnx_attnround.pipeline.open_model import ModelSource, open_model, source_of
from onnx_attnround.records import OnEvent
from onnx_attnround.report.result import Compared
from onnx_attnround.samples.preprocess import Preprocess, Transform
from onnx_attnround.verify import (
    PairComparison,
    check_labels,
    compare_layer_pairs,
    verify,
)


def compare(
    float_model: ModelSource,
    quantised: ModelSource,
    evaluation: object,
    config: QuantConfig | Mapping[str, Any] | None = None,
    *,
    preprocess: Preprocess | str | Transform | None = None,
    on_event: OnEvent = lambda event: None,
    **settings: Any,
) -> Compared:
    """Hold a quantised file of any make (Q/DQ, operators on codes, dynamic) against its model.

    Outputs and their slices, size and speed are compared as :func:`quantize` compares them, on
    the samples of ``evaluation``, in the forms that it takes; then each layer that both have.
    Of ``settings``, ``threads`` and ``custom_op_library`` count.

    Raises ``ModelError`` for a model that cannot be read or whose inputs or outputs are
    others, ``CalibrationError`` for samples that do not fit, ``OutputError`` if the file does not
    run.
    """
    config = QuantConfig.of(config, **settings)
    run = Run(config, logged(on_event))
    with run.stage("load"):
        original = open_model(float_model)
        file = _aligned(original, open_model(quantised))
        samples, labels = open_evaluation(evaluation, original, preprocess, run.notes)
        check_labels(labels, samples, original)
    if samples is None:
        raise CalibrationError("there are no samples to compare on: give `evaluation`")
    with run.stage("verify"):
        whole = verify(
            original, file, samples, basis="evaluation", labels=labels, threads=config.threads,
            on_event=run.on_event,
        )  # fmt: skip
    with run.stage("layers"):
        layers, alone = compare_layer_pairs((original, file), samples, config.threads)
    return Compared(
        names=(_name(float_model, original), _name(quantised, file)),
        found=PairComparison(verification=whole, layers=layers, alone=alone),
        notes=(*run.notes, *whole.notes),
        seconds=run.seconds,
    )


def _aligned(original: ir.Model, quantised: ir.Model) -> ir.Model:
    """The quantised model, its outputs by the names of the float model's, which are as many.

    Raises ``ModelError`` where inputs or outputs cannot be those of one model.
    """
    wanted, found = ({spec.name for spec in graph.input_specs(m)} for m in (original, quantised))
    if wanted != found:
        raise ModelError(
            f"the quantised file has the inputs {', '.join(sorted(found))}, the float model "
            f"{', '.join(sorted(wanted))}; give the two files of one model"
        )
    names = [value.name for value in original.graph.outputs]
    others = [value.name for value in quantised.graph.outputs]
    if len(names) != len(others):
        raise ModelError(
            f"the quantised file has {len(others)} outputs, the float model {len(names)}; give the "
            "two files of one model"
        )
    if set(names) == set(others):
        return quantised
    copy = quantised.clone()
    taken = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    for name, value in zip(names, copy.graph.outputs, strict=True):
        if name in taken and taken[name] is not value:
            taken[name].name = f"{name}/inner"
        value.name = name
    return copy


def _name(given: ModelSource, model: ir.Model) -> str:
    source = source_of(given)
    return (model.graph.name or "model in memory") if source is None else source.name
