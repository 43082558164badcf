"""Constants that several layers read alike are stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from onnx_attnround.records import QuantPlan

_LISTED = 5
"""The names that a note tells at most."""
_UNPACKING = frozenset({"DequantizeLinear", "Cast", "Mul"})


def store_once(model: ir.Model, plan: QuantPlan) -> list[str]:
    """Let layers that read one weight in the float model share equal constants, in place.

    Each layer keeps a DequantizeLinear of its own, which runtimes fuse into it. Returns a note if
    a weight is stored more than once, or its readers have biases of their own.
    """
    nodes = {node.name: node for node in model.graph}
    kept: dict[tuple[str, str], list[ir.Value]] = {}
    for layer in plan.layers:
        for kind, value in zip(("weight", "bias"), nodes[layer.node].inputs[1:3], strict=False):
            for position, constant in enumerate(_constants(value)):
                role = kind if position == 0 else f"{kind} {position}"
                _share(model.graph, constant, kept.setdefault((role, layer.weight), []))
    what = {
        "weight": "stored more than once, for layers that read it with other bits or otherwise",
        "bias": "stored once, with a bias for each reader at the scale of its input",
    }
    found = {role: _copied(kept, role) for role in what}
    return [f"weights {what[role]}: {_named(names)}" for role, names in found.items() if names]


def _copied(kept: Mapping[tuple[str, str], Sequence[ir.Value]], role: str) -> list[str]:
    return [
        f"'{weight}' ({len(found)} times)"
        for (kind, weight), found in kept.items()
        if kind == role and len(found) > 1
    ]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _constants(value: ir.Value | None) -> Iterator[ir.Value]:
    """The initializers that ``value`` is unpacked from, codes first; or itself."""
    producer = None if value is None else value.producer()
    if value is not None and value.is_initializer():
        yield value
    elif producer is not None and producer.op_type in _UNPACKING:
        for source in producer.inputs:
            yield from _constants(source)


def _share(graph: ir.Graph, constant: ir.Value, known: list[ir.Value]) -> None:
    """Replace ``constant`` by an equal one of ``known``, or add it to them."""
    twin = next((each for each in known if _equal(each, constant)), None)
    if twin is None:
        known.append(constant)
    elif twin is not constant:
        constant.replace_all_uses_with(twin)
        del graph.initializers[constant.name or ""]


def _equal(one: ir.Value, other: ir.Value) -> bool:
    if one is other or one.const_value is None or other.const_value is None:
        return one is other
    first, second = one.const_value, other.const_value
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()
