"""The only writer of Q/DQ nodes: a float model and integer codes become a QDQ model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import least_ir_version, name_nodes, only_reader, raise_opset
from onnx_attnround.ops import clip_bounds, clipped_line
from onnx_attnround.qdq.arithmetic import quantize
from onnx_attnround.qdq.storage import activation_type, code_type, required_opset
from onnx_attnround.qdq.stored import store_weights
from onnx_attnround.qdq.tables import quantize_tables
from onnx_attnround.records import (
    MATRIX_OPS,
    Array,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    QuantSpec,
)
from onnx_attnround.targets import WeightStorage

_PACKED = {"INT2": ml_dtypes.int2, "INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4}


def insert(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    storage: WeightStorage,
) -> ir.Model:
    """A QDQ copy of ``model``; the opset is raised only as far as the content needs.

    ``params`` holds one entry per tensor of ``plan.activations``; ``roundings``
    is keyed by node name. A quantised tensor keeps its name behind the
    DequantizeLinear, so that graph outputs keep theirs; the float value before
    the QuantizeLinear is ``NAME_raw``, or another name where that is taken. Raises
    ``ModelError`` if the opset cannot be raised.
    """
    out = raise_opset(model.clone(), required_opset(plan, params, roundings, storage))
    writer = _Writer(out, plan, params, storage)
    for layer in plan.layers:
        writer.add_layer(layer, roundings[layer.node])
    for name in plan.activations:
        writer.add_activation(name)
    writer.remove_unused_initializers()
    quantize_tables(out, plan.tables)
    store_weights(out, plan.stored)
    out.graph.sort()
    name_nodes(out)  # a model that is quantised in part may have nodes of the same names
    out.ir_version = min(out.ir_version, least_ir_version(out))  # so that old runtimes read it
    return out


def update_layer(
    model: ir.Model,
    layer: LayerPlan,
    rounding: LayerRounding,
    params: Mapping[str, QuantParams],
    plan: QuantPlan,
) -> None:
    """Give ``layer`` other codes, scales and bias in a model that ``insert`` wrote as int8.

    Raises ``ModelError`` if a bias that was stored as int32 does not fit it any more.
    """
    tensors = _layer_tensors(layer, rounding, params, plan, "int8")
    node = next(node for node in model.graph if node.name == layer.node)
    written = [source for value in node.inputs[1:3] for source in _sources(value)]
    if len(written) != len(tensors):
        raise ModelError(
            f"node '{layer.node}': its bias does not fit int32 at the scale of its weights; "
            "exclude the node"
        )
    for value, tensor in zip(written, tensors, strict=True):
        tensor.name = value.name
        value.const_value = tensor


def update_scale(model: ir.Model, name: str, params: QuantParams) -> None:
    """Give the tensor ``name`` another scale in a model that ``insert`` wrote."""
    node = next((node for node in model.graph if node.name == f"{name}/quantize"), None)
    scale = None if node is None else node.inputs[1]
    if scale is not None:
        scale.const_value = _tensor(params.scale, ir.DataType.FLOAT, scale.name or "")


def _sources(value: ir.Value | None) -> list[ir.Value]:
    """The initialisers that a DequantizeLinear makes ``value`` from, or itself."""
    producer = None if value is None else value.producer()
    values = [value] if producer is None else producer.inputs
    return [source for source in values if source is not None]


def _is_idle(node: ir.Node | None, params: QuantParams) -> bool:
    """Whether the Q behind a node does its work, too: of a Relu, a Clip or an Identity."""
    if node is None or node.op_type not in ("Relu", "Clip"):
        return node is not None and node.op_type == "Identity"
    values = np.array(clip_bounds(node), np.float32)
    spec, point = params.spec, params.zero_point.astype(np.float32)
    codes = quantize(values, params.scale, point, spec.qmin, spec.qmax)
    return bool(codes[0] == spec.qmin and codes[1] == spec.qmax)


def _tensor(values: Array, dtype: ir.DataType, name: str) -> ir.Tensor[Array]:
    packed = _PACKED.get(dtype.name)
    if packed is not None and values.dtype == np.int8:
        return ir.Tensor(values.view(packed), dtype=dtype, name=name)  # the same bytes
    return ir.Tensor(values.astype(packed or dtype.numpy(), copy=False), dtype=dtype, name=name)


def _layer_tensors(
    layer: LayerPlan,
    rounding: LayerRounding,
    params: Mapping[str, QuantParams],
    plan: QuantPlan,
    storage: WeightStorage,
) -> list[ir.Tensor[Array]]:
    """The initialisers of one layer: weight codes, scale, zero point and the bias."""
    base = layer.node
    stored = code_type(layer, rounding.spec, params, storage, plan.target)
    unpacked = storage != "int4" and layer.x in params  # before the DQ, for an integer kernel
    point_type = ir.DataType.INT8 if unpacked else stored
    values = [rounding.codes, rounding.scale, rounding.zero_point]
    if _is_turned(layer, params):
        values = [array.T for array in values]
    tensors = [
        _tensor(values[0], stored, f"{base}/weight_codes"),
        _tensor(values[1], ir.DataType.FLOAT, f"{base}/weight_scale"),
        _tensor(values[2], point_type, f"{base}/weight_zero_point"),
    ]
    if rounding.bias is not None:
        tensors += _bias_tensors(layer, rounding, params, plan)
    return tensors


def _is_turned(layer: LayerPlan, params: Mapping[str, QuantParams]) -> bool:
    """Whether the weight is written transposed: kernels for float inputs want no transB."""
    turned = layer.op_type == "Gemm" and bool(layer.attributes.get("transB", 0))
    return turned and layer.x not in params


def _bias_tensors(
    layer: LayerPlan,
    rounding: LayerRounding,
    params: Mapping[str, QuantParams],
    plan: QuantPlan,
) -> list[ir.Tensor[Array]]:
    if rounding.bias is None:
        return []
    scale = bias_scale(layer, rounding, params, plan)
    if scale is None:
        return [_tensor(rounding.bias, ir.DataType.FLOAT, f"{layer.node}/bias")]
    codes = np.rint(rounding.bias.astype(np.float64) / scale)
    return [  # without a zero point, which ONNX has for no INT32, and WebGPU refuses
        _tensor(codes, ir.DataType.INT32, f"{layer.node}/bias_codes"),
        _tensor(scale, ir.DataType.FLOAT, f"{layer.node}/bias_scale"),
    ]


def bias_scale(
    layer: LayerPlan,
    rounding: LayerRounding,
    params: Mapping[str, QuantParams],
    plan: QuantPlan,
) -> Array | None:
    """``sx * sw`` per channel where the target stores the bias as int32, else ``None``.

    ``None`` also where a bias would not fit int32 at that scale, where the scale is another
    in each run, and for ops that do not run in integer: it then stays float.
    """
    x, target = params.get(layer.x), plan.target
    if rounding.bias is None or x is None:
        return None
    if x.spec.dynamic or not target.int32_bias or layer.op_type not in target.weighted:
        return None
    # Groups of a ConvTranspose share the scales of their channels, so that these repeat.
    scale = np.resize(rounding.scale * x.scale, rounding.bias.shape).astype(np.float32)
    fits = np.abs(rounding.bias.astype(np.float64)) <= scale.astype(np.float64) * (2**31 - 1)
    return scale if bool((fits & (scale >= np.finfo(np.float32).tiny)).all()) else None


def _scale_axes(rounding: LayerRounding, *, turned: bool) -> dict[str, int]:
    """The attributes of a weight's DequantizeLinear; those of blocks tell the inputs' axis."""
    spec = rounding.spec
    if spec.axis is None or rounding.scale.ndim == 0:
        return {}
    axis = 1 - spec.axis if turned else spec.axis
    if spec.block_size is None:
        return {"axis": axis}
    return {"axis": 1 - axis, "block_size": spec.block_size}


def _names(graph: ir.Graph) -> set[str | None]:
    outputs = (value for node in graph for value in node.outputs)
    return {value.name for value in (*graph.inputs, *graph.initializers.values(), *outputs)}


class _Writer:
    """Adds Q/DQ nodes and their initialisers to one graph."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        params: Mapping[str, QuantParams],
        storage: WeightStorage,
    ) -> None:
        self.graph = model.graph
        self.plan = plan
        self.params = params
        self.storage: WeightStorage = storage
        self.nodes = {node.name: node for node in self.graph}
        self.values = {v.name: v for node in self.graph for v in node.outputs}
        self.values.update({v.name: v for v in self.graph.inputs})
        self.taken = {name for graph in model.graphs() for name in _names(graph)}

    def add_layer(self, layer: LayerPlan, rounding: LayerRounding) -> None:
        """Codes and DQ in place of the float weight, and the bias as the target wants it."""
        node = self.nodes[layer.node]
        tensors = _layer_tensors(layer, rounding, self.params, self.plan, self.storage)
        codes, scale, zero_point, *bias = [self._initializer(tensor) for tensor in tensors]
        if codes.dtype != zero_point.dtype:
            codes = self._cast(codes, f"{layer.node}/weight_int8", node)
        turned = _is_turned(layer, self.params)
        attributes = _scale_axes(rounding, turned=turned)
        weight = self._dequantise(
            [codes, scale, zero_point], f"{layer.node}/weight", attributes, node
        )
        node.replace_input_with(1, weight)
        if turned:
            node.attributes.pop("transB")
        if self.plan.target.runtime == "onnxruntime":
            if layer.x in self.params:
                self._part_from_bias(node, layer)
            else:
                self._part_from_relu(node)
        if bias:
            value = bias[0]
            if len(bias) > 1:
                value = self._dequantise(bias, f"{layer.node}/bias", {"axis": 0}, node)
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, value)

    def _part_from_relu(self, node: ir.Node) -> None:
        """Max with 0 in place of a Relu behind a matrix with low-bit weights and a float input.

        ONNX Runtime makes no MatMulNBits of a matrix before a Relu that one node reads.
        """
        relu = only_reader(node.outputs[0])
        if relu is None or relu.op_type != "Relu" or only_reader(relu.outputs[0]) is None:
            return
        if node.op_type in MATRIX_OPS:
            zero = self._initializer(_tensor(np.zeros(()), ir.DataType.FLOAT, f"{relu.name}/zero"))
            relu.op_type = "Max"
            relu.resize_inputs(2)
            relu.replace_input_with(1, zero)

    def _part_from_bias(self, node: ir.Node, layer: LayerPlan) -> None:
        """A bias of the rank of the product, in place of a row that is added to a MatMul.

        ONNX Runtime makes a Gemm of a MatMul of known shape and the row behind it, before it
        looks for Q/DQ, and that Gemm computes in float.
        """
        product, rank = node.outputs[0], len(layer.input_shape or ())
        add = only_reader(product)
        if node.op_type != "MatMul" or add is None or add.op_type != "Add" or rank < 2:
            return
        index = 1 - add.inputs.index(product)
        row = add.inputs[index]
        if row is None or row.const_value is None:
            return
        values = row.const_value.numpy()
        if values.shape != layer.weight_shape[1:]:
            return
        values = values.reshape(*(1,) * (rank - 1), -1)
        bias = _tensor(values, row.const_value.dtype, f"{layer.node}/row")
        add.replace_input_with(index, self._initializer(bias))

    def add_activation(self, name: str) -> None:
        """Q and DQ behind the tensor ``name``, for all its consumers; DQ alone on a constant."""
        params = self.params[name]
        if name in self.graph.initializers:
            self._add_constant(self.graph.initializers[name], params)
            return
        raw = self.values[name]
        producer = raw.producer()
        consumers = [
            (usage.node, usage.idx)
            for usage in raw.uses()
            if usage.node.op_type not in self.plan.target.float_input
        ]
        takes_name = producer is not None and not self._stays_float(raw)
        if takes_name:
            raw.name = self._fresh(f"{name}_raw")
        narrow = params.spec.bits < 8 and name not in self.plan.same_range  # moved: clipped before
        source = raw
        op_type = None if producer is None else producer.op_type
        parts = op_type == "Identity" or (narrow and op_type == "Clip")  # a layer from its Q
        drops = parts or self.plan.target.drop_absorbed
        if drops and takes_name and producer is not None and _is_idle(producer, params):
            source = producer.inputs[0] or raw
        codes, scale, point = self._quantise(source, params, name)
        codes.shape = raw.shape
        if narrow:
            codes = self._clip_codes(codes, params.spec, name)
        dequantise = ir.node("DequantizeLinear", [codes, scale, point], name=f"{name}/dequantize")
        restored = dequantise.outputs[0]
        restored.name = name if takes_name else self._fresh(f"{name}_dequantized")
        restored.shape, restored.type = raw.shape, raw.type
        self.graph.append(dequantise)
        for node, index in consumers:
            node.replace_input_with(index, restored)
        for position, output in enumerate(self.graph.outputs):
            if output is raw and takes_name:
                self.graph.outputs[position] = restored
                restored.doc_string = raw.doc_string
                restored.metadata_props.update(raw.metadata_props)
        if source is not raw and producer is not None:
            self.graph.remove(producer, safe=True)

    def _quantise(
        self, source: ir.Value, params: QuantParams, name: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The codes of ``source``, of a range observed or of each run; scale and zero point."""
        if params.spec.dynamic:
            node = ir.node(
                "DynamicQuantizeLinear", [source], num_outputs=3, name=f"{name}/quantize"
            )
            codes, scale, point = node.outputs
            for value, end, dtype in (
                (scale, "scale", ir.DataType.FLOAT),
                (point, "zero_point", ir.DataType.UINT8),
            ):
                value.name, value.shape = self._fresh(f"{name}/{end}"), ir.Shape(())
                value.type = ir.TensorType(dtype)
        else:
            grid = scale, point = self._grid(params, name)
            producer = source.producer()
            if producer is not None and producer.op_type in self.plan.target.clipped_lines:
                grid = self._clip_line(producer, params, name)
            node = ir.node("QuantizeLinear", [source, *grid], name=f"{name}/quantize")
            codes = node.outputs[0]
        codes.name = self._fresh(f"{name}_codes")
        codes.type = ir.TensorType(activation_type(params.spec))
        self.graph.append(node)
        return codes, scale, point

    def _grid(self, params: QuantParams, name: str) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of an activation as constants."""
        code_type = activation_type(params.spec)
        scale = self._initializer(_tensor(params.scale, ir.DataType.FLOAT, f"{name}/scale"))
        point = self._initializer(_tensor(params.zero_point, code_type, f"{name}/zero_point"))
        return scale, point

    def _clip_line(
        self, node: ir.Node, params: QuantParams, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of a Q that is itself the HardSigmoid ``node`` before it.

        ``clip(a x + b, 0, 1)`` on a grid of the scale ``s`` is ``clip(round(x / (s/a)) + b/s)``. In
        place of the node stands a LeakyRelu of slope 1, which changes nothing: ONNX Runtime
        makes one lookup in a table of it, of the DQ before and of the Q.
        """
        (slope, height), code_type = clipped_line(node), activation_type(params.spec)
        node.op_type = "LeakyRelu"
        node.attributes.clear()
        node.attributes.add(ir.AttrFloat32("alpha", 1.0))
        scale = np.asarray(params.scale / slope, np.float32)
        point = np.rint(params.zero_point + height / params.scale)
        point = np.clip(point, params.spec.qmin, params.spec.qmax)
        return (
            self._initializer(_tensor(scale, ir.DataType.FLOAT, f"{name}/line_scale")),
            self._initializer(_tensor(point, code_type, f"{name}/line_zero_point")),
        )

    def _stays_float(self, value: ir.Value) -> bool:
        return value.is_graph_output() and not self.plan.target.quantised_outputs

    def _add_constant(self, constant: ir.Value, params: QuantParams) -> None:
        """Codes and DQ in place of a float constant, for all its consumers."""
        consumers = [(usage.node, usage.idx) for usage in constant.uses()]
        values, spec = constant.const_value, params.spec
        if values is None or not consumers:
            return
        zero = params.zero_point.astype(np.float32)
        with np.errstate(over="ignore"):  # of masks, which are clipped
            codes = quantize(values.numpy(), params.scale, zero, spec.qmin, spec.qmax)
        tensor = _tensor(codes, activation_type(spec), f"{constant.name}/codes")
        inputs = [self._initializer(tensor), *self._grid(params, constant.name or "")]
        restored = self._dequantise(inputs, constant.name or "", {}, consumers[0][0])
        for node, index in consumers:
            node.replace_input_with(index, restored)

    def _clip_codes(self, codes: ir.Value, spec: QuantSpec, name: str) -> ir.Value:
        """Codes narrower than their type, held in their range by a Clip on integers."""
        dtype = codes.dtype or ir.DataType.UINT8
        bounds = [
            self._initializer(_tensor(np.asarray(bound), dtype, f"{name}/{end}"))
            for bound, end in ((spec.qmin, "lowest"), (spec.qmax, "highest"))
        ]
        node = ir.node("Clip", [codes, *bounds], name=f"{name}/clip_codes")
        clipped = node.outputs[0]
        clipped.name, clipped.shape = self._fresh(f"{name}_clipped"), codes.shape
        clipped.type = codes.type
        self.graph.append(node)
        return clipped

    def remove_unused_initializers(self) -> None:
        """Drop float weights and biases that no node reads any more."""
        outputs = {value.name for value in self.graph.outputs}
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and name not in outputs:
                del self.graph.initializers[name]

    def _fresh(self, name: str) -> str:
        """``name``, with a number where the model has that already."""
        candidates = chain([name], (f"{name}_{number}" for number in count()))
        result = next(candidate for candidate in candidates if candidate not in self.taken)
        self.taken.add(result)
        return result

    def _initializer(self, tensor: ir.Tensor[Array]) -> ir.Value:
        tensor.name = self._fresh(tensor.name or "")
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _cast(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        node = ir.node(
            "Cast", [value], attributes={"to": int(ir.DataType.INT8)}, name=f"{name}/cast"
        )
        return self._place(node, name, value.shape, ir.DataType.INT8, before)

    def _dequantise(
        self, inputs: list[ir.Value], name: str, attributes: Mapping[str, int], before: ir.Node
    ) -> ir.Value:
        node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}/dequantize")
        return self._place(node, f"{name}_dequantized", inputs[0].shape, ir.DataType.FLOAT, before)

    def _place(
        self,
        node: ir.Node,
        name: str,
        shape: ir.Shape | None,
        dtype: ir.DataType,
        before: ir.Node,
    ) -> ir.Value:
        output = node.outputs[0]
        output.name, output.shape = self._fresh(name), shape
        output.type = ir.TensorType(dtype)
        self.graph.insert_before(before, node)
        return output
