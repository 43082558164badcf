"""The activations: tensors that get Q/DQ, with their spec and the ranges that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import is_read_once, is_standard
from onnx_attnround.ops import clip_bounds, is_clipped_line
from onnx_attnround.plan.layers import is_weighted, name_of
from onnx_attnround.plan.patterns import NodeChoice, tensor_names, values_for
from onnx_attnround.records import LayerPlan, QuantSpec
from onnx_attnround.targets import Target

FLOAT_BITS = 32
"""The bits that stand for an activation that stays float."""


@dataclass
class Activations:
    """Finds the tensors that get Q/DQ: those of layers, then what joins and moves them."""

    model: ir.Model
    layers: list[LayerPlan]
    target: Target
    config: QuantConfig
    chosen: dict[str, ir.Value] = field(default_factory=dict)
    same_range: dict[str, str] = field(default_factory=dict)
    integer: set[str] = field(default_factory=set)
    """The names of the nodes that run in integer."""
    joins: set[str] = field(default_factory=set)
    """The names of the Adds of a fused layer's float output and of codes."""

    def __post_init__(self) -> None:
        excluded = NodeChoice.of(self.model, self.config).excluded
        self.kept = {
            name_of(node)
            for node in self.model.graph
            if (name_of(node) in excluded and not is_weighted(node))
            or _lacks_kernel(node)
        }
        """The names of nodes that compute in float, and read floats wherever possible."""
        self.asked: dict[str, int] = values_for(
            self.config.activation_bits, tensor_names(self.model)
        )

    def find(self) -> tuple[dict[str, QuantSpec], dict[str, str], dict[str, frozenset[str]]]:
        """``activations``, ``same_range`` and ``shared`` as :class:`QuantPlan` has them."""
        layers = {layer.node for layer in self.layers}
        nodes = [node for node in self.model.graph if is_standard(node)]
        for node in nodes:
            if node.name in layers and node.op_type in self.target.weighted:
                self._add_layer(node)
        if self.target.placement == "regions":
            self._add_regions(nodes)
        elif self.target.placement == "inputs":
            self._add_shortcuts(nodes)
        else:
            self._add_everything()
        return {name: self._spec(name) for name in self.chosen}, self.same_range, self._shared()

    def _add_layer(self, node: ir.Node) -> None:
        x, y = node.inputs[0], self._absorbed(node.outputs[0])
        writes_codes = node.op_type not in self.target.float_output
        if self.target.runtime == "openvino" and _is_vector(x):
            return  # its integer kernel gives the product an axis more
        if x is None or self._stays_float(x) or (writes_codes and not self._takes_codes(y)):
            return  # without codes at both ends no integer kernel is taken, so one is of no use
        self.integer.add(name_of(node))
        self._choose(x)
        if writes_codes:
            self._choose(y)

    def _add_regions(self, nodes: list[ir.Node]) -> None:
        """Choose what lies between integer layers: arithmetic and movement of quantised tensors."""
        # In the order of the graph: whether a node joins depends on those before it alone. That
        # what it makes is read as codes, too, is known only at the end, hence ``_drop_idle``.
        for node in nodes:
            if name_of(node) in self.kept:
                continue
            if self._is_arithmetic(node):
                self._add_arithmetic(node)
            elif node.op_type in self.target.movement:
                self._add_movement(node)
        self._drop_idle()

    def _is_arithmetic(self, node: ir.Node) -> bool:
        """Whether there is an integer kernel that computes new values from codes."""
        line = node.op_type in self.target.clipped_lines and is_clipped_line(node)
        return line or node.op_type in self.target.arithmetic

    def _add_arithmetic(self, node: ir.Node) -> None:
        output = self._absorbed(node.outputs[0])
        joins = all(v is not None and v.name in self.chosen for v in node.inputs)
        if joins and not output.is_graph_output() and self._takes_codes(output):
            self.integer.add(name_of(node))
            self._choose(output)

    def _add_movement(self, node: ir.Node) -> None:
        x = node.inputs[0]
        if x is None or x.name not in self.chosen or not _moves_codes(node):
            return
        bits = self._asked(self.chosen[self._root(x.name or "")]) or self.config.act_bits
        for y in _moved(node):
            if self._asked(y) in (None, bits) and self._takes_codes(y):
                self._choose(y)
                self.same_range[y.name or ""] = x.name or ""

    def _add_shortcuts(self, nodes: list[ir.Node]) -> None:
        """Choose what is added to the output of a layer, which itself stays float to be fused."""
        for node in nodes:
            if node.op_type != "Add" or name_of(node) in self.kept:
                continue
            terms = [v for v in node.inputs if v is not None and v.const_value is None]
            straight = [value for value in terms if self._is_fused(value)]
            if straight and len(terms) == 2:
                self.joins.add(name_of(node))
                self._choose(terms[1] if straight[0] is terms[0] else terms[0])

    def _is_fused(self, value: ir.Value) -> bool:
        """Whether ``value`` goes from an integer layer to one reader, and nowhere else."""
        producer = value.producer()
        return is_read_once(value) and producer is not None and name_of(producer) in self.integer

    def _add_everything(self) -> None:
        """Choose each float tensor of the graph, and the constants of arithmetic."""
        for value in self.model.graph.inputs:
            self._choose_float(value)
        for node in self.model.graph:
            standard = is_standard(node)
            if standard and node.op_type in self.target.movement:
                self._add_movement(node)
            if standard and node.op_type in self.target.arithmetic:
                for operand in node.inputs:
                    if operand is not None and operand.const_value is not None:
                        self._choose_float(operand)
            for value in node.outputs:
                if self._absorbed(value) is value:
                    self._choose_float(value)

    def _choose_float(self, value: ir.Value) -> None:
        if value.dtype == ir.DataType.FLOAT:
            self._choose(value)

    def _choose(self, value: ir.Value) -> None:
        if not self._stays_float(value):
            self.chosen.setdefault(value.name or "", value)

    def _asked(self, value: ir.Value) -> int | None:
        """The bits that ``activation_bits`` has for the tensor, or for the one it is a copy of."""
        producer = value.producer()
        bits = self.asked.get(value.name or "")
        if bits is None and producer is not None and producer.op_type == "Identity":
            source = producer.inputs[0]
            return None if source is None else self._asked(source)
        return bits

    def _stays_float(self, value: ir.Value) -> bool:
        """Whether the tensor is to have no codes."""
        return self._asked(value) == FLOAT_BITS

    def _takes_codes(self, value: ir.Value) -> bool:
        """Whether ``value`` may be written as codes: no node that is kept in float reads it."""
        readers = {name_of(node) for node in value.consumers()}
        return not self._stays_float(value) and self.kept.isdisjoint(readers)

    def _absorbed(self, value: ir.Value) -> ir.Value:
        """The tensor that carries the Q: behind an activation that the Q absorbs."""
        consumers = value.consumers()
        if len(consumers) == 1 and not value.is_graph_output():
            node = consumers[0]
            known = node.op_type in self.target.absorbed and is_standard(node)
            known = known and name_of(node) not in self.kept
            if known and node.graph is self.model.graph and _starts_at_zero(node):
                return node.outputs[0]
        return value

    def _drop_idle(self) -> None:
        """End a region before a tensor that no integer node reads: codes gain nothing there.

        One range for all inputs of a Concat would even cost much: where it joins boxes in
        pixels and scores, the scores are lost.
        """
        # From the end on, so that a chain of such nodes is dropped link by link.
        for node in reversed(list(self.model.graph)):
            if self._is_arithmetic(node) and name_of(node) in self.integer:
                made = [self._absorbed(node.outputs[0])]
            else:
                made = [value for value in _moved(node) if value.name in self.same_range]
            if made and not any(self._feeds_integer(value) for value in made):
                self.integer.discard(name_of(node))
                for value in made:
                    del self.chosen[value.name or ""]
                    self.same_range.pop(value.name or "", None)

    def _feeds_integer(self, value: ir.Value) -> bool:
        return any(self._reads_codes(node, value) for node in value.consumers())

    def _reads_codes(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether ``node`` computes on the codes of ``value``, or moves them."""
        moves = any(self.same_range.get(v.name or "") == value.name for v in node.outputs)
        return moves or name_of(node) in self.integer | self.joins

    def _shared(self) -> dict[str, frozenset[str]]:
        """The tensors that are computed in float, and read by integer and float nodes alike.

        Each with the names of its integer readers. The output of an integer kernel is not among
        them: it has no float value that float nodes could read.
        """
        if self.target.placement == "everything":
            return {}
        found: dict[str, frozenset[str]] = {}
        for name, value in self.chosen.items():
            readers = value.consumers()
            integer = [node for node in readers if self._reads_codes(node, value)]
            in_float = len(integer) < len(readers) or value.is_graph_output()
            if integer and in_float and self._is_float(value):
                found[name] = frozenset(map(name_of, integer))
        return found

    def _is_float(self, value: ir.Value) -> bool:
        """Whether ``value`` has a float value: no integer kernel writes or moves its codes."""
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.inputs else None
        if source is not None and self._absorbed(source) is value:
            producer = source.producer()
        in_integer = producer is not None and name_of(producer) in self.integer
        if producer is not None and in_integer:
            return producer.op_type in self.target.float_output
        return value.name not in self.same_range and value.const_value is None

    def _spec(self, name: str) -> QuantSpec:
        """The spec of a tensor.

        Its bits are those of ``activation_bits``, if any. Else the input of a layer has
        ``act_bits``, or those of first and last layers; a tensor that is only added or pooled
        costs nothing at 8 bits and has no fewer.
        """
        readers = [layer for layer in self.layers if self._root(layer.x) == self._root(name)]
        bits: list[int] = [self.config.act_bits]
        if not readers:
            bits.append(8)
        if any(layer.first_or_last for layer in readers):
            bits.append(self.config.first_last_bits)
        if (asked := self._asked(self.chosen[self._root(name)])) is not None:
            bits = [asked]
        producer = self.chosen[name].producer()
        op_type = "" if producer is None else producer.op_type
        fixed: tuple[float, float] | None = None
        if op_type in self.target.unit_range:
            fixed = _unit_range(op_type, max(bits))
        elif op_type in self.target.clipped_lines:
            fixed = 0.0, 1.0
        return QuantSpec(
            bits=max(bits),
            signed=self.target.activation_signed,
            symmetric=self.target.activation_symmetric,
            least_range=self.target.least_range,
            fixed_range=fixed,
        )

    def _root(self, name: str) -> str:
        while name in self.same_range:
            name = self.same_range[name]
        return name


def _is_vector(value: ir.Value | None) -> bool:
    """Whether the value is known to have one axis."""
    return value is not None and value.shape is not None and len(value.shape) == 1


def is_dilated_pool(node: ir.Node) -> bool:
    """Whether this is an AveragePool with dilations, which no integer kernel has."""
    dilations = node.attributes.get_ints("dilations", ()) if node.op_type == "AveragePool" else ()
    return is_standard(node) and any(step != 1 for step in dilations)


def _lacks_kernel(node: ir.Node) -> bool:
    """Whether ONNX Runtime's integer kernel for the node fails, or computes something else.

    Its AveragePool divides by the whole kernel where windows hang over the padding.
    """
    over = (node.attributes.get_int(name, 0) for name in ("ceil_mode", "count_include_pad"))
    return is_dilated_pool(node) or (
        node.op_type == "AveragePool" and is_standard(node) and all(over)
    )


def _unit_range(op_type: str, bits: int) -> tuple[float, float]:
    """The range of a Sigmoid or Tanh, less the step at its end that makes steps powers of two."""
    low = 0.0 if op_type == "Sigmoid" else -1.0
    return low, 1.0 - (1.0 - low) / 2**bits


def _starts_at_zero(node: ir.Node) -> bool:
    """Whether the output of this Relu or Clip has the constant lower bound 0.

    Only then does the range of the Q behind it, which holds 0, surely lie within the
    bounds of the Clip, so that a runtime can leave the Clip out.
    """
    if node.op_type != "Clip":
        return True
    low, high = clip_bounds(node)
    return low == 0 <= high


def _moved(node: ir.Node) -> Sequence[ir.Value]:
    """The outputs of a movement node that carry codes, which the indices of a MaxPool do not."""
    return node.outputs if node.op_type == "Split" else node.outputs[:1]


def _moves_codes(node: ir.Node) -> bool:
    """Whether the node makes no new values, but for zeros, which every scale has."""
    if node.op_type == "Pad":
        return _pads_with_zeros(node)
    if node.op_type == "Resize":
        crops = node.attributes.get_string("coordinate_transformation_mode") == "tf_crop_and_resize"
        return node.attributes.get_string("mode", "nearest") == "nearest" and not crops
    return True


def _pads_with_zeros(node: ir.Node) -> bool:
    if node.attributes.get_string("mode", "constant") != "constant":
        return True  # copies of values
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if fill is None:
        return node.attributes.get_float("value", 0.0) == 0.0
    return fill.const_value is not None and not fill.const_value.numpy().any()
