"""QDQ models node by node, sound or broken in one point."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper


class Builder:
    """Collects nodes and initialisers; a node is named after its output."""

    def __init__(self, opset: int = 21, ir_version: int = 10) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.opset, self.ir_version = opset, ir_version
        self.rng = np.random.default_rng(0)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: str = "FLOAT") -> str:
        array = np.asarray(values)
        kind = TensorProto.DataType.Value(dtype)
        self.constants[name] = helper.make_tensor(name, kind, array.shape, array.ravel().tolist())
        return name

    def _params(self, name: str, scale: Any, point: Any, dtype: str) -> list[str]:
        scales = np.asarray(scale, np.float32)
        params = [self.constant(f"{name}/scale", scales)]
        if point is not None:
            points = point if np.ndim(point) else np.full(scales.shape, point, np.int64)
            params.append(self.constant(f"{name}/point", points, dtype))
        return params

    def qdq(
        self, x: str, name: str, dtype: str = "UINT8", scale: Any = 0.05, point: Any = 0,
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Q and DQ behind ``x``; nodes ``NAME/q`` and ``NAME/dq``."""
        params = self._params(name, scale, point, dtype)
        codes = self.node("QuantizeLinear", [x, *params], f"{name}/q", **attributes)
        return self.node("DequantizeLinear", [codes, *params], f"{name}/dq", **attributes)

    def weight(
        self, name: str, shape: tuple[int, ...], dtype: str = "INT8", scale: Any = None,
        point: Any = 0, cast: bool = False, highest: int = 60, **attributes: Any,
    ) -> str:  # fmt: skip
        """Random codes and a DQ, along axis 0 unless told otherwise."""
        low, high = {"INT2": (-2, 2), "INT4": (-8, 8)}.get(dtype, (0, highest))
        codes = self.constant(f"{name}/codes", self.rng.integers(low, high, shape), dtype)
        if cast:
            codes = self.node("Cast", [codes], f"{name}/cast", to=int(TensorProto.INT8))
            dtype = "INT8"
        attributes.setdefault("axis", 0)
        scales = np.full(shape[attributes["axis"]], 0.01) if scale is None else scale
        params = self._params(name, scales, point, dtype)
        return self.node("DequantizeLinear", [codes, *params], f"{name}/dq", **attributes)

    def bias(self, name: str, scale: Any, dtype: str = "INT32") -> str:
        """Small codes and a DQ."""
        scales = np.asarray(scale, np.float32)
        codes = self.constant(f"{name}/codes", self.rng.integers(-20, 20, scales.shape), dtype)
        params = self._params(name, scales, 0, dtype)
        return self.node("DequantizeLinear", [codes, *params], f"{name}/dq", axis=0)

    def build(self, y: str, x: tuple[Any, ...] = ("N", 4, 6, 6)) -> ir.Model:
        """The checked model with input ``x`` and output ``y``."""
        made = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            list(self.constants.values()),
        )  # fmt: skip
        proto = helper.make_model(
            made, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.ir_version
        )
        proto = onnx.shape_inference.infer_shapes(proto)
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)
