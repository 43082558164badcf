"""Tensors whose range may be found anew in each run: which can, and the plan with some that are.

A DynamicQuantizeLinear takes the place of the QuantizeLinear. What follows stays as it is, so
that ONNX Runtime makes the same integer product of it, or one kernel of both (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir

from onnx_attnround.errors import ConfigError
from onnx_attnround.plan.layers import name_of
from onnx_attnround.records import QuantPlan, QuantSpec
from onnx_attnround.targets import Target

_BITS = 8


def check_dynamic(target: Target, bits: int) -> None:
    """Raise ``ConfigError`` if ``target`` has no range in each run, or not for that width."""
    if not target.dynamic:
        raise ConfigError(
            f"option `activations`: target '{target.name}' takes static, got dynamic: it does not "
            "multiply in integer where a range is found in each run"
        )
    if bits != _BITS:
        raise ConfigError(
            f"option `activations`: dynamic ranges are for `act_bits` of {_BITS}, got {bits}; "
            "give static, or other bits"
        )


def can_be_dynamic(model: ir.Model, plan: QuantPlan) -> tuple[str, ...]:
    """The tensors of ``plan`` that may have a range in each run, in the order of the graph.

    They have 8 bits, float nodes make them, and each of their readers is a layer that the
    runtime multiplies in integer so: a MatMul.
    """
    if not plan.target.dynamic:
        return ()
    layers = {layer.node: layer for layer in plan.layers}
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    moved = {*plan.same_range, *plan.same_range.values()}

    def fits(name: str, spec: QuantSpec) -> bool:
        value = values[name]
        if spec.bits != _BITS or name in moved or value.is_graph_output():
            return False
        readers = [layers.get(name_of(node)) for node in value.consumers()]
        products = all(layer is not None and layer.op_type == "MatMul" for layer in readers)
        return products and bool(readers) and is_made_in_float(value, plan)

    return tuple(name for name, spec in plan.activations.items() if fits(name, spec))


def with_dynamic(plan: QuantPlan, names: Collection[str]) -> QuantPlan:
    """The plan in which the tensors ``names`` have a range in each run; codes without sign."""
    activations = {
        name: replace(spec, dynamic=True, signed=False, symmetric=False) if name in names else spec
        for name, spec in plan.activations.items()
    }
    return replace(plan, activations=activations)


def is_made_in_float(value: ir.Value, plan: QuantPlan) -> bool:
    """Whether no integer kernel writes the codes of ``value``."""
    node, target = value.producer(), plan.target
    if node is None or node.op_type in target.float_output:
        return value.const_value is None
    if node.op_type in target.weighted:
        return False
    sources = [v for v in node.inputs if v is not None and v.const_value is None]
    if node.op_type in target.absorbed and sources[0].name not in plan.activations:
        return is_made_in_float(sources[0], plan)
    in_integer = node.op_type in target.arithmetic | target.movement
    return not (in_integer and all(v.name in plan.activations for v in sources))
