"""What is quantised, with which spec; and for all else, the reason why not.

Everything is judged here, before any slow work: each weighted node becomes a
``LayerPlan`` or an entry of ``skipped``, and each activation that the target
runs in integer gets a ``QuantSpec``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.block_scales import check_blocks, with_blocks
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, ModelError
from onnx_attnround.graph import is_read_once
from onnx_attnround.ops import WEIGHTED_OPS, clip_bounds, count_macs
from onnx_attnround.records import LayerPlan, QuantPlan, QuantSpec
from onnx_attnround.targets import Target, get_target


def make_plan(model: ir.Model, config: QuantConfig, *, quantise_activations: bool) -> QuantPlan:
    """The plan for ``model``; with ``quantise_activations`` false only weights are quantised.

    Raises ``ModelError`` if no weight can be quantised or the target does not read
    the model's opset, ``ConfigError`` if it does not take the settings or a
    pattern of ``include``, ``exclude`` or ``layer_bits`` matches no node.
    """
    target = get_target(config.target)
    integer = quantise_activations and config.act_bits < 32
    _check_target(target, model, config, integer_activations=integer)
    _check_patterns(model, config)
    layers, skipped = _find_layers(model, config, target)
    if not layers:
        reasons = "; ".join(f"{node}: {why}" for node, why in list(skipped.items())[:3])
        raise ModelError(
            "nothing to quantise: the model has no Conv, ConvTranspose, Gemm or MatMul with a "
            f"constant float32 weight that is not excluded ({reasons or 'none found'})"
        )
    marked = _mark_ends(model, layers, skipped)
    planned, unblocked = with_blocks(marked, config.block_size, target)
    activations: dict[str, QuantSpec] = {}
    same_range: dict[str, str] = {}
    if integer:
        activations, same_range = _Activations(model, marked, target, config).find()
    return QuantPlan(
        target=target,
        layers=planned,
        activations=activations,
        same_range=same_range,
        skipped=skipped,
        unblocked=unblocked,
    )


def _check_target(
    target: Target, model: ir.Model, config: QuantConfig, *, integer_activations: bool
) -> None:
    bits, storage = config.act_bits, config.weight_storage
    if target.placement == "everything" and not integer_activations:
        raise ConfigError(
            f"target '{target.name}' takes no float activations: give calibration samples "
            "(--calib), and act_bits of 8 or 16"
        )
    if bits != 32 and bits not in target.activation_bits:
        known = ", ".join(map(str, sorted(target.activation_bits)))
        raise ConfigError(
            f"option 'act_bits': target '{target.name}' takes {known} or 32 (float), got {bits}"
        )
    if config.block_size is not None:
        check_blocks(config.block_size, target, integer_activations=integer_activations)
    storages = target.storages(blocks=config.block_size is not None)
    if storage is not None and storage not in storages:
        known = ", ".join(storages)
        raise ConfigError(
            f"option 'weight_storage': target '{target.name}' takes {known}, got {storage}"
        )
    if unknown := sorted(target.weighted - WEIGHTED_OPS.keys()):
        raise ConfigError(
            f"target '{target.name}': weighted ops: got {', '.join(unknown)}, expected some of "
            f"{', '.join(WEIGHTED_OPS)}"
        )
    opset = model.opset_imports.get("", 0)
    if target.max_opset is not None and opset > target.max_opset:
        raise ModelError(
            f"the model has opset {opset}, target '{target.name}' reads opsets up to "
            f"{target.max_opset}; export it with that opset"
        )


def _check_patterns(model: ir.Model, config: QuantConfig) -> None:
    names = [node.name or "" for node in model.graph.all_nodes()]
    for option in ("include", "exclude", "layer_bits"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"option '{option}': pattern '{pattern}' matches no node; "
                    "--dry-run lists the nodes"
                )


# --- weighted layers --------------------------------------------------------------------


def _find_layers(
    model: ir.Model, config: QuantConfig, target: Target
) -> tuple[list[LayerPlan], dict[str, str]]:
    layers, skipped = [], {}
    main = set(model.graph)
    varying = _varying(model)
    for node in model.graph.all_nodes():
        if node.op_type not in WEIGHTED_OPS or not _is_standard(node):
            if why := _unhandled(node):
                skipped[_name(node)] = why
            continue
        reason = "inside a subgraph" if node not in main else _refusal(node, config)
        if reason is None and node.inputs[0] not in varying:
            reason = "its input depends on no input of the model"
        if reason is None:
            layers.append(_layer(node, config, target))
        else:
            skipped[_name(node)] = reason
    return layers, skipped


def _varying(model: ir.Model) -> set[ir.Value | None]:
    """The values that depend on an input of the model."""
    varying: set[ir.Value | None] = set(model.graph.inputs)
    for node in model.graph:
        if not varying.isdisjoint(node.inputs):
            varying.update(node.outputs)
    return varying


_NO_WEIGHT = "no constant weight"
_QUANTISED = "already quantised"
_LOOKED_UP = "its table is looked up, not multiplied: it stays float"
_LISTED_OPS = frozenset({"LSTM", "GRU", "RNN", "Einsum", "DeformConv", "Gather"})
_INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
     "MatMulNBits", "QGemm", "QAttention", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)  # fmt: skip


def _unhandled(node: ir.Node) -> str | None:
    """Why a node that is none of the weighted ops keeps its weights, if it has any."""
    if node.op_type in _INTEGER_OPS:
        return _QUANTISED
    if _is_standard(node) and node.op_type not in _LISTED_OPS:
        return None
    constants = (v.const_value for v in node.inputs if v is not None and v.const_value is not None)
    if any(c.dtype.is_floating_point() and len(c.shape) > 1 for c in constants):
        if node.op_type == "Gather":
            return _LOOKED_UP
        op = node.op_type if _is_standard(node) else f"{node.domain}.{node.op_type}"
        return f"{op} is not handled: its weights stay float"
    return None


def _refusal(node: ir.Node, config: QuantConfig) -> str | None:
    """Why this weighted node is left in float, or ``None``."""
    name, weight = _name(node), node.inputs[1]
    if config.include and not any(fnmatchcase(name, p) for p in config.include):
        return "not matched by include"
    if any(fnmatchcase(name, p) for p in config.exclude):
        return "matched by exclude"
    tensor = None if weight is None else weight.const_value
    if weight is None or tensor is None:
        return _weightless(node)
    if tensor.dtype != ir.DataType.FLOAT:
        return f"weight '{weight.name}' is {tensor.dtype.name}: FLOAT is handled"
    if node.inputs[0] is None or node.inputs[0].const_value is not None:
        return "its input is a constant"
    attributes = _attributes(node)
    op = WEIGHTED_OPS[node.op_type]
    shape = _static(tensor)
    reason = op.rank_error(attributes, shape)
    if reason is None:
        reason = _bias_refusal(node) or _factor_refusal(attributes)
    if reason is None and not np.isfinite(tensor.numpy()).all():
        reason = f"weight '{weight.name}' holds NaN or Inf"
    return reason


def _weightless(node: ir.Node) -> str:
    """Why the right operand of a weighted node is no constant."""
    left, right = node.inputs[:2]
    producer = None if right is None else right.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _QUANTISED
    constant_left = left is not None and left.const_value is not None
    return "the constant operand is the left one" if constant_left else _NO_WEIGHT


def _factor_refusal(attributes: Mapping[str, Any]) -> str | None:
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return "alpha or beta is not 1 and could not be folded"
    return None


def _bias_refusal(node: ir.Node) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if bias.const_value is None:
        return "its bias is not a constant"
    shape = tuple(bias.const_value.shape)
    if not all(d == 1 for d in shape[:-1]):
        return f"its bias of shape {shape} is not a row"
    finite = np.isfinite(bias.const_value.numpy()).all()
    return None if finite else f"bias '{bias.name}' holds NaN or Inf"


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _static(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(d for d in tensor.shape if isinstance(d, int))


def _name(node: ir.Node) -> str:
    return node.name or f"<unnamed {node.op_type}>"


def _bias(node: ir.Node) -> str | None:
    """The name of a constant bias with one entry per channel."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return None if value is None else value.name


