"""Rules as data: what a rule is, what it finds, and those that every runtime has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.check.view import DEQUANTISE, DYNAMIC, QUANTISE, View, constant
from onnx_attnround.graph import attributes_of
from onnx_attnround.ops import WEIGHTED_OPS

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_ON_INTEGERS = re.compile(
    r"(QLinear|QOrdered|DynamicQuantize)\w+|(Conv|MatMul|Mul|ReduceSum)Integer(16|ToFloat)?"
    r"|Q(Attention|EmbedLayerNormalization|Gemm|MoE)"
)
Findings = Iterator[tuple[str, str]]
"""The names of nodes, each with a sentence on its fault and on what helps."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a function of the model that finds the nodes that break it.

    A model that breaks a rule with ``refused`` does not load, or computes something
    else; one that breaks another runs, but slower than it could.
    """

    find: Callable[[View], Findings]
    refused: bool = True

    @property
    def name(self) -> str:
        """The name of the function, as the report has it."""
        return self.find.__name__.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One node that breaks a rule; ``refused`` as in the rule."""

    rule: str
    node: str
    why: str
    refused: bool


def apply(rules: tuple[Rule, ...], view: View) -> tuple[Finding, ...]:
    """All that the rules find, in their order: once for a tensor whose Q and DQ break the same."""
    tensors = {link.name: link.tensor for link in view.links}
    found: dict[object, Finding] = {}
    for rule in rules:
        for node, why in rule.find(view):
            finding = Finding(rule=rule.name, node=node, why=why, refused=rule.refused)
            found.setdefault((rule.name, tensors.get(node, node), why), finding)
    return tuple(found.values())


def opset_too_new(view: View) -> Findings:
    """The runtime reads opsets up to that of its target."""
    newest = view.target.max_opset
    if newest is not None and view.opset > newest:
        yield "(model)", f"opset {view.opset}: up to {newest} is read; export it with that opset"


def scale_not_positive(view: View) -> Findings:
    """Scales are positive and finite."""
    for link in view.links:
        if link.scale is not None:
            scales = np.asarray(link.scale, np.float64)
            if not (np.isfinite(scales) & (scales > 0)).all():
                yield link.name, f"a scale is {scales.min():g}: scales must be positive"


def zero_point_of_other_shape(view: View) -> Findings:
    """A zero point has the shape of its scale."""
    for link in view.links:
        if link.scale is not None and link.point is not None and (
            link.scale.size != link.point.size
        ):
            yield link.name, (
                f"zero point of shape {list(link.point.shape)}, scale of shape "
                f"{list(link.scale.shape)}: they must be the same"
            )


def activation_per_channel(view: View) -> Findings:
    """Activations have one scale."""
    for link in view.activations(QUANTISE):
        if not link.per_tensor:
            yield link.name, "an activation has one scale per channel: give it one in all"


def weight_axis(view: View) -> Findings:
    """The scales of a weight lie along the axis of its outputs: Conv 0, ConvTranspose 1."""
    for layer in view.layers:
        link = layer.weight
        if link is None or link.per_tensor or link.blocked:
            continue
        axis = WEIGHTED_OPS[layer.node.op_type].channel_axis(attributes_of(layer.node))
        data = link.node.inputs[0]
        rank = len(data.shape) if data is not None and data.shape is not None else 0
        if (link.axis + rank if link.axis < 0 else link.axis) != axis:
            yield layer.name, f"scales of its weight along axis {link.axis}: expected {axis}"


def codes_changed_on_the_way(view: View) -> Findings:
    """Between Q and DQ, and before the DQ of a weight, nothing happens to the codes."""
    for link in view.links:
        data = link.node.inputs[0]
        producer = None if data is None or constant(data) is not None else data.producer()
        if link.node.op_type == DEQUANTISE and producer and producer.op_type != QUANTISE:
            yield link.name, f"reads codes from {producer.op_type}: expected QuantizeLinear"


def half_quantised(view: View) -> Findings:
    """A layer runs in integer if both its input and its weight are quantised."""
    for layer in view.layers:
        if layer.weight is not None and layer.x is None and not layer.weight.blocked:
            yield layer.name, "its weight is quantised, its input is not: it runs in float"
        elif layer.x is not None and layer.weight is None:
            yield layer.name, "its input is quantised, its weight is not: it runs in float"


def is_integer(node: ir.Node) -> bool:
    """Whether the operator itself computes on integers, as in files in QOperator form."""
    return node.domain in _DOMAINS and _ON_INTEGERS.fullmatch(node.op_type) is not None


def operators_on_integers(view: View) -> Findings:
    """QOperator form has other operators than those the rules judge.

    So has dynamic quantisation, but where a DequantizeLinear alone reads what it makes.
    """
    nodes = (n for n in view.model.graph.all_nodes() if is_integer(n) and not _is_unpacked(n))
    counts = Counter(node.op_type for node in nodes)
    if counts:
        listed = ", ".join(f"{count} {op_type}" for op_type, count in counts.items())
        yield "(model)", f"not in QDQ form: no rule judges its operators on integers, {listed}"


def _is_unpacked(node: ir.Node) -> bool:
    """Whether this is a DynamicQuantizeLinear whose outputs DequantizeLinear alone reads."""
    readers = [reader.op_type for value in node.outputs for reader in value.consumers()]
    return node.op_type == DYNAMIC and set(readers) == {DEQUANTISE}


COMMON = (Rule(opset_too_new), Rule(scale_not_positive), Rule(zero_point_of_other_shape))
