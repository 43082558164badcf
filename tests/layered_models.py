"""Models of every shape that a walk from layer to layer must get right."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from small_models import build

from onnx_attnround import graph
from onnx_attnround.records import Array

LAYERED = {
    "chain": """
        g (float[N,3,8,8] x) => (float[N,5] y)
        <float[4,3,3,3] w0, float[4] b0, float[4,4,3,3] w1, float[5,4] w2, float[5] b2>
        { c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)  r0 = Relu(c0)
          c1 = Conv<strides=[2,2]>(r0, w1)  r1 = Clip(c1)
          p = GlobalAveragePool(r1)  f = Flatten(p)  y = Gemm<transB=1>(f, w2, b2) }""",
    "residual": """
        g (float[N,4,6,6] x) => (float[N,4,6,6] y)
        <float[4,4,3,3] w0, float[4,1,3,3] w1, float[4,4,1,1] w2, float[4,4,1,1] w3>
        { c0 = Conv<pads=[1,1,1,1]>(x, w0)  r0 = Relu(c0)
          c1 = Conv<pads=[1,1,1,1], group=4>(r0, w1)  r1 = Relu(c1)
          c2 = Conv(r1, w2)  a = Add(c2, r0)  r2 = Relu(a)
          c3 = Conv(r2, w3)  m = Mul(c3, r0)  y = Add(m, x) }""",
    "branches": """
        g (float[N,6,8] x) => (float[N,6,8] y)
        <float[8,8] wi, float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo>
        { i = MatMul(x, wi)  h = Relu(i)
          q = MatMul(h, wq)  k = MatMul(h, wk)  v = MatMul(h, wv)
          t = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, t)  p = Softmax<axis=-1>(s)
          a = MatMul(p, v)  o = MatMul(a, wo)  y = Add(o, h) }""",
    "two inputs": """
        g (float[N,4] a, float[N,6] b) => (float[N,3] y)
        <float[4,5] wa, float[6,5] wb, float[5,3] wc>
        { p = MatMul(a, wa)  q = MatMul(b, wb)  s = Add(p, q)  t = Tanh(s)
          u = MatMul(t, wc)  y = Relu(u) }""",
    "two outputs": """
        g (float[N,4] x) => (float[N,4] early, float[N,3] y)
        <float[4,4] w0, float[4,4] w1, float[4,3] w2>
        { a = MatMul(x, w0)  early = Relu(a)  b = MatMul(early, w1)
          c = Sigmoid(b)  y = MatMul(c, w2) }""",
    "shapes": """
        g (float[N,4,3,2] x) => (float[N,T,5] y)
        <float[6,6] w0, float[6,5] w1, int64[1] zero = {0}, int64[1] one = {1},
         int64[1] rest = {-1}>
        { s = Shape(x)  two = Add(one, one)
          n = Slice(s, zero, one)  t = Slice(s, one, two)  shape = Concat<axis=0>(n, t, rest)
          f = Reshape(x, shape)  h = MatMul(f, w0)  r = Relu(h)
          again = Shape(r)  k = Reshape(r, again)  y = MatMul(k, w1) }""",
    "if": """
        g (float[N,4] x, bool flag) => (float[N,3] y)
        <float[4,4] w0, float[4,4] w1, float[4,3] w2, float three = {3.0}>
        { a = MatMul(x, w0)  h = Relu(a)  b = MatMul(h, w1)
          z = If(flag)<then_branch = yes () => (float[N,4] p) { p = Add(h, b) },
                       else_branch = no () => (float[N,4] q) { q = Mul(h, three) }>
          y = MatMul(z, w2) }""",
    "loop in if": """
        g (float[N,4] x, bool flag) => (float[N,3] y)
        <float[4,4] w0, float[4,3] w1, int64 trips = {3}>
        { a = MatMul(x, w0)  h = Relu(a)
          z = If(flag)<
            then_branch = yes () => (float[N,4] p) {
              p = Loop(trips, flag, h)<
                body = step (int64 i, bool go, float[N,4] old)
                  => (bool more, float[N,4] new) { more = Identity(go) new = Add(old, x) }> },
            else_branch = no () => (float[N,4] q) { q = Neg(h) }>
          y = MatMul(z, w1) }""",
    "on the input": "g (float[N,4] x) => (float[N,3] y) <float[4,3] w> { y = MatMul(x, w) }",
    "twice on the input": """
        g (float[N,4] x) => (float[N,3] y) <float[4,3] v, float[4,3] w>
        { a = MatMul(x, v)  b = MatMul(x, w)  y = Add(a, b) }""",
    "constants": """
        g (float[N,4] x) => (float[N,3] y) <float[4,4] w0, float[4,3] w1, int64[1] four = {4}>
        { half = Constant<value_float = 0.5>()  e = Exp(half)  ones = ConstantOfShape(four)
          a = Mul(x, e)  h = MatMul(a, w0)  row = Add(ones, e)  b = Add(h, row)
          y = MatMul(b, w1) }""",
    "static batch": """
        g (float[4,4] x) => (float[4,3] y) <float[4,4] w0, float[4,3] w1, int64[2] s = {2,8}>
        { a = MatMul(x, w0)  r = Reshape(a, s)  t = Relu(r)
          back = Shape(x)  u = Reshape(t, back)  y = MatMul(u, w1) }""",
    "side branch": """
        g (float[N,4] x) => (float[N,4] side, float[N,4] y)
        <float[4,4] w0, float[4,4] w1, float[4,4] w2>
        { a = MatMul(x, w0)  r = Relu(a)  b = MatMul(r, w1)  t = Relu(b)
          side = Add(a, t)  y = MatMul(t, w2) }""",
}


def layered(name: str) -> ir.Model:
    """One of ``LAYERED``, with the types and shapes of all values."""
    return graph.through_proto(build(LAYERED[name]), onnx.shape_inference.infer_shapes)


def noise(model: ir.Model, count: int = 24, seed: int = 2) -> dict[str, Array]:
    """``count`` samples of normal noise for each input, true for a scalar; dynamic sizes are 2."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: np.asarray(
            rng.normal(size=(count, *(dim or 2 for dim in spec.shape[1:]))) if spec.shape else True,
            spec.dtype,
        )
        for spec in graph.input_specs(model)
    }