def _layer(node: ir.Node, config: QuantConfig, target: Target) -> LayerPlan:
    x, weight = node.inputs[0], node.inputs[1]
    y = node.outputs[0]
    if x is None or weight is None or weight.const_value is None:
        raise ModelError(f"node '{_name(node)}': its input or weight is missing")
    attributes = _attributes(node)
    op = WEIGHTED_OPS[node.op_type]
    per_tensor = node.op_type in target.per_tensor
    axis = None if per_tensor else op.channel_axis(attributes)
    shape = _static(weight.const_value)
    input_shape, output_shape = _shape(x), _shape(y)
    return LayerPlan(
        node=_name(node),
        op_type=node.op_type,
        x=x.name or "",
        y=y.name or "",
        weight=weight.name or "",
        bias=_bias(node),
        weight_shape=shape,
        weight_spec=QuantSpec(bits=config.weight_bits, signed=True, symmetric=True, axis=axis),
        attributes=attributes,
        input_shape=input_shape,
        macs=count_macs(node.op_type, attributes, shape, input_shape, output_shape),
    )


def _shape(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def _mark_ends(
    model: ir.Model, layers: list[LayerPlan], skipped: Mapping[str, str]
) -> list[LayerPlan]:
    """Set ``first_or_last`` where no weighted layer lies before, or none behind.

    Layers that stay in float count: the second is not the first because that is excluded.
    """
    weighted = {layer.node for layer in layers}
    weighted |= {n for n, reason in skipped.items() if reason not in (_NO_WEIGHT, _LOOKED_UP)}
    seen_by_input: set[str] = set()  # values computed by layers or from them
    for node in model.graph:
        touched = any(v is not None and v.name in seen_by_input for v in node.inputs)
        if touched or node.name in weighted:
            seen_by_input.update(v.name or "" for v in node.outputs)
    leads_on: set[str] = set()  # values that a layer reads, at once or further on
    for node in reversed(list(model.graph)):
        leads = any(v.name in leads_on for v in node.outputs)
        if leads or node.name in weighted:
            leads_on.update(v.name or "" for v in node.inputs if v is not None)
    return [
        replace(layer, first_or_last=layer.x not in seen_by_input or layer.y not in leads_on)
        for layer in layers
    ]


# --- activations ------------------------------------------------------------------------


@dataclass
class _Activations:
    """Finds the tensors that get Q/DQ: those of layers, then what joins and moves them."""

    model: ir.Model
    layers: list[LayerPlan]
    target: Target
    config: QuantConfig
    chosen: dict[str, ir.Value] = field(default_factory=dict)
    same_range: dict[str, str] = field(default_factory=dict)
    integer: set[str] = field(default_factory=set)  # names of nodes that run in integer

    def find(self) -> tuple[dict[str, QuantSpec], dict[str, str]]:
        layers = {layer.node for layer in self.layers}
        nodes = [node for node in self.model.graph if _is_standard(node)]
        for node in nodes:
            if node.name in layers and node.op_type in self.target.weighted:
                self._add_layer(node)
        if self.target.placement == "regions":
            self._add_regions(nodes)
        elif self.target.placement == "inputs":
            self._add_shortcuts(nodes)
        else:
            self._add_everything()
        return {name: self._spec(name) for name in self.chosen}, self.same_range

    def _add_layer(self, node: ir.Node) -> None:
        self.integer.add(_name(node))
        if node.inputs[0] is not None:
            self._choose(node.inputs[0])
        if node.op_type not in self.target.float_output:
            self._choose(self._absorbed(node.outputs[0]))

    def _add_regions(self, nodes: list[ir.Node]) -> None:
        """What lies between integer layers: arithmetic and movement of quantised tensors."""
        for node in nodes:
            if node.op_type in self.target.arithmetic:
                self._add_arithmetic(node)
            elif node.op_type in self.target.movement:
                self._add_movement(node)
        self._drop_idle_movement()

    def _add_arithmetic(self, node: ir.Node) -> None:
        output = self._absorbed(node.outputs[0])
        joins = all(v is not None and v.name in self.chosen for v in node.inputs)
        if joins and not output.is_graph_output():
            self.integer.add(_name(node))
            self._choose(output)

    def _add_movement(self, node: ir.Node) -> None:
        x = node.inputs[0]
        if x is None or x.name not in self.chosen or not _moves_codes(node):
            return
        for y in _moved(node):
            self._choose(y)
            self.same_range[y.name or ""] = x.name or ""

    def _add_shortcuts(self, nodes: list[ir.Node]) -> None:
        """What is added to the output of a layer, which itself stays float to be fused."""
        for node in nodes:
            if node.op_type != "Add":
                continue
            terms = [v for v in node.inputs if v is not None and v.const_value is None]
            straight = [value for value in terms if self._is_fused(value)]
            if straight and len(terms) == 2:
                self._choose(terms[1] if straight[0] is terms[0] else terms[0])

    def _is_fused(self, value: ir.Value) -> bool:
        """Whether ``value`` goes from an integer layer to one reader, and nowhere else."""
        producer = value.producer()
        return is_read_once(value) and producer is not None and _name(producer) in self.integer

    def _add_everything(self) -> None:
        """Each float tensor of the graph, and the constants of arithmetic."""
        for value in self.model.graph.inputs:
            self._choose_float(value)
        for node in self.model.graph:
            standard = _is_standard(node)
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
        self.chosen.setdefault(value.name or "", value)

    def _absorbed(self, value: ir.Value) -> ir.Value:
        """The tensor that carries the Q: behind an activation that the Q absorbs."""
        consumers = value.consumers()
        if len(consumers) == 1 and not value.is_graph_output():
            node = consumers[0]
            known = node.op_type in self.target.absorbed and _is_standard(node)
            if known and node.graph is self.model.graph and _starts_at_zero(node):
                return node.outputs[0]
        return value

    def _drop_idle_movement(self) -> None:
        """Without an integer consumer, moved codes gain nothing: end the region before."""
        for node in reversed(list(self.model.graph)):
            moved = [value for value in _moved(node) if value.name in self.same_range]
            if not any(self._feeds_integer(value) for value in moved):
                for value in moved:
                    del self.chosen[value.name or ""], self.same_range[value.name or ""]

    def _feeds_integer(self, value: ir.Value) -> bool:
        return any(
            _name(node) in self.integer
            or any(self.same_range.get(v.name or "") == value.name for v in node.outputs)
            for node in value.consumers()
        )

    def _spec(self, name: str) -> QuantSpec:
        """The spec of a tensor.

        What layers read has the bits asked for, or those of first and last layers;
        a tensor that is only added or pooled costs nothing at 8 bits and has no fewer.
        """
        readers = [layer for layer in self.layers if self._root(layer.x) == self._root(name)]
        bits: list[int] = [self.config.act_bits]
        if not readers:
            bits.append(8)
        if any(layer.first_or_last for layer in readers):
            bits.append(self.config.first_last_bits)
        producer = self.chosen[name].producer()
        fixed = producer is not None and producer.op_type in self.target.unit_range
        return QuantSpec(
            bits=max(bits),
            signed=self.target.activation_signed,
            symmetric=self.target.activation_symmetric,
            least_range=self.target.least_range,
            fixed_range=_unit_range(producer.op_type, max(bits)) if fixed and producer else None,
        )

    def _root(self, name: str) -> str:
        while name in self.same_range:
            name = self.same_range[name]
        return name


def _unit_range(op_type: str, bits: int) -> tuple[float, float]:
    """The open range of a squashing function whose steps are powers of two."""
    low = 0.0 if op_type == "Sigmoid" else -1.0
    return low, 1.0 - (1.0 - low) / 2**bits


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")


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
    """The outputs of a movement node that carry codes; that of a MaxPool's indices does not."""
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
