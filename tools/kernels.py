"""How long ONNX Runtime takes for forms of a layer: integer attention, convolution as a product.

    python tools/kernels.py attention [--rounds 30]
    python tools/kernels.py convolution [--rounds 30]

Prints a Markdown table, a line for each shape: the least milliseconds of each form on one thread,
the forms taking turns. Attention is ``softmax(q k / 8) v`` with both products in float, in integer
(Q and DQ before each, which ONNX Runtime fuses), and with one of the two. A convolution is float,
integer (its output quantised), and the product of its patches and a matrix, with a range of
the patches that is fixed, or that of each run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnx_attnround.graph import from_proto
from onnx_attnround.runtime.session import open_session

ATTENTION = [(12, 32, 24), (12, 32, 128), (12, 32, 512), (6, 64, 257), (12, 64, 512)]
"""Heads, their width, tokens: of MiniLM, of a ViT-S, of a BERT."""
CONVOLUTION = [(256, 512, 5, 512), (384, 384, 3, 1500), (128, 128, 9, 500), (384, 1536, 1, 200)]
"""Input channels, output channels, kernel, length."""
CONSTANTS = {
    "s": np.float32(0.05),
    "z": np.uint8(128),
    "ps": np.float32(1 / 255),
    "pz": np.uint8(0),
    "eighth": np.float32(0.125),
}
Form = tuple[list[str], Mapping[str, np.ndarray]]


def main() -> None:
    """Time what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("attention", "convolution"))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.what == "attention":
        for number, shape in enumerate(ATTENTION):
            heads, width, tokens = shape
            sizes = {"q": (tokens, width), "k": (width, tokens), "v": (tokens, width)}
            feeds = {name: _noise(1, heads, *size) for name, size in sizes.items()}
            _print(number, shape, _attention_forms(), feeds, options.rounds)
        return
    for number, shape in enumerate(CONVOLUTION):
        feeds = {"x": _noise(1, shape[0], shape[3])}
        _print(number, shape, _convolution_forms(*shape[:3]), feeds, options.rounds)


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _coded(name: str, scale: str = "s", point: str = "z") -> str:
    return f"""{name}_c = QuantizeLinear({name}, {scale}, {point})
        {name}_d = DequantizeLinear({name}_c, {scale}, {point})"""


def _attention_forms() -> dict[str, Form]:
    def form(qk: bool, pv: bool) -> Form:
        q, k = ("q_d", "k_d") if qk else ("q", "k")
        p, v = ("p_d", "v_d") if pv else ("p", "v")
        lines = [_coded("q"), _coded("k")] * qk + [_coded("v")] * pv
        lines += [f"a = MatMul({q}, {k})", "b = Mul(a, eighth)", "p = Softmax<axis=-1>(b)"]
        lines += [_coded("p", "ps", "pz")] * pv + [f"y = MatMul({p}, {v})"]
        return lines, {}

    return {
        "float": form(False, False),
        "q k": form(True, False),
        "p v": form(False, True),
        "both": form(True, True),
    }


def _convolution_forms(inputs: int, outputs: int, kernel: int) -> dict[str, Form]:
    weight = _noise(outputs, inputs, kernel)
    codes = np.clip(np.rint(weight * 20), -64, 64).astype(np.int8)
    per_row = {"ws": np.full(outputs, 0.05, np.float32), "wz": np.zeros(outputs, np.int8)}
    pad = kernel // 2
    matrix = np.ascontiguousarray(codes.transpose(2, 1, 0).reshape(-1, outputs))
    edges = {
        f"{end}{tap}": np.array([at])
        for tap in range(kernel)
        for end, at in (("b", tap), ("e", tap - (kernel - 1) or 1 << 62))
    }
    constants = {"w": matrix, **per_row, **edges, "ax": np.array([1]),
                 "pads": np.array([0, pad, 0, 0, pad, 0])}  # fmt: skip
    taps = [f"t{tap} = Slice(p, b{tap}, e{tap}, ax)" for tap in range(kernel)]
    patches = ["t = Transpose<perm=[0,2,1]>(x)", "p = Pad(t, pads)", *taps,
               f"c = Concat<axis=-1>({', '.join(f't{tap}' for tap in range(kernel))})"]  # fmt: skip
    product = ["wd = DequantizeLinear<axis=1>(w, ws, wz)", "m = MatMul(c_d, wd)",
               "y = Transpose<perm=[0,2,1]>(m)"]  # fmt: skip
    found = "c_c, c_s, c_z = DynamicQuantizeLinear(c)  c_d = DequantizeLinear(c_c, c_s, c_z)"
    conv = f"Conv<pads=[{pad},{pad}]>"
    return {
        "float": ([f"y = {conv}(x, w)"], {"w": weight}),
        "integer": (
            [_coded("x"), "wd = DequantizeLinear<axis=0>(w, ws, wz)", f"o = {conv}(x_d, wd)",
             _coded("o"), "y = Identity(o_d)"],
            {"w": codes, **per_row},
        ),
        "product, fixed range": ([*patches, _coded("c"), *product], constants),
        "product, range of each run": ([*patches, found, *product], constants),
    }  # fmt: skip


def _model(form: Form, feeds: Mapping[str, np.ndarray]) -> ir.Model:
    lines, own = form
    given = ", ".join(
        f"float[{','.join(f'{name}_{axis}' for axis in range(values.ndim))}] {name}"
        for name, values in feeds.items()
    )
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({given}) => (float[] y) {{ '
    proto = onnx.parser.parse_model(text + "\n".join(lines) + " }")
    read = {name for node in proto.graph.node for name in node.input}
    constants = {name: value for name, value in {**CONSTANTS, **own}.items() if name in read}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    return from_proto(proto)


def _print(
    number: int,
    shape: Sequence[int],
    forms: Mapping[str, Form],
    feeds: Mapping[str, np.ndarray],
    rounds: int,
) -> None:
    if number == 0:
        print(f"| shape | {' | '.join(forms)} |\n|---{'|--:' * len(forms)}|")
    sessions = [open_session(_model(form, feeds), threads=1) for form in forms.values()]
    least = np.full(len(sessions), np.inf)
    for _ in range(rounds):
        for at, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, dict(feeds))
            least[at] = min(least[at], time.perf_counter() - start)
    told = " | ".join(f"{1000 * seconds:.2f}" for seconds in least)
    print(f"| {' × '.join(map(str, shape))} | {told} |", flush=True)


if __name__ == "__main__":
    main()
