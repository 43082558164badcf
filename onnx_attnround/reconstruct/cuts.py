"""Cut a graph at its weighted layers, so that it can be walked once, layer by layer or by blocks.

Piece ``k`` holds the nodes that depend on layer ``k - 1`` and on no later one;
piece 0 those that depend on none. Nodes that no layer needs are in no piece. Nodes
that only rename or unpack codes, and those without a variable input, belong to whichever
piece reads them, so that what crosses a cut is the small integer tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import draws, reads_of

_QUANTISING = ("QuantizeLinear", "DynamicQuantizeLinear")
_Reads = dict[ir.Node, tuple[ir.Value, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the walk: tensor names in and out, and what the walk needs of them.

    ``reads`` is what the layer or block behind the piece reads; ``released`` are those
    inputs that no later piece reads; ``lends`` are computed for another model.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]
    reads: tuple[str, ...]
    lends: tuple[str, ...] = ()

    @property
    def computed(self) -> tuple[str, ...]:
        """The outputs that a run of the piece is asked for."""
        return tuple(dict.fromkeys((*self.outputs, *self.lends)))


@dataclass(frozen=True, slots=True)
class Ties:
    """What two models that are walked side by side share.

    ``lends`` are values that the one computes for the other, which has them as inputs;
    ``given`` tells for each such input from which piece on it is available. ``ends`` are
    outputs of their block even if no later piece reads them.
    """

    lends: Collection[str] = ()
    ends: Collection[str] = ()
    given: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, taken: Mapping[str, str], pieces: Sequence[Piece], ends: Collection[str] = ()
    ) -> Ties:
        """The ties of a model whose inputs ``taken`` stand for values that ``pieces`` lend."""
        lent = {name: k for k, piece in enumerate(pieces) for name in piece.lends}
        given = {name: lent[source] for name, source in taken.items() if source in lent}
        return cls(ends=ends, given=given)


UNTIED = Ties()


def cut(
    model: ir.Model, layers: Sequence[str], codes: Collection[str] = (), ties: Ties = UNTIED
) -> tuple[Piece, ...]:
    """The pieces up to the input of the last layer; ``layers`` are node names in graph order.

    Piece ``k`` provides what layer ``k`` reads. ``codes`` are the integer tensors
    that cross a cut in place of what a DequantizeLinear makes of them; those of a
    DynamicQuantizeLinear, whose scale is another in each run, are made anew behind the cut.
    The graph must be sorted. Raises ``ModelError`` if a layer reads no variable tensor.
    """

    def passes(node: ir.Node) -> bool:
        ends = {"DequantizeLinear": node.inputs[:1], "DynamicQuantizeLinear": node.outputs[:1]}
        return any(v is not None and v.name in codes for v in ends.get(node.op_type, ()))

    reads = _crossing_reads(model.graph, passes)[0]
    reads = _needed(reads, set(layers), set())
    order = {name: position + 1 for position, name in enumerate(layers)}
    layer_reads = {n.name: v[0].name or "" for n, v in reads.items() if n.name in order}
    if constant := [name for name in layers if name not in layer_reads]:
        raise ModelError(
            f"node '{constant[0]}': its input depends on no model input; exclude the node"
        )
    pieces = _pieces(model.graph, reads, order, set(), ties)
    return tuple(
        replace(piece, reads=(layer_reads[layer],))
        for piece, layer in zip(pieces, layers, strict=False)
    )


def cut_blocks(
    model: ir.Model, blocks: Sequence[Sequence[str]], ties: Ties = UNTIED
) -> tuple[Piece, ...]:
    """The pieces of whole blocks of layers, up to the outputs of the graph.

    Piece 0 is what comes before all layers, piece ``k + 1`` is block ``k``: the nodes
    that depend on one of its layers, and on none of a later block. Tensors cross a cut
    as they are before their quantisation, which belongs to whichever piece reads them.
    """
    reads, crossing = _crossing_reads(model.graph, _is_quantisation)
    outputs = {crossing[value] for value in model.graph.outputs if value in crossing}
    ends = {crossing[value] for value in crossing if value.name in ties.ends}
    order = {name: position + 1 for position, names in enumerate(blocks) for name in names}
    reads = _needed(reads, set(order), outputs | ends)
    pieces = _pieces(model.graph, reads, order, outputs, ties)
    behind = (*pieces[1:], Piece((), (), (), ()))
    return tuple(
        replace(piece, reads=later.inputs) for piece, later in zip(pieces, behind, strict=True)
    )


def raw_names(quantised: ir.Model) -> dict[str, str]:
    """For each quantised activation, by its name in the float model, what crosses a cut for it."""
    names = {}
    for node in quantised.graph:
        if node.op_type in _QUANTISING and (node.name or "").endswith("/quantize"):
            value = node.inputs[0]
            while value is not None and _renames(value.producer()):
                value = value.producer().inputs[0]  # type: ignore[union-attr]
            if value is not None:
                names[(node.name or "").removesuffix("/quantize")] = value.name or ""
    return names


def _renames(node: ir.Node | None) -> bool:
    return node is not None and (node.op_type == "Identity" or _is_quantisation(node))


def _is_quantisation(node: ir.Node) -> bool:
    """Whether the node is a QuantizeLinear, a DequantizeLinear, or a Clip of codes between."""
    dtype = node.outputs[0].dtype
    clips_codes = node.op_type == "Clip" and dtype is not None and dtype.is_integer()
    return clips_codes or node.op_type in (*_QUANTISING, "DequantizeLinear")


def _pieces(
    graph: ir.Graph,
    reads: _Reads,
    order: Mapping[str, int],
    kept: Collection[ir.Value],
    ties: Ties,
) -> tuple[Piece, ...]:
    """The pieces for layers in ``order``; ``kept`` values are released by none of them."""
    given = {value for value in graph.inputs if value.name in ties.given}
    origin = {value: ties.given.get(value.name or "", -1) for value in graph.inputs}
    count = max(order.values(), default=0) + 1
    read_in: list[set[ir.Value]] = [set() for _ in range(count)]
    for node, values in reads.items():
        piece = max((order.get(node.name or "", 0), *(origin[value] for value in values)))
        origin.update(dict.fromkeys(node.outputs, piece))
        read_in[piece].update(values)
    last = {value: piece for piece, values in enumerate(read_in) for value in values}
    last.update(dict.fromkeys(kept, count))
    ends = [value for value in origin if value.name in ties.ends]
    last.update({value: max(last.get(value, 0), origin[value] + 1) for value in ends})
    return tuple(
        Piece(
            inputs=_names(v for v in read_in[piece] if origin[v] < piece or v in given),
            outputs=_names(
                v for v in last if origin[v] == piece and last[v] > piece and v not in given
            ),
            released=_names(
                v for v in last if last[v] == piece and (origin[v] < piece or v in given)
            ),
            reads=(),
            lends=_names(v for v in origin if v.name in ties.lends and origin[v] == piece),
        )
        for piece in range(count)
    )


def extract(model: ir.Model, piece: Piece) -> ir.Model:
    """The sub-model that computes ``piece.computed`` from ``piece.inputs``.

    An input of unknown type is taken to be float32.
    """
    graph = ir.convenience.extract(model.graph, list(piece.inputs), list(piece.computed))
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    for value in graph.inputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _names(values: Iterator[ir.Value]) -> tuple[str, ...]:
    return tuple(sorted(value.name or "" for value in values))


def _crossing_reads(
    graph: ir.Graph, passes: Callable[[ir.Node], bool]
) -> tuple[_Reads, dict[ir.Value, ir.Value]]:
    """The tensors that each node needs in order to run, and for each value what crosses a cut.

    Nodes that only rename or unpack run with their readers, and are left out.
    """
    crossing = {value: value for value in graph.inputs if not value.is_initializer()}
    reads: _Reads = {}
    for node in graph:
        found = tuple(crossing[value] for value in reads_of(node) if value in crossing)
        if found and (node.op_type == "Identity" or passes(node)):
            crossing.update((value, found[0]) for value in node.outputs)
        elif found or draws(node):  # a draw belongs to one piece, or each would draw its own
            reads[node] = found
            crossing.update((value, value) for value in node.outputs)
    return reads, crossing


def _needed(reads: _Reads, names: Collection[str], outputs: Collection[ir.Value]) -> _Reads:
    """The reads of the nodes ``names``, and of those that lead to one of them or to ``outputs``."""
    wanted = set(outputs)
    kept: set[ir.Node] = set()
    for node, values in reversed(reads.items()):
        if node.name in names or not wanted.isdisjoint(node.outputs):
            kept.add(node)
            wanted.update(values)
    return {node: values for node, values in reads.items() if node in kept}
