"""What is in a model, float or quantised, and what targets would take or refuse of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import onnx_ir as ir

from onnx_attnround.check import findings
from onnx_attnround.check.versions import oldest_onnxruntime
from onnx_attnround.check.view import View, constant
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import AttnRoundError
from onnx_attnround.graph.constants import constants
from onnx_attnround.pipeline.activations import plan_parted
from onnx_attnround.pipeline.open_model import ModelSource, open_model
from onnx_attnround.report.inspected import Inspection, Stored, Taken
from onnx_attnround.simplify import simplify
from onnx_attnround.targets import TARGETS, Target, get_target

_LINKS = ("QuantizeLinear", "DequantizeLinear")


def inspect_model(
    model: ModelSource, targets: Sequence[str | Target] | None = None
) -> Inspection:
    """What ``model`` holds, and what each of ``targets``, by default all known, makes of it.

    Nothing is run. Raises ``ModelError`` if it cannot be read.
    """
    loaded = open_model(model)
    ops = Counter(node.op_type for node in loaded.graph.all_nodes())
    quantised = any(op in ops for op in _LINKS)
    view = View(loaded, TARGETS["ort"])
    chosen = [get_target(each) for each in (TARGETS if targets is None else targets)]
    judged = _judged if quantised else _planned
    return Inspection(
        producer=" ".join(filter(None, (loaded.producer_name, loaded.producer_version))),
        ir_version=loaded.ir_version,
        opsets=dict(loaded.opset_imports),
        inputs={value.name or "": _end(value) for value in loaded.graph.inputs},
        outputs={value.name or "": _end(value) for value in loaded.graph.outputs},
        ops=dict(ops.most_common()),
        stored=_stored(loaded),
        weights=_weights(view),
        quantised=quantised,
        oldest_onnxruntime=oldest_onnxruntime(view),
        taken=tuple(judged(loaded, target) for target in chosen),
    )


def _end(value: ir.Value) -> str:
    """Type and shape, ``FLOAT [batch, 3, 8, 8]`` for one."""
    kind = "?" if value.dtype is None else value.dtype.name
    if value.shape is None:
        return f"{kind} of unknown shape"
    sizes = [str(size) if isinstance(size, int) else size.value or "?" for size in value.shape]
    return f"{kind} [{', '.join(sizes)}]"


def _stored(model: ir.Model) -> dict[str, Stored]:
    found: dict[str, list[ir.TensorProtocol]] = defaultdict(list)
    for _, tensor in constants(model):
        found[tensor.dtype.name].append(tensor)
    return {
        kind: Stored(
            tensors=len(tensors),
            elements=sum(tensor.size for tensor in tensors),
            bytes=sum(tensor.nbytes for tensor in tensors),
        )
        for kind, tensors in found.items()
    }


def _weights(view: View) -> dict[str, int]:
    """Elements of the weights of layers by the type that they are stored in."""
    tensors = {id(tensor): tensor for layer in view.layers if (tensor := _weight(layer.node))}
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype.name] += tensor.size
    return dict(counts)


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant that a layer's weight comes from, also one that is unpacked or turned."""
    value = node.inputs[1]
    while value is not None and constant(value) is None:
        made = value.producer()
        value = None if made is None else made.inputs[0]
    return constant(value)


def _planned(model: ir.Model, target: Target) -> Taken:
    """What a run for ``target`` with samples and no other settings would quantise."""
    try:
        simplified, _ = simplify(model)
        config = QuantConfig(target=target)
        _, plan = plan_parted(simplified, config, quantise_activations=True)
    except AttnRoundError as error:
        return _nothing(target, str(error))
    return Taken(
        target=target.name,
        layers=len(plan.layers),
        weights=sum(layer.parameters for layer in plan.layers),
        activations=len(plan.activations),
        left=dict(Counter(plan.skipped.values()).most_common()),
        refused="",
    )


def _judged(model: ir.Model, target: Target) -> Taken:
    """The rules of ``target`` that a quantised model breaks, and its layers that are quantised."""
    view = View(model, target)
    found = findings(view)
    refused = [finding for finding in found if finding.refused]
    quantised = [layer for layer in view.layers if layer.quantised]
    return Taken(
        target=target.name,
        layers=len(quantised),
        weights=sum(weight.size for layer in quantised if (weight := _weight(layer.node))),
        activations=len({link.tensor for link in view.links if link.stored is None}),
        left=dict(Counter(finding.rule for finding in found).most_common()),
        refused=f"{refused[0].rule} at {refused[0].node}: {refused[0].why}" if refused else "",
    )


def _nothing(target: Target, why: str) -> Taken:
    return Taken(target=target.name, layers=0, weights=0, activations=0, left={}, refused=why)
