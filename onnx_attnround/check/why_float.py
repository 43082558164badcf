"""Why a layer does not run in integer: the first reason that holds, for each runtime."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnx_attnround.check.view import Layer, Link, View, bias_fits
from onnx_attnround.graph import only_reader
from onnx_attnround.targets import Runtime

Reason = Callable[[View, Layer], str | None]


def reason(view: View, layer: Layer) -> str | None:
    """The reason why ``layer`` computes in float; ``None`` where none is known."""
    found = (why(view, layer) for why in REASONS[view.target.runtime])
    return next((text for text in found if text is not None), None)


def _float_operands(view: View, layer: Layer) -> str | None:
    if layer.weight is None:
        return "its weight is not quantised"
    return "its input is not quantised" if layer.x is None else None


def _op(view: View, layer: Layer) -> str | None:
    op = layer.node.op_type
    return None if op in view.target.weighted else f"the runtime has no integer {op}"


def _wide_activations(view: View, layer: Layer) -> str | None:
    wide = layer.x is not None and layer.x.codes.name in ("INT16", "UINT16")
    return "there is no integer kernel for 16-bit activations" if wide else None


def _weight_type(view: View, layer: Layer) -> str | None:
    """The codes that a DQ unpacks must have 8 bits; a Cast before it is folded."""
    codes = "" if layer.weight is None else layer.weight.codes.name
    if codes in ("INT8", "UINT8"):
        return None
    return f"there is no integer kernel for {codes} weights: store them as int8 or packed"


def _signs(view: View, layer: Layer) -> str | None:
    signed = layer.x is not None and layer.x.codes.name == "INT8"
    if signed and layer.weight is not None and layer.weight.codes.name == "UINT8":
        return "INT8 activations need INT8 weights"
    return None


def _blocks(view: View, layer: Layer) -> str | None:
    blocked = layer.weight is not None and layer.weight.blocked
    return "its weight has block-wise scales" if blocked else None


def _bias(view: View, layer: Layer) -> str | None:
    """An integer bias is INT32 at sx*sw; a float one hinders only a Gemm with a float output."""
    if layer.bias is not None:
        if layer.bias.codes.name != "INT32" or not bias_fits(layer):
            return "its bias is not INT32 with the scale of its input times that of its weight"
        return None
    biased = layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2
    if biased and view.quantised(layer.node.outputs[0]) is None:
        return "its bias and its output are float: Gemm then needs an INT32 bias"
    return None


def _joined(view: View, layer: Layer) -> str | None:
    """A MatMul of known shape and the Add behind it become a Gemm before Q/DQ are looked for."""
    product = layer.node.outputs[0]
    add = only_reader(product)
    if layer.node.op_type != "MatMul" or add is None or add.op_type != "Add":
        return None
    other = next((value for value in add.inputs if value is not product), None)
    if not _makes_gemm(layer.node.inputs[0], product, other):
        return None
    return (
        "ONNX Runtime joins it with the Add behind it, to a Gemm that computes in float: "
        "give the bias the shape [1, 1, outputs]"
    )


def _makes_gemm(x: ir.Value | None, product: ir.Value, added: ir.Value | None) -> bool:
    """Whether ``x @ weight = product`` and ``product + added`` have shapes of a Gemm.

    With more than two dimensions all of ``x`` must be known, and a row be added.
    """
    sizes, columns, row = (_dims(value) for value in (x, product, added))
    if not sizes or not columns or not row:
        return False
    known = all(isinstance(size, int) for size in (*sizes[1:], columns[-1], *row))
    if not known or (len(sizes) > 2 and not isinstance(sizes[0], int)):
        return False
    if len(row) == 1:
        return row[0] == columns[-1]
    both = len(sizes) == len(row) == 2
    return both and row[0] in (1, sizes[0]) and row[1] in (1, columns[-1])


def _dims(value: ir.Value | None) -> list[object]:
    return [] if value is None or value.shape is None else list(value.shape)


def _gemm(view: View, layer: Layer) -> str | None:
    if layer.node.op_type != "Gemm":
        return None
    if layer.weight is not None and not layer.weight.has_point:
        return "its weight has no zero point"
    factors = (layer.node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return None if all(factor == 1.0 for factor in factors) else "alpha or beta is not 1"


def _dynamic(view: View, layer: Layer) -> str | None:
    """A product of codes whose scale is computed is fused where it is a MatMul alone."""
    if layer.x is None or not layer.x.dynamic:
        return None
    if not view.target.dynamic:
        return "the range of its input is found in each run: there is no integer kernel for that"
    if layer.node.op_type == "MatMul":
        return None
    return (
        "the range of its input is found in each run, and ONNX Runtime multiplies such codes in "
        "MatMul alone: give it a fixed scale"
    )


def _output(view: View, layer: Layer) -> str | None:
    """A Conv runs in integer only if its output is quantised, with the type of its input."""
    if layer.node.op_type != "Conv" or layer.x is None:
        return None
    link = view.quantised(layer.node.outputs[0])
    if link is None:
        readers = [user.op_type for user in layer.node.outputs[0].consumers()]
        told = f"read by {', '.join(readers)}" if readers else "an output of the model"
        return f"its output is not quantised: it is {told}"
    if link.codes != layer.x.codes:
        return f"its output is {link.codes.name}, its input {layer.x.codes.name}"
    return _unabsorbed(view, layer, link)


def _unabsorbed(view: View, layer: Layer, link: Link) -> str | None:
    """A Relu vanishes into the Q behind it if 0 is the lowest code."""
    behind = only_reader(layer.node.outputs[0])
    lowest = -128 if link.codes.name == "INT8" else 0
    kept = link.point is not None and int(link.point.reshape(-1)[0]) != lowest
    if behind is not None and behind.op_type == "Relu" and kept:
        return "the Relu behind it is not absorbed: the zero point is not the lowest code"
    return None


def _signed_on_x86(view: View, layer: Layer) -> str | None:
    """ONNX Runtime makes some INT8 activations UINT8 there, and fuses no layer between the two."""
    signed = layer.x is not None and layer.x.codes.name == "INT8"
    if signed and not view.target.activation_signed:
        return "its input is INT8, which fuses on ARM (ort-arm), on x86-64 in part: make it UINT8"
    return None


_OPERANDS: tuple[Reason, ...] = (_op, _float_operands, _wide_activations)

REASONS: dict[Runtime, tuple[Reason, ...]] = {
    "onnxruntime": (
        *_OPERANDS, _dynamic, _weight_type, _signs, _blocks, _bias, _joined, _gemm, _output,
        _signed_on_x86,
    ),
    "openvino": (*_OPERANDS, _dynamic, _weight_type, _blocks),
    "tensorrt": (*_OPERANDS, _dynamic, _weight_type, _blocks),
    "qnn": (_op, _float_operands, _dynamic, _blocks),
}
