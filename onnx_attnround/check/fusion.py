"""How layers run: read from what the runtime made of the model, where it can run."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.check import openvino_session
from onnx_attnround.check.view import DEQUANTISE, Layer, View
from onnx_attnround.check.why_float import reason
from onnx_attnround.errors import ModelError, OutputError
from onnx_attnround.graph import attributes_of
from onnx_attnround.graph.scratch import scratch
from onnx_attnround.ops import count_macs
from onnx_attnround.runtime.session import open_session

# The weighted ops that ONNX Runtime's fusions leave where a layer runs in integer.
INTEGER_OPS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
    "QLinearConv", "QLinearMatMul",
})  # fmt: skip
UNPACKING_OP = "MatMulNBits"
"""The operator of ONNX Runtime that unpacks low-bit weights while it multiplies."""

_RENAMED = r"(/MatMulAddFusion|_token_\d+)+$"
"""The endings that optimisers add to the name of a node."""
_UNWRITTEN = "Protobuf serialization failed"
"""The words of ONNX Runtime for an optimised model that it cannot write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """The layers with constant weights, by the way in which ``runtime`` runs them.

    ``measured`` if that was read from the runtime; else it follows from its rules.
    ``weight_only`` maps the layers whose weights alone are quantised, as those of a
    model with float activations are, to what runs them: a kernel that reads such
    weights, or else the op, which they are unpacked for. ``fallen`` maps other layers in
    float to the reason. ``macs`` are multiply-accumulates for one sample, ``None`` where
    shapes are unknown.
    """

    runtime: str
    measured: bool
    integer: tuple[str, ...]
    fallen: Mapping[str, str]
    macs: Mapping[str, int | None]
    weight_only: Mapping[str, str] = field(default_factory=dict)

    @property
    def integer_share(self) -> float | None:
        """The share of all multiply-accumulates in integer; ``None`` if some are unknown."""
        known = [count for count in self.macs.values() if count is not None]
        if len(known) < len(self.macs) or not sum(known):
            return None
        return sum(self.macs[node] or 0 for node in self.integer) / sum(known)


def find_fusion(view: View) -> Fusion:
    """How the target's runtime runs each layer; raises ``ModelError`` if it refuses the model."""
    seen = _SEEN.get(view.target.runtime)
    if seen is None or (view.target.runtime == "openvino" and not openvino_session.available()):
        return expected_fusion(view)
    runtime, kernels = seen(view)
    return _fusion(view, runtime, kernels, measured=True)


def expected_fusion(view: View) -> Fusion:
    """How the runtime should run each layer, by its rules."""
    kernels = {
        layer.name: layer.node.op_type for layer in view.layers if reason(view, layer) is None
    }
    return _fusion(view, view.target.runtime, kernels, measured=False)


def refused_fusion(fusion: Fusion) -> Fusion:
    """The fusion of a file that does not run, so that no layer of it does."""
    layers = {**dict.fromkeys(fusion.macs, "the file is refused"), **fusion.fallen}
    return replace(fusion, measured=False, integer=(), weight_only={}, fallen=layers)


def _fusion(view: View, runtime: str, kernels: Mapping[str, str], *, measured: bool) -> Fusion:
    """``kernels`` are what runs layers other than in float, by the names of their nodes."""
    some_integer = any(view.activations(DEQUANTISE))
    weight_only = {
        layer.name: kernels.get(layer.name, layer.node.op_type)
        for layer in view.layers
        if layer.weight is not None and layer.x is None
        if layer.name in kernels or not some_integer
    }
    rest = [layer for layer in view.layers if layer.name not in weight_only]
    return Fusion(
        runtime=runtime,
        measured=measured,
        integer=tuple(layer.name for layer in rest if layer.name in kernels),
        weight_only=weight_only,
        fallen={
            layer.name: reason(view, layer) or "the runtime did not fuse it, for no known reason"
            for layer in rest
            if layer.name not in kernels
        },
        macs={layer.name: _macs(layer) for layer in view.layers},
    )


def _macs(layer: Layer) -> int | None:
    node = layer.node
    x, weight, y = (_shape(value) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if weight is None or None in weight:
        return None
    return count_macs(node.op_type, attributes_of(node), [d for d in weight if d is not None], x, y)


def _shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def _seen_by_ort(view: View) -> tuple[str, dict[str, str]]:
    """Kernels that take integers, by the names of the nodes in the graph that was optimised."""
    signed = view.target.activation_signed
    with scratch(Path(tempfile.gettempdir())) as folder:
        path = folder / "optimised.onnx"
        try:
            open_session(view.model, signed_activations=signed, optimised_model=path)
        except ModelError as error:
            if _UNWRITTEN not in str(error):
                raise
            raise OutputError(
                f"cannot write a temporary file to '{folder.parent}'; free some disk space there, "
                "or set TMPDIR to a larger disk"
            ) from error
        nodes = onnx.load(path, load_external_data=False).graph.node
    found = {n.name: n.op_type for n in nodes if n.op_type in INTEGER_OPS | {UNPACKING_OP}}
    plain = {re.sub(_RENAMED, "", name): kernel for name, kernel in found.items()}
    return f"ONNX Runtime {ort.__version__}", plain | found


def _seen_by_openvino(view: View) -> tuple[str, dict[str, str]]:
    """Kernels of the layers, by the types of what OpenVINO chose."""
    compiled = openvino_session.compile_model(view.model)
    kernels = {bits: openvino_session.integer_kernels(compiled, bits=bits) for bits in (4, 8)}
    found = {
        layer.name: kernel
        for layer in view.layers
        for kernel, origins in kernels[4 if layer.x is None else 8]
        if _origins(layer) & origins
    }
    return f"OpenVINO {openvino_session.version()}", found


def _origins(layer: Layer) -> set[str]:
    """The names that OpenVINO may give a node: its own, or its output's if that ends the graph.

    Behind a scale per channel, which the kernel applies, all that is left may be its name.
    """
    output = layer.node.outputs[0].name or ""
    names = {layer.name, f"{layer.name}/WithoutBiases", output, f"{output}_original"}
    return names | {f"{name}/DequantizationMultiply" for name in names}


_SEEN: dict[str, Callable[[View], tuple[str, dict[str, str]]]] = {
    "onnxruntime": _seen_by_ort,
    "openvino": _seen_by_openvino,
}
