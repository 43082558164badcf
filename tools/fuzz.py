"""Broken, hostile and random models through ``quantize``: only its own errors may come out.

    python tools/fuzz.py [--count 1000] [--seed 0] [--minutes 10] [--keep FOLDER]

Three forms: ``bytes`` changes bytes of valid files; ``fields`` changes fields of valid models
(another name, type, dimension, an element twice or gone); ``graph`` makes random valid models,
which must be converted. Each runs in a worker process with a bound on time and memory. Prints
counts as Markdown and a line on each failure, whose model goes to ``--keep``; exits with 1 if
there is one. Case ``n`` depends on the seed and ``n`` alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_cases import FAILURES, Case, Outcome, judge_all, table

FORMS = ("bytes", "fields", "graph")
SEEDS = (
    """net (float[N,2,6,6] x) => (float[N,3] y) <float[4,2,3,3] w, float[4] b, float[4,3] v> {
        c = Conv<pads = [1,1,1,1]>(x, w, b)  r = Relu(c)  p = GlobalAveragePool(r)
        f = Flatten(p)  y = MatMul(f, v) }""",
    """net (float[N,3,4] x) => (float[N,3,5] y, float[N,3,4] z) <float[4,4] q, float[4,4] k,
        float[4,5] o, float[4] g, float half = {0.5}> {
        a = MatMul(x, q)  b = MatMul(x, k)  t = Transpose<perm = [0,2,1]>(b)  s = MatMul(a, t)
        m = Mul(s, half)  p = Softmax<axis = -1>(m)  z = MatMul(p, x)  n = Mul(z, g)
        y = MatMul(n, o) }""",
    """net (float[N,4] x, bool f) => (float[N,3] y) <float[4,4] v, float[4,3] w, float[4,3] u> {
        h = MatMul(x, v)  r = Clip(h)  y = If(f)<
        then_branch = t () => (float[N,3] p) { p = MatMul(r, w) },
        else_branch = e () => (float[N,3] q) { q = MatMul(r, u) }> }""",
    """net (float[2,3,8,8] x) => (float[2,2,8,8] y) <float[4,3,3,3] w, float[4] gamma,
        float[4] beta, float[4] mean, float[4] variance, float[4,2,2,2] u, int64[4] s = {0,0,0,0}> {
        c = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w)
        n = BatchNormalization(c, gamma, beta, mean, variance)  l = LeakyRelu(n)
        y = ConvTranspose<strides = [2,2]>(l, u) }""",
)
EXTREMES = (0, 1, -1, 2, 3, 7, 127, -128, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))


def seeds() -> list[onnx.ModelProto]:
    """Small valid models."""
    return [_model(text, opset) for text, opset in zip(SEEDS, (13, 17, 21, 11), strict=True)]


def _model(text: str, opset: int) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    rng = np.random.default_rng(0)
    known = {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.value_info:
        if info.name not in known:
            shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            data = np.abs(rng.normal(size=shape)).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(data, info.name))
    del proto.graph.value_info[:]
    return proto


# --- broken models ----------------------------------------------------------------------


def broken_bytes(rng: np.random.Generator, model: onnx.ModelProto) -> bytes:
    """The file with a few bytes changed, a piece gone, doubled, or the end cut off."""
    data = bytearray(model.SerializeToString())
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 30))
        what = rng.integers(40)
        if what < 20:
            data[at] ^= 1 << int(rng.integers(8))
        elif what < 37:
            data[at] = EXTREMES[rng.integers(8)] % 256
        elif what == 37:
            del data[at : at + size]
        elif what == 38:
            data[at:at] = data[at : at + size]
        else:
            del data[max(at, 1) :]
    return bytes(data)


def broken_fields(rng: np.random.Generator, model: onnx.ModelProto) -> bytes:
    """The model with one to three fields changed, so that the file still is a protobuf."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(model))
        message, field = places[rng.integers(len(places))]
        _change(rng, message, field, [p for p in places if p[1].type == field.type])
    return model.SerializeToString()


