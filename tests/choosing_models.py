"""Models that choose rows by their data or draw numbers, between two layers."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from small_models import build

from onnx_attnround import graph

_HEAD = "g (float[N,6,4] x) => (float[A,B,3] y) <float[4,4] w0, float[4,3] w1, {constants}>"
_BODIES = {
    "top rows": (
        "int64[1] k = {2}, int64[1] last = {2}, int64[3] wide = {1,1,4}",
        """s = ReduceMax<axes=[2], keepdims=0>(h)  top, i = TopK<axis=1>(s, k)
           u = Unsqueeze(i, last)  e = Expand(u, wide)  p = GatherElements<axis=1>(h, e)
           t = Unsqueeze(top, last)  z = Mul(p, t)""",
    ),
    "above a threshold": (
        "float bound = {0.3}, int64[1] lead = {0}, int64[2] rows = {-1,4}",
        """s = ReduceMax<axes=[2], keepdims=0>(h)  above = Greater(s, bound)
           found = NonZero(above)  at = Transpose<perm=[1,0]>(found)  p = GatherND(h, at)
           z = Unsqueeze(p, lead)""",
    ),
    "compressed": (
        "float bound = {0.3}, int64[1] lead = {0}, int64[2] rows = {-1,4}",
        """f = Reshape(h, rows)  s = ReduceMax<axes=[1], keepdims=0>(f)  above = Greater(s, bound)
           p = Compress<axis=0>(f, above)  z = Unsqueeze(p, lead)""",
    ),
    "suppressed": (
        "float[1,1,1] bound = {0.2}, int64 most = {9}, int64 two = {2}, int64[1] lead = {0}, "
        "int64[2] rows = {-1,4}",
        """f = Reshape(h, rows)  b = Unsqueeze(f, lead)  m = ReduceMax<axes=[2], keepdims=1>(b)
           s = Transpose<perm=[0,2,1]>(m)  n = NonMaxSuppression(b, s, most)
           i = Gather<axis=1>(n, two)  p = Gather<axis=0>(f, i)  z = Unsqueeze(p, lead)""",
    ),
    "looked up": (
        "float[4,4] table",
        "i = ArgMax<axis=2, keepdims=0>(h)  z = Gather(table, i)",
    ),
    "rounded to integers": (
        "float[4,4] table, int64 zero = {0}, int64 three = {3}",
        """s = ReduceSum<keepdims=0>(h, axis)  i = Cast<to=7>(s)  low = Max(i, zero)
           at = Min(low, three)  z = Gather(table, at)""",
    ),
    "as long as it says": (
        "float zero = {0.0}, float one = {1.0}, int64[3] shape = {1,-1,1}",
        """s = ReduceMax<keepdims=0>(h)  e = Exp(s)  r = Range(zero, e, one)
           c = Reshape(r, shape)  m = ReduceMean<axes=[0,1], keepdims=1>(h)  z = Mul(c, m)""",
    ),
    "branches": (
        "float bound = {0.1}",
        """s = ReduceMean<keepdims=0>(h)  up = Greater(s, bound)
           z = If(up)<then_branch = yes () => (float[N,6,4] p) { p = Neg(h) },
                      else_branch = no () => (float[N,6,4] q) { q = Exp(h) }>""",
    ),
    "decides in a loop": (
        "int64 trips = {2}, bool go = {1}, float bound = {0.3}",
        """z = Loop(trips, go, h)<body = step (int64 n, bool c, float[N,6,4] old)
             => (bool more, float[N,6,4] new) {
               more = Identity(c)  above = Greater(old, bound)  half = Mul(old, bound)
               new = Where(above, half, old) }>""",
    ),
    "unpooled": (
        "int64[1] lead = {1}",
        """i = Unsqueeze(h, lead)  p, at = MaxPool<kernel_shape=[2,2], strides=[2,2]>(i)
           big = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, at)  z = Squeeze(big, lead)""",
    ),
    "noise": ("int64 unused = {0}", "n = RandomNormalLike(h)  z = Add(h, n)"),
    "noise from nothing": (
        "int64 unused = {0}",
        "n = RandomUniform<shape=[6,4], low=-3.0, high=3.0>()  b = Add(h, n)  z = Mul(b, n)",
    ),
    "coins": (
        "int64 unused = {0}",
        "s = Sigmoid(h)  c = Bernoulli(s)  z = Mul(h, c)",
    ),
    "dropout in training": (
        "float share = {0.5}, bool training = {1}",
        "z = Dropout(h, share, training)",
    ),
}
CHOOSING = tuple(_BODIES)
DRAWING = ("noise", "noise from nothing", "coins", "dropout in training")


def choosing(name: str) -> ir.Model:
    """One of ``CHOOSING``, with the types and shapes of all values that can be derived."""
    constants, body = _BODIES[name]
    if "axis)" in body:
        constants += ", int64[1] axis = {2}"
    head = _HEAD.replace("{constants}", constants)
    layers = "[first] a = MatMul(x, w0)  h = Relu(a)", "[second] y = MatMul(z, w1)"
    text = f"{head} {{ {layers[0]}  {body}  {layers[1]} }}"
    return graph.through_proto(build(text), onnx.shape_inference.infer_shapes)
