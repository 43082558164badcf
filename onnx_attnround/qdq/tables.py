"""Tables that are looked up, such as embeddings: integers with a scale for each row or block.

A lookup of integers is followed by arithmetic that every runtime has, on the rows looked up
alone: ``Cast(Gather(codes, i)) * Gather(scales, i)``. A DequantizeLinear of the table itself
would turn all of it into floats, at each call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count

import numpy as np
import onnx_ir as ir

from onnx_attnround.records import TABLE_BLOCK, Array

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""The shares of a block's largest magnitude that its scale is tried to reach to, at 4 bits."""
ROWS = 1 << 12
"""The rows that are rounded together, to bound the memory."""


def quantize_tables(model: ir.Model, tables: Mapping[str, int]) -> None:
    """Replace the tables that the nodes of these names look up, in place."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        table = node.inputs[0] if node.name in tables else None
        if table is not None:
            found.setdefault(table, []).append(node)
    for table, readers in found.items():
        narrow = tables[readers[0].name or ""] == 4
        (_four_bits if narrow else _eight_bits)(model.graph, table, readers)
        if not table.uses():
            del model.graph.initializers[table.name or ""]


def round_rows(table: Array, bits: int) -> tuple[Array, Array]:
    """Codes, int8, and scales ``[..., 1]`` of the last axis, of least squared error."""
    highest = 2 ** (bits - 1) - 1
    codes = np.empty(table.shape, np.int8)
    scales = np.empty((*table.shape[:-1], 1), np.float32)
    for start in range(0, len(table), ROWS):
        part = slice(start, start + ROWS)
        codes[part], scales[part] = _round_part(
            table[part], highest, SHARES if bits < 8 else (1.0,)
        )
    return codes, scales


def _round_part(rows: Array, highest: int, shares: Collection[float]) -> tuple[Array, Array]:
    peak = np.maximum(np.abs(rows).max(-1, keepdims=True), np.finfo(np.float32).tiny * highest)
    codes, scales, least = np.zeros_like(rows), peak, np.full(peak.shape, np.inf)
    for share in shares:
        scale = (peak * (share / highest)).astype(np.float32)
        tried = np.clip(np.rint(rows / scale), -highest - 1, highest)
        error = np.square(tried * scale - rows).sum(-1, keepdims=True)
        better = error < least
        codes, scales = np.where(better, tried, codes), np.where(better, scale, scales)
        least = np.minimum(error, least)
    return codes, scales


def _eight_bits(graph: ir.Graph, table: ir.Value, readers: Sequence[ir.Node]) -> None:
    codes, scales = round_rows(_values(table), 8)
    names = Names(graph)
    constants = [names.constant(f"{table.name}/{end}", a) for end, a in _ends(codes, scales)]
    for node in readers:
        nodes = _Chain(names, node)
        looked_up = nodes.add("Cast", [node.outputs[0]], to=ir.DataType.FLOAT)
        scale = nodes.add("Gather", [constants[1], node.inputs[1]])
        nodes.add("Mul", [looked_up, scale])
        nodes.take_over(constants[0])


def _four_bits(graph: ir.Graph, table: ir.Value, readers: Sequence[ir.Node]) -> None:
    """Two codes to a byte: the first half of a block low, the second high."""
    values = _values(table)
    codes, scales = round_rows(values.reshape(len(values), -1, TABLE_BLOCK), 4)
    low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
    names = Names(graph)
    constants = [
        names.constant(f"{table.name}/{end}", a) for end, a in _ends(low | high << 4, scales)
    ]
    step, part, middle = (
        names.constant(f"{table.name}/{end}", np.asarray(number, np.float32))
        for end, number in (("step", 16.0), ("part", 1 / 16), ("middle", 8.0))
    )
    for node in readers:
        rank = len(node.outputs[0].shape or ())
        shape = np.array([0] * (rank - 1) + [values.shape[1]], np.int64)
        nodes = _Chain(names, node)
        pair = nodes.add("Cast", [node.outputs[0]], to=ir.DataType.FLOAT)
        upper = nodes.add("Floor", [nodes.add("Mul", [pair, part])])
        lower = nodes.add("Sub", [pair, nodes.add("Mul", [upper, step])])
        both = nodes.add("Sub", [nodes.add("Concat", [lower, upper], axis=-1), middle])
        scale = nodes.add("Gather", [constants[1], node.inputs[1]])
        blocks = nodes.add("Mul", [both, scale])
        nodes.add("Reshape", [blocks, names.constant(f"{node.name}/shape", shape)])
        nodes.take_over(constants[0])


def _ends(codes: Array, scales: Array) -> tuple[tuple[str, Array], ...]:
    return ("codes", codes), ("scales", scales)


def _values(table: ir.Value) -> Array:
    if table.const_value is None:
        raise ValueError(f"table '{table.name}' is no constant")
    values: Array = table.const_value.numpy()
    return values


class Names:
    """New constants and names of one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = set(ir.convenience.create_value_mapping(graph))

    def fresh(self, name: str) -> str:
        """``name``, with a number where the graph has that already."""
        numbered = (f"{name}_{number}" for number in count())
        made = next(each for each in chain([name], numbered) if each not in self._taken)
        self._taken.add(made)
        return made

    def constant(self, name: str, values: Array) -> ir.Value:
        """A new initializer."""
        tensor = ir.Tensor(values, name=self.fresh(name))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


class _Chain:
    """Nodes that turn what a Gather looks up into floats."""

    def __init__(self, names: Names, gather: ir.Node) -> None:
        self._names = names
        self._gather = gather
        self._nodes: list[ir.Node] = []

    def add(self, op: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        """The output of a new node, a float tensor."""
        name = f"{self._gather.name}/{op.lower()}_{len(self._nodes)}"
        plain = {key: int(value) for key, value in attributes.items()}
        node = ir.node(op, inputs, attributes=plain, name=name)
        node.outputs[0].name = self._names.fresh(f"{name}_output")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._nodes.append(node)
        return node.outputs[0]

    def take_over(self, table: ir.Value) -> None:
        """Let the Gather read ``table``, and whoever read it the last of the nodes."""
        old, new = self._gather.outputs[0], self._nodes[-1].outputs[0]
        added = set(self._nodes)
        uses = [use for use in old.uses() if use.node not in added]
        for use in uses:
            use.node.replace_input_with(use.idx, new)
        for position, output in enumerate(self._names.graph.outputs):
            if output is old:
                self._names.graph.outputs[position] = new
        new.shape, new.name = old.shape, old.name
        old.name, old.shape = self._names.fresh(f"{old.name}_codes"), None
        old.type = table.type
        self._gather.replace_input_with(0, table)
        self._names.graph.insert_after(self._gather, self._nodes)