def _places(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, at any depth."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                yield from _places(child)


def _change(rng: np.random.Generator, message: Any, field: Any, alike: list[Any]) -> None:
    if field.is_repeated:
        _change_list(rng, getattr(message, field.name), field)
    elif rng.integers(8) == 0 or field.message_type is not None:
        message.ClearField(field.name)
    else:
        donor, other = alike[rng.integers(len(alike))]
        donated = getattr(donor, other.name)
        value = donated[0] if other.is_repeated else donated
        setattr(message, field.name, _changed(rng, field, value))


def _change_list(rng: np.random.Generator, values: Any, field: Any) -> None:
    at = int(rng.integers(len(values)))
    what = rng.integers(3)
    if what == 0:
        del values[at]
    elif field.message_type is None and what == 1:
        values[at] = _changed(rng, field, values[at])
    elif field.message_type is None:
        values.append(values[at])
    else:
        values.add().CopyFrom(values[at])


def _changed(rng: np.random.Generator, field: Any, donated: Any) -> Any:
    """An extreme value of the field's kind, or that of another field."""
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return FLOATS[rng.integers(len(FLOATS))]
    if field.cpp_type == field.CPPTYPE_ENUM:
        numbers = list(field.enum_type.values_by_number)
        return numbers[rng.integers(len(numbers))]
    if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_INT32, field.CPPTYPE_UINT64):
        wide = field.cpp_type != field.CPPTYPE_INT32
        least = 0 if field.cpp_type == field.CPPTYPE_UINT64 else -(2**63)
        fitting = [v for v in EXTREMES if v >= least and (wide or -(2**31) <= v < 2**31)]
        return fitting[rng.integers(len(fitting))]
    if isinstance(donated, bytes):
        return rng.bytes(int(rng.integers(0, 40)))
    return ("", donated, "x", "../up", "/etc/passwd", "a" * 5000, "\u00e9\n")[rng.integers(7)]


# --- random valid models ----------------------------------------------------------------


