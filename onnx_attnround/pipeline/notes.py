"""Notes: on layers that did not get what they need or what was asked for, and on a resumed run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from onnx_attnround.calibrate import Calibration
from onnx_attnround.context import Run
from onnx_attnround.ops import matrix_shape
from onnx_attnround.records import LayerPlan, LayerRounding, QuantPlan
from onnx_attnround.verify import Verification

NAMED = 3
"""The nodes that a note tells by name."""

_LINEAR = frozenset({"QuantizeLinear", "DequantizeLinear"})


def few_rows(plan: QuantPlan, ranges: Calibration, samples: int) -> Iterator[str]:
    """A note if layers of ``plan`` are fitted on fewer rows than they have inputs.

    A layer's rounding is fitted on the rows that its weight multiplies: patches of an
    image, tokens of a sentence, but whole samples where a Gemm stands behind a pool. Fewer
    rows than inputs leave directions in which its error was never seen.
    ``ranges`` tell how many elements were seen in ``samples`` samples. Layers of which
    the number of rows is not known are left out.
    """
    found = []
    for layer in plan.layers:
        rows, inputs = _rows(layer, plan, ranges, samples), matrix_shape(layer)[2]
        if rows is not None and rows < inputs:
            found.append((rows / inputs, f"'{layer.node}', {rows} rows for {inputs} inputs"))
    if found:
        several = f"{len(found)} layers are" if len(found) > 1 else "a layer is"
        yield (
            f"{several} fitted on fewer rows (samples, patches, tokens) than inputs: "
            f"{min(found)[1]}; more samples are likely to help"
        )


def _rows(layer: LayerPlan, plan: QuantPlan, ranges: Calibration, samples: int) -> int | None:
    """How many rows the weight of ``layer`` multiplied."""
    if not layer.is_matrix:
        return None if layer.macs is None else samples * layer.macs // layer.parameters
    name = layer.x
    while name in plan.same_range:
        name = plan.same_range[name]
    stats = ranges.stats.get(name)
    return None if stats is None else stats.count // matrix_shape(layer)[2]


def dynamic_note(plan: QuantPlan, gain_db: float) -> str:
    """What ranges that are found in each run mean for whoever runs the file.

    ``gain_db`` is what they take off the error of the outputs, 0 where that is not known.
    """
    layers = [layer for layer in plan.layers if layer.x in plan.dynamic]
    gain = f", which takes {gain_db:.1f} dB off the error of the outputs" if gain_db else ""
    return (
        f"{len(layers)} layers find the range of their input in each run{gain}. It is that of the "
        "whole batch, so that a sample's result depends on the samples beside it; figures are for "
        "one at a time; `activations` = static has ranges that are fixed"
    )


def unblocked(
    plan: QuantPlan, roundings: Mapping[str, LayerRounding], size: int | None
) -> list[str]:
    """Which layers have no blocks of scales, although they were asked for: a note a reason."""
    nodes: dict[str, list[str]] = {}
    for node, rounding in roundings.items():
        if size is not None and rounding.spec.block_size is None:
            nodes.setdefault(plan.unblocked.get(node, "too many bits for them"), []).append(node)
    return [f"no blocks of {size}, {why}: {', '.join(names)}" for why, names in nodes.items()]


def stored_note(plan: QuantPlan) -> Iterator[str]:
    """A note on weights that are integers in the file alone, if there are any."""
    if nodes := list(plan.stored):
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        yield (
            "weights stored in 8 bits and read as floats, in recurrent nodes or in subgraphs: "
            f"{', '.join(nodes[:NAMED])}{more}; `stored_bits` = 32 leaves them as they are"
        )


def taken(run: Run) -> Iterator[str]:
    """A note on the results that an earlier run had left in the work dir."""
    if counts := run.checkpoint.taken:
        found = ", ".join(f"{stage} {count}" for stage, count in counts.items())
        yield f"results taken from '{run.config.work_dir}': {found}"


def larger_note(
    verification: Verification, float_model: ir.Model, quantised: ir.Model
) -> Iterator[str]:
    """A note if the file is larger than the float model, with the content that grew most."""
    before, after = verification.float_bytes, verification.quantised_bytes
    if after <= before:
        return
    old, new = (_contents(*each) for each in ((float_model, before), (quantised, after)))
    most = max(new, key=lambda kind: new[kind] - old[kind])
    yield (
        f"the file is larger than the float model, {after:,} bytes of {before:,}: {most} take "
        f"{new[most]:,} bytes, of {old[most]:,}"
    )


def _contents(model: ir.Model, size: int) -> dict[str, int]:
    """The bytes of a file of ``size`` by what takes them."""
    large = small = 0
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                large += attribute.as_tensor().nbytes
    for graph in model.graphs():
        for value in graph.initializers.values():
            bytes_of = 0 if value.const_value is None else value.const_value.nbytes
            few = any(use.node.op_type in _LINEAR and use.idx > 0 for use in value.uses())
            small, large = small + bytes_of * few, large + bytes_of * (not few)
    return {
        "weights and other constants": large,
        "scales and zero points": small,
        "nodes, and names of constants": size - large - small,
    }