class Builder:
    """Grows a graph from ``x [N, channels, size, size]``, op by op."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.weights: dict[str, tuple[int, ...]] = {}
        self.tensors = {"x": (4, 8)}  # name: channels, size

    def model(self) -> onnx.ModelProto:
        for _ in range(self.rng.integers(3, 14)):
            step = self.STEPS[self.rng.integers(len(self.STEPS))]
            step(self, *self._pick())
        first = self._conv(*self._pick())
        pooled, flat, y = self._new(), self._new(), self._new()
        self.lines += [
            f"{pooled} = GlobalAveragePool({first})", f"{flat} = Flatten({pooled})",
            f"{y} = MatMul({flat}, {self._weight(self.tensors[first][0], 3)})",
        ]  # fmt: skip
        outputs = {first: "float[N,C,H,W]", y: "float[N,3]"}
        weights = ", ".join(
            f"float[{','.join(map(str, shape))}] {name}" for name, shape in self.weights.items()
        )
        ends = ", ".join(f"{kind} {name}" for name, kind in outputs.items())
        body = "\n".join(self.lines)
        opset = int(self.rng.integers(13, 22))
        return _model(f"net (float[N,4,8,8] x) => ({ends}) <{weights}> {{\n{body}\n}}", opset)

    def _pick(self) -> tuple[str, int, int]:
        names = list(self.tensors)[-4:]
        name = names[self.rng.integers(len(names))]
        return name, *self.tensors[name]

    def _new(self) -> str:
        return f"t{len(self.lines)}_{self.rng.integers(1_000_000)}"

    def _weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return name

    def _add(self, text: str, channels: int, size: int) -> str:
        name = self._new()
        self.lines.append(f"{name} = {text}")
        self.tensors[name] = channels, size
        return name

    def _conv(self, x: str, channels: int, size: int) -> str:
        outputs = int(self.rng.choice([1, 2, 4, 6]))
        group = channels if outputs % channels == 0 and self.rng.integers(2) else 1
        kernel = int(self.rng.choice([1, 3]))
        weight = self._weight(outputs, channels // group, kernel, kernel)
        bias = f", {self._weight(outputs)}" if self.rng.integers(2) else ""
        pads = [kernel // 2] * 4
        conv = f"Conv<pads = {pads}, group = {group}>({x}, {weight}{bias})"
        return self._add(conv, outputs, size)

    def _transposed(self, x: str, channels: int, size: int) -> None:
        if size <= 16:
            weight = self._weight(channels, 3, 2, 2)
            self._add(f"ConvTranspose<strides = [2,2]>({x}, {weight})", 3, 2 * size)

    def _unary(self, x: str, channels: int, size: int) -> None:
        names = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softplus", "HardSigmoid", "Identity",
                 "Softmax<axis = 1>", "Abs", "Elu")  # fmt: skip
        op = names[self.rng.integers(len(names))]
        self._add(f"{op}({x})", channels, size)

    def _pool(self, x: str, channels: int, size: int) -> None:
        op = ("MaxPool", "AveragePool")[self.rng.integers(2)]
        if size % 2 == 0:
            self._add(f"{op}<kernel_shape = [2,2], strides = [2,2]>({x})", channels, size // 2)

    def _join(self, x: str, channels: int, size: int) -> None:
        alike = [n for n, (_, s) in self.tensors.items() if s == size]
        other = alike[self.rng.integers(len(alike))]
        others = self.tensors[other][0]
        if others == channels and self.rng.integers(2):
            op = ("Add", "Mul", "Sub", "Max")[self.rng.integers(4)]
            self._add(f"{op}({x}, {other})", channels, size)
        else:
            self._add(f"Concat<axis = 1>({x}, {other})", channels + others, size)

    def _move(self, x: str, channels: int, size: int) -> None:
        op = ("Transpose<perm = [0,1,3,2]>", "SpaceToDepth<blocksize = 1>", "Dropout")
        self._add(f"{op[self.rng.integers(3)]}({x})", channels, size)

    def _norm(self, x: str, channels: int, size: int) -> None:
        rows = ", ".join(self._weight(channels) for _ in range(4))
        self._add(f"BatchNormalization({x}, {rows})", channels, size)

    def _dense(self, x: str, channels: int, size: int) -> None:
        self._add(f"MatMul({x}, {self._weight(size, size)})", channels, size)

    STEPS = (_conv, _conv, _conv, _transposed, _unary, _unary, _pool, _join, _join, _move, _norm,
             _dense)  # fmt: skip


def random_model(rng: np.random.Generator, model: onnx.ModelProto) -> bytes:
    """A valid model; ``model`` is not used."""
    return Builder(rng).model().SerializeToString()


MAKERS = dict(zip(FORMS, (broken_bytes, broken_fields, random_model), strict=True))


def cases(seed: int, numbers: range) -> Iterator[Case]:
    """The cases of these numbers."""
    for number in numbers:
        form = FORMS[number % len(FORMS)]
        rng = np.random.default_rng((seed, number))
        known = seeds()
        model = known[rng.integers(len(known))]
        yield Case(f"{seed}/{number}", form, MAKERS[form](rng, model), ())


def failed(one: Outcome) -> bool:
    """Whether a case ended as none may: a valid model must be converted."""
    return one.kind in FAILURES or (one.case.form == "graph" and one.kind != "converted")


def main() -> int:
    """Make, judge, print, and say with the exit code whether anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10, help="bound for all cases together")
    parser.add_argument("--seconds", type=float, default=60, help="bound for one case")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the models that failed")
    options = parser.parse_args()
    start = time.monotonic()

    def told(one: Outcome) -> None:
        if failed(one):
            print(f"{one.case.name} ({one.case.form}): {one.kind}: {one.why}", flush=True)
            if options.keep is not None:
                name = f"{one.case.name.replace('/', '-')}.onnx"
                (options.keep / name).write_bytes(one.case.model)

    outcomes: list[Outcome] = []
    end = options.first + options.count
    for first in range(options.first, end, 60):
        if time.monotonic() - start > 60 * options.minutes:
            break
        block = list(cases(options.seed, range(first, min(first + 60, end))))
        outcomes += judge_all(block, options.workers, options.seconds, told)
    print(table(outcomes, FORMS))
    print(f"\n{len(outcomes)} in {time.monotonic() - start:.0f} s, onnx {onnx.__version__}")
    return int(any(map(failed, outcomes)))


if __name__ == "__main__":
    sys.exit(main())
