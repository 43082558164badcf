"""Which nodes are quantised and which tensors get Q/DQ; and for all else, the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, ModelError
from onnx_attnround.plan import make_plan
from onnx_attnround.records import LayerPlan, QuantPlan
from onnx_attnround.simplify import simplify

X = "float[N,4,8,8] x"
Y = "float[N,c,h,w] y"
CONSTANTS = (
    "float[4,4,3,3] w1, float[4,4,3,3] w2, float[4,4,1,1] w3, float[6,8,1,1] w8, "
    "float[4] b1, float[4] b2, float[4,3] m, float[3] mb"
)
CONV = "Conv<pads=[1,1,1,1]>"
POOL = "MaxPool<kernel_shape=[2,2], strides=[2,2]>"


def net(body: str, constants: str = CONSTANTS, x: str = X, y: str = Y) -> str:
    return f"g ({x}) => ({y}) <{constants}> {{ {body} }}"


def plan_of(text: str | ir.Model, *, activations: bool = True, **options: Any) -> QuantPlan:
    model = build(text) if isinstance(text, str) else text
    return make_plan(model, QuantConfig(**options), quantise_activations=activations)


def quantised(body: str, **names: str) -> tuple[set[str], dict[str, str]]:
    plan = plan_of(net(body, **names))
    return set(plan.activations), dict(plan.same_range)


def layer_of(text: str, **options: Any) -> LayerPlan:
    (layer,) = plan_of(text, **options).layers
    return layer


# --- layers -------------------------------------------------------------------------------


def test_layer_records_what_the_later_stages_need() -> None:
    body = "[first] y = Conv<group=2, pads=[0,1,2,3], strides=[2,1], auto_pad=\"NOTSET\">(x, w, b)"
    layer = layer_of(net(body, "float[6,2,3,3] w, float[6] b"), weight_bits=5)
    assert (layer.node, layer.op_type) == ("first", "Conv")
    assert (layer.x, layer.y, layer.weight, layer.bias) == ("x", "y", "w", "b")
    assert layer.weight_shape == (6, 2, 3, 3)
    assert layer.parameters == 108
    assert layer.input_shape == (None, 4, 8, 8)
    assert dict(layer.attributes) == {
        "group": 2, "pads": (0, 1, 2, 3), "strides": (2, 1), "auto_pad": "NOTSET"
    }  # fmt: skip
    spec = layer.weight_spec
    assert (spec.bits, spec.signed, spec.symmetric, spec.axis) == (5, True, True, 0)
    assert layer.first_or_last


@pytest.mark.parametrize(
    ("node", "weight", "axis"),
    [
        ("Conv", "float[6,4,3,3]", 0),
        ("ConvTranspose<group=2>", "float[4,3,2,2]", 1),
        ("Gemm", "float[8,5]", 1),
        ("Gemm<transB=1>", "float[5,8]", 0),
        ("MatMul", "float[8,5]", 1),
    ],
)
def test_channel_axis_is_that_of_the_outputs(node: str, weight: str, axis: int) -> None:
    x = X if "Conv" in node else "float[N,8] x"
    y = Y if "Conv" in node else "float[N,5] y"
    layer = layer_of(net(f"y = {node}(x, w)", f"{weight} w", x, y))
    assert layer.weight_spec.axis == axis
    assert layer.bias is None


def test_tied_weights_are_planned_for_each_layer() -> None:
    plan = plan_of(net(f"a = {CONV}(x, w1, b1) y = {CONV}(a, w1, b1)"))
    assert [layer.weight for layer in plan.layers] == ["w1", "w1"]
    assert [layer.node for layer in plan.layers] == ["Conv_0", "Conv_1"]
    assert not plan.skipped


# --- nodes left in float ------------------------------------------------------------------

GOOD = f"k = {CONV}(x, w1, b1)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{GOOD} v = Relu(w2) [n] y = Conv(k, v)", "no constant weight"),
        (f"{GOOD} t = Transpose<perm=[0,1,3,2]>(x) [n] y = MatMul(k, t)", "no constant weight"),
        (f"{GOOD} [n] y = MatMul(k, w3)", "constant operand of rank 4: rank 2 is handled"),
        (f"{GOOD} [n] y = MatMul(left, k)", "the constant operand is the left one"),
        (f"{GOOD} v = Relu(b1) [n] y = Conv(k, w2, v)", "its bias is not a constant"),
        (f"{GOOD} [n] e = Conv(image, w2) y = Add(k, e)", "its input is a constant"),
    ],
)
def test_node_left_in_float_has_its_reason(body: str, reason: str) -> None:
    constants = f"{CONSTANTS}, float[8,8] left, float[1,4,10,10] image"
    plan = plan_of(net(body, constants))
    assert plan.skipped == {"n": reason}
    assert [layer.node for layer in plan.layers] == ["Conv_0"]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("Gemm<alpha=0.5>(k, m)", "alpha or beta is not 1 and could not be folded"),
        ("Gemm<beta=2.0>(k, m, c)", "alpha or beta is not 1 and could not be folded"),
        ("Gemm(k, m, c)", "its bias of shape (2, 1) is not a row"),
        ("Gemm(m, k)", "the constant operand is the left one"),
    ],
)
def test_gemm_left_in_float_has_its_reason(node: str, reason: str) -> None:
    bias = "float[1,4] c" if "beta" in node else "float[2,1] c"
    text = net(f"k = Gemm(x, m) [n] y = {node}", f"float[4,4] m, {bias}", "float[2,4] x",
               "float[a,b] y")  # fmt: skip
    plan = plan_of(text)
    assert plan.skipped == {"n": reason}


@pytest.mark.parametrize("shape", ["[4]", "[1,4]", "[1]", "[1,1]"])
def test_bias_of_a_row_is_fine(shape: str) -> None:
    text = net("y = Gemm(x, m, c)", f"float[4,4] m, float{shape} c", "float[2,4] x", "float[2,4] y")
    assert layer_of(text).bias == "c"


def test_weight_of_another_type_is_named() -> None:
    text = """g (float[N,2] x, float16[N,2] h) => (float[N,2] y, float16[N,2] z)
              <float[2,2] m, float16[2,2] v = {1, 2, 3, 4}> {
                y = MatMul(x, m) [half] z = MatMul(h, v) }"""
    plan = plan_of(text)
    assert plan.skipped == {"half": "weight 'v' is FLOAT16: FLOAT is handled"}
    assert set(plan.activations) == {"x"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_named(value: float) -> None:
    model = build(net(f"{GOOD} y = Conv(k, w2)"))
    weights = np.ones((4, 4, 3, 3), np.float32)
    weights[1, 2, 0, 1] = value
    model.graph.initializers["w2"].const_value = ir.tensor(weights, name="w2")
    assert plan_of(model).skipped == {"Conv_1": "weight 'w2' holds NaN or Inf"}


def test_conv_of_four_dimensions_is_refused_with_its_rank() -> None:
    text = net("k = Conv(x, v) [n] y = Conv(k, v)", "float[1,1,1,1,1,1] v",
               "float[N,1,2,2,2,2] x", "float[N,1,2,2,2,2] y")  # fmt: skip
    with pytest.raises(ModelError, match="n: 4 spatial dimensions: 1 to 3 are handled"):
        plan_of(text)


def test_layers_inside_a_subgraph_are_listed() -> None:
    text = """g (float[N,2] x, bool go) => (float[N,2] y) <float[2,2] m> {
        k = MatMul(x, m)
        y = If (go) <
            then_branch = t () => (float[N,2] a) { [inner] a = MatMul(k, m) },
            else_branch = e () => (float[N,2] b) { b = Relu(k) }> }"""
    plan = plan_of(text)
    assert plan.skipped == {"inner": "inside a subgraph"}
    assert [layer.node for layer in plan.layers] == ["MatMul_0"]


def test_weighted_ops_that_are_not_handled_are_listed() -> None:
    text = """g (float[5,1,4] x) => (float[5,1,1,3] y) <float[4,4] m, float[1,12,4] w,
                                                        float[1,12,3] r> {
        k = MatMul(x, m) [cell] y = LSTM<hidden_size=3>(k, w, r) }"""
    assert plan_of(text).skipped == {"cell": "LSTM is not handled: its weights stay float"}


def test_ops_of_other_domains_are_not_mistaken_for_standard_ones() -> None:
    plan = plan_of(net(f"{GOOD} y = own.Conv(k, w2)"))
    assert plan.skipped == {"Conv_1": "own.Conv is not handled: its weights stay float"}
    assert [layer.node for layer in plan.layers] == ["Conv_0"]


THREE = f"[stem] a = {CONV}(x, w1) [mid_1] b = {CONV}(a, w2) [mid_2] y = {CONV}(b, w1)"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["stem", "mid_1", "mid_2"]),
        ({"include": ("mid*",)}, ["mid_1", "mid_2"]),
        ({"include": ("stem", "*_2")}, ["stem", "mid_2"]),
        ({"exclude": ("*_1",)}, ["stem", "mid_2"]),
        ({"include": ("mid*",), "exclude": ("mid_2",)}, ["mid_1"]),
    ],
)
def test_include_and_exclude(options: dict[str, Any], kept: list[str]) -> None:
    plan = plan_of(net(THREE), **options)
    assert [layer.node for layer in plan.layers] == kept
    left = {"stem", "mid_1", "mid_2"} - set(kept)
    assert set(plan.skipped) == left
    assert all(why in ("not matched by include", "matched by exclude")
               for why in plan.skipped.values())  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"include": ("stem", "top*")}, {"exclude": ("top*",)}, {"layer_bits": {"top*": 4}}],
)
def test_pattern_that_matches_no_node_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'top\*' matches no node; `make_plan`") as caught:
        plan_of(net(THREE), **options)
    assert next(iter(options)) in str(caught.value)


def test_nothing_to_quantise_says_why() -> None:
    with pytest.raises(ModelError, match="nothing to quantise.*none found"):
        plan_of(net("y = Relu(x)"))
    with pytest.raises(ModelError, match="nothing to quantise.*stem: matched by exclude"):
        plan_of(net(THREE), exclude=("*",))


# --- first and last -----------------------------------------------------------------------


def ends(body: str, **names: str) -> list[str]:
    options = {"exclude": ("skip*",)} if "skip" in body else {}
    plan = plan_of(net(body, **names), **options)
    return [layer.node for layer in plan.layers if layer.first_or_last]


@pytest.mark.parametrize(
    ("body", "marked"),
    [
        (f"[a] y = {CONV}(x, w1)", ["a"]),
        (THREE, ["stem", "mid_2"]),
        (f"[a] p = {CONV}(x, w1) [b] q = {CONV}(x, w2) s = Add(p, q) r = Relu(s) "
         f"[c] t = {CONV}(r, w1) [d] y = {CONV}(t, w2)", ["a", "b", "d"]),
        (f"[a] p = {CONV}(x, w1) [b] q = {CONV}(p, w2) [c] r = {CONV}(p, w1) "
         f"[d] s = {CONV}(q, w2) y = Add(r, s)", ["a", "c", "d"]),
        (f"n = Relu(x) t = Transpose<perm=[0,1,3,2]>(n) [a] p = {CONV}(t, w1) "
         f"[b] q = {CONV}(p, w2) [c] r = {CONV}(q, w1) z = Relu(r) y = Sigmoid(z)", ["a", "c"]),
        # A layer that stays in float is a layer nevertheless.
        (f"[skip] p = {CONV}(x, w1) [b] q = {CONV}(p, w2) [c] y = {CONV}(q, w1)", ["c"]),
        (f"[a] p = {CONV}(x, w1) [b] q = {CONV}(p, w2) [skip] y = {CONV}(q, w1)", ["a"]),
        # A product of activations is not a layer.
        (f"[a] p = {CONV}(x, w1) [b] q = {CONV}(p, w2) y = MatMul(q, q)", ["a", "b"]),
    ],
)  # fmt: skip
def test_first_and_last_layers_are_marked(body: str, marked: list[str]) -> None:
    assert ends(body) == marked


# --- activations: which tensors -----------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "names"),
    [
        # A Conv gets a Q on its input and on its output, a graph output too.
        (f"y = {CONV}(x, w1, b1)", "x y"),
        # Activations are absorbed: the Q stands behind them.
        (f"a = {CONV}(x, w1) y = Relu(a)", "x y"),
        (f"a = {CONV}(x, w1) r = Relu(a) y = {CONV}(r, w2)", "x r y"),
        # ... unless others read what comes before.
        (f"a = {CONV}(x, w1) r = Relu(a) s = Add(a, r) y = {CONV}(s, w2)", "x a s y"),
        # A residual unit: both branches and the sum, behind its Relu.
        (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) s = Add(b, x) t = Relu(s) "
         f"y = {CONV}(t, w1)", "x r b t y"),
        (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) s = Add(x, b) y = {CONV}(s, w1)",
         "x r b s y"),
        # A projection in the shortcut.
        (f"a = {CONV}(x, w1) b = Conv(x, w3) s = Add(a, b) t = Relu(s) y = {CONV}(t, w1)",
         "x a b t y"),
        # Activations before the convolution.
        (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) s = Add(b, a) t = Relu(s) "
         f"c = {CONV}(t, w1) u = Add(c, s) y = {CONV}(u, w2)", "x a r b s t c u y"),
        # Sums with constants, or with what stays float, stay float.
        (f"a = {CONV}(x, w1) s = Add(a, k) y = {CONV}(s, w2)", "x a s y"),
        (f"a = {CONV}(x, w1) s = Mul(a, k) y = Sigmoid(s)", "x a"),
        (f"a = {CONV}(x, w1) e = Exp(x) s = Add(a, e) y = Exp(s)", "x a"),
        (f"a = {CONV}(x, w1) s = Sub(a, x) y = {CONV}(s, w2)", "x a s y"),
        # A sum that leaves the graph needs no codes, nor one that no integer kernel reads.
        (f"a = {CONV}(x, w1) y = Add(a, x)", "x a"),
        (f"a = {CONV}(x, w1) s = Add(a, x) y = Exp(s)", "x a"),
        (f"a = {CONV}(x, w1) s = Add(a, x) t = Sigmoid(s) u = Mul(t, a) y = Exp(u)", "x a"),
        (f"a = {CONV}(x, w1) b = {CONV}(x, w2) c = Concat<axis=1>(a, b) y = Flatten(c)", "x a b"),
        # ... but where one reads a part of it.
        (f"a = {CONV}(x, w1) s = Add(a, x) t = Sigmoid(s) u = Mul(t, a) b = {CONV}(s, w2) "
         "y = Add(b, u)", "x a s b"),
        # Gates: what they multiply is in integer as well.
        (f"a = {CONV}(x, w1) s = Sigmoid(a) t = Mul(a, s) y = {CONV}(t, w2)", "x a s t y"),
        (f"a = {CONV}(x, w1) g = GlobalAveragePool(a) e = Conv(g, w3) s = Sigmoid(e) "
         f"t = Mul(a, s) y = {CONV}(t, w2)", "x a g e s t y"),
        (f"a = {CONV}(x, w1) l = LeakyRelu(a) s = Add(l, x) y = {CONV}(s, w2)", "x a l s y"),
        (f"a = {CONV}(x, w1) h = HardSwish(a) y = {CONV}(h, w2)", "x a h y"),
        # Concat: all or nothing.
        (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(x, w2) c = Concat<axis=1>(r, b) "
         "y = Conv(c, w8)", "x r b c y"),
        (f"a = {CONV}(x, w1) e = Exp(x) c = Concat<axis=1>(a, e) y = Exp(c)", "x a"),
        # Pools.
        (f"a = {CONV}(x, w1) p = AveragePool<kernel_shape=[2,2]>(a) y = {CONV}(p, w2)",
         "x a p y"),
        (f"a = {CONV}(x, w1) r = Relu(a) p = GlobalAveragePool(r) y = Exp(p)", "x r"),
        # One tensor that two layers read.
        (f"a = {CONV}(x, w1) b = {CONV}(a, w2) c = Conv(a, w3) y = Sub(b, c)", "x a b c"),
        # ConvTranspose runs in float: its neighbours do not.
        ("a = ConvTranspose(x, w1) y = Exp(a)", ""),
        (f"a = {CONV}(x, w1) t = ConvTranspose(a, w2) y = {CONV}(t, w1)", "x a t y"),
    ],
)  # fmt: skip
def test_tensors_with_codes(body: str, names: str) -> None:
    found, same_range = quantised(body, constants=f"{CONSTANTS}, float[1] k")
    assert found == set(names.split())
    assert not same_range


@pytest.mark.parametrize(
    ("bounds", "absorbed"),
    [
        ("lo, hi", True),
        ("lo", True),
        # Where 0 is not the lower bound, ONNX Runtime keeps the Clip, and it must not keep
        # the convolution from its Q.
        (", hi", False),
        ("neg, hi", False),
        ("hi, top", False),
        ("lo, free", False),
    ],
)
def test_clip_is_absorbed_where_it_starts_at_zero(bounds: str, absorbed: bool) -> None:
    text = f"""g (float[N,4,8,8] x, float free) => (float[N,4,8,8] y)
        <float[4,4,3,3] w1, float lo = {{0}}, float hi = {{6}}, float top = {{9}},
         float neg = {{-1}}> {{
            a = {CONV}(x, w1) c = Clip(a, {bounds}) y = {CONV}(c, w1) }}"""
    assert set(plan_of(text).activations) == ({"x", "c", "y"} | (set() if absorbed else {"a"}))


@pytest.mark.parametrize(
    ("attributes", "absorbed"),
    [("<min=0.0, max=6.0>", True), ("<min=-1.0, max=1.0>", False), ("<max=6.0>", False),
     ("", False)],
)  # fmt: skip
def test_clip_of_an_old_opset_keeps_its_bounds_as_attributes(
    attributes: str, absorbed: bool
) -> None:
    model = build(net(f"a = {CONV}(x, w1) y = Clip{attributes}(a)"), opset=6, ir_version=8)
    plan = make_plan(model, QuantConfig(), quantise_activations=True)
    assert set(plan.activations) == ({"x", "y"} if absorbed else {"x", "a"})


@pytest.mark.parametrize(
    ("body", "names", "same"),
    [
        (f"a = {CONV}(x, w1) r = Relu(a) p = {POOL}(r) y = {CONV}(p, w2)",
         "x r p y", {"p": "r"}),
        # A chain shares the range of its start; each link names the one before.
        (f"a = {CONV}(x, w1) t = Transpose<perm=[0,1,3,2]>(a) u = Reshape(t, shape) "
         f"y = {CONV}(u, w2)", "x a t u y", {"t": "a", "u": "t"}),
        (f"a = {CONV}(x, w1) r = Relu(a) g = GlobalAveragePool(r) f = Flatten(g) "
         "z = Gemm(f, m, mb) y = Softmax(z)", "x r g f", {"f": "g"}),
        # What no integer op reads keeps no codes: the region ends before.
        (f"a = {CONV}(x, w1) t = Transpose<perm=[0,1,3,2]>(a) y = Exp(t)", "x a", {}),
        (f"a = {CONV}(x, w1) y = Flatten(a)", "x a", {}),
        (f"a = {CONV}(x, w1) p = {POOL}(a) t = Transpose<perm=[0,1,3,2]>(p) y = Exp(t)",
         "x a", {}),
        # ... also where only a part of the chain is read.
        (f"a = {CONV}(x, w1) p = {POOL}(a) b = {CONV}(p, w2) t = Transpose<perm=[0,1,3,2]>(p) "
         "e = Exp(t) y = Add(b, e)", "x a p b", {"p": "a"}),
        # Arithmetic counts as a reader, where its own output is read by one.
        (f"a = {CONV}(x, w1) t = Transpose<perm=[0,1,3,2]>(a) s = Add(t, x) y = {CONV}(s, w2)",
         "x a t s y", {"t": "a"}),
        (f"a = {CONV}(x, w1) t = Transpose<perm=[0,1,3,2]>(a) s = Add(t, x) y = Exp(s)",
         "x a", {}),
        # A chain that starts at what a layer reads.
        (f"a = {CONV}(x, w1) t = Transpose<perm=[0,1,3,2]>(x) s = Add(a, t) y = {CONV}(s, w2)",
         "x a t s y", {"t": "x"}),
        # Before the first Q there are no codes to move.
        (f"t = Transpose<perm=[0,1,3,2]>(x) y = {CONV}(t, w1)", "t y", {}),
        # Split: all parts have codes, or none.
        (f"a = {CONV}(x, w1) p, q = Split<axis=1>(a) c = Concat<axis=1>(q, p) y = {CONV}(c, w2)",
         "x a p q c y", {"p": "a", "q": "a"}),
        (f"a = {CONV}(x, w1) p, q = Split<axis=1>(a) e = Exp(q) f = Conv(p, w2b) y = Add(e, f)",
         "x a p q f", {"p": "a", "q": "a"}),
        (f"a = {CONV}(x, w1) p, q = Split<axis=1>(a) e = Exp(q) y = Add(e, p)", "x a", {}),
        # Slice, Gather, Squeeze and the like.
        (f"a = {CONV}(x, w1) t = Slice(a, i0, i1) y = {CONV}(t, w2)", "x a t y", {"t": "a"}),
        (f"a = {CONV}(x, w1) t = Gather<axis=2>(a, i1) y = {CONV}(t, w2)",
         "x a t y", {"t": "a"}),
        (f"a = {CONV}(x, w1) t = DepthToSpace<blocksize=2>(a) y = Conv(t, w1x)",
         "x a t y", {"t": "a"}),
        # The indices of a MaxPool are no codes.
        (f"a = {CONV}(x, w1) p, i = MaxPool<kernel_shape=[2,2]>(a) j = Cast<to=1>(i) "
         f"b = {CONV}(p, w2) y = Add(b, j)", "x a p b", {"p": "a"}),
    ],
)  # fmt: skip
def test_movement_shares_a_range(body: str, names: str, same: dict[str, str]) -> None:
    constants = (
        f"{CONSTANTS}, float[4,2,1,1] w2b, float[4,1,1,1] w1x, int64[4] shape = {{0, 4, 8, 8}}, "
        "int64[1] i0 = {0}, int64[1] i1 = {2}"
    )
    assert quantised(body, constants=constants) == (set(names.split()), same)


def test_order_of_the_nodes_does_not_matter() -> None:
    move, conv = "t = Transpose<perm=[0,1,3,2]>(x)", f"a = {CONV}(x, w1)"
    rest = f"s = Add(a, t) y = {CONV}(s, w2)"
    assert quantised(f"{move} {conv} {rest}") == quantised(f"{conv} {move} {rest}")
    assert quantised(f"{move} {conv} {rest}") == (set("xatsy"), {"t": "x"})


def test_ops_of_other_domains_join_nothing() -> None:
    assert quantised(f"a = {CONV}(x, w1) s = own.Add(a, x) y = Exp(s)")[0] == {"x", "a"}
    assert quantised(f"a = {CONV}(x, w1) r = own.Relu(a) y = Exp(r)")[0] == {"x", "a"}


def test_activation_inside_a_subgraph_is_not_absorbed() -> None:
    text = f"""g ({X}, bool go) => (float[N,4,8,8] y) <float[4,4,3,3] w1> {{
        a = {CONV}(x, w1)
        y = If (go) <
            then_branch = t () => (float[N,4,8,8] r) {{ r = Relu(a) }},
            else_branch = e () => (float[N,4,8,8] s) {{ k = Constant<value_float=1.0>()
                                                       s = Expand(k, shape) }}> }}"""
    text = text.replace("float[4,4,3,3] w1", "float[4,4,3,3] w1, int64[4] shape = {1, 4, 8, 8}")
    assert set(plan_of(text).activations) == {"x", "a"}


@pytest.mark.parametrize(
    ("pad", "moves"),
    [
        ("Pad(a, pads)", True),
        ("Pad(a, pads, zero)", True),
        ("Pad(a, pads, one)", False),
        ("Pad(a, pads, some)", False),
        ('Pad<mode="reflect">(a, pads)', True),
        ('Pad<mode="edge">(a, pads, one)', True),
    ],
)
def test_pad_moves_codes_if_it_makes_no_new_value(pad: str, moves: bool) -> None:
    constants = (
        f"{CONSTANTS}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, "
        "float zero = {0}, float one = {1}"
    )
    x = f"{X}, float some"
    _, same_range = quantised(f"a = {CONV}(x, w1) t = {pad} y = Conv(t, w2)",
                              constants=constants, x=x)  # fmt: skip
    assert same_range == ({"t": "a"} if moves else {})


@pytest.mark.parametrize(("attribute", "moves"), [("", True), ("value=0.0,", True),
                                                  ("value=1.0,", False)])  # fmt: skip
def test_pad_of_an_old_opset(attribute: str, moves: bool) -> None:
    body = f"a = {CONV}(x, w1) t = Pad<{attribute} pads=[0,0,1,1,0,0,1,1]>(a) y = Conv(t, w2)"
    plan = plan_of(build(net(body), opset=10))
    assert dict(plan.same_range) == ({"t": "a"} if moves else {})


@pytest.mark.parametrize(
    ("attributes", "moves"),
    [
        ("", True),
        ('<mode="nearest">', True),
        ('<mode="linear">', False),
        ('<mode="cubic">', False),
        ('<coordinate_transformation_mode="tf_crop_and_resize">', False),
    ],
)
def test_resize_moves_codes_if_it_copies_the_nearest(attributes: str, moves: bool) -> None:
    constants = f"{CONSTANTS}, float[8] roi, float[4] up = {{1, 1, 2, 2}}"
    _, same_range = quantised(
        f"a = {CONV}(x, w1) t = Resize{attributes}(a, roi, up) y = {CONV}(t, w2)",
        constants=constants,
    )
    assert same_range == ({"t": "a"} if moves else {})


def dense(body: str, x: str = "float[N,4] x") -> set[str]:
    plan = plan_of(net(body, "float[4,4] m, float[4,4] n, float[4] b", x, "float[N,4] y"))
    return set(plan.activations)


def test_gemm_and_matmul_keep_their_output_in_float() -> None:
    assert dense("y = Gemm(x, m, b)") == {"x"}
    assert dense("y = MatMul(x, m)") == {"x"}
    assert dense("a = Gemm(x, m, b) r = Relu(a) y = Gemm(r, n)") == {"x", "r"}
    assert dense("a = MatMul(x, m) s = Add(a, b) r = Tanh(s) y = MatMul(r, n)") == {"x", "r"}
    # The sum is float, for one of its branches is.
    assert dense("a = MatMul(x, m) s = Add(a, x) y = MatMul(s, n)") == {"x", "s"}


def test_attention_quantises_the_projections() -> None:
    body = """q = MatMul(x, m) k = MatMul(x, n) kt = Transpose<perm=[0,2,1]>(k)
              s = MatMul(q, kt) p = Softmax(s) o = MatMul(p, q) y = MatMul(o, m)"""
    plan = plan_of(net(body, "float[4,4] m, float[4,4] n", "float[N,5,4] x", "float[N,5,4] y"))
    assert set(plan.activations) == {"x", "o"}
    assert set(plan.skipped.values()) == {"no constant weight"}
    assert len(plan.layers) == 3


def test_excluded_layers_stay_float_among_quantised_ones() -> None:
    plan = plan_of(net(THREE), exclude=("mid_1",))
    assert set(plan.activations) == {"x", "a", "b", "y"}
    plan = plan_of(net(THREE), exclude=("mid*",))
    assert set(plan.activations) == {"x", "a"}


def test_sample_models_have_no_layer_in_float(models_dir: Path) -> None:
    """And a Q on the input, behind each activation, on each residual sum, and no other."""
    counts = {"digits_resnet": (9, 14), "digits_mobilenet": (15, 20)}
    for name, (layers, activations) in counts.items():
        model, _ = simplify(graph.load(models_dir / f"{name}.onnx"))
        plan = plan_of(model)
        assert not plan.skipped
        assert (len(plan.layers), len(plan.activations)) == (layers, activations)
        assert len(plan.same_range) == 1
        marked = [layer.node for layer in plan.layers if layer.first_or_last]
        assert marked == [plan.layers[0].node, plan.layers[-1].node]


# --- activations: which spec --------------------------------------------------------------


def test_specs_are_those_of_the_target() -> None:
    for spec in plan_of(net(THREE)).activations.values():
        assert (spec.bits, spec.signed, spec.symmetric, spec.axis) == (8, False, False, None)


@pytest.mark.parametrize("options", [{"act_bits": 32}, {"activations": False}])
def test_weights_only(options: dict[str, Any]) -> None:
    plan = plan_of(net(THREE), **options)
    assert not plan.activations
    assert not plan.same_range
    assert len(plan.layers) == 3


def test_sixteen_bits_are_sixteen_everywhere() -> None:
    assert {s.bits for s in plan_of(net(THREE), act_bits=16).activations.values()} == {16}


def bits(body: str, constants: str = CONSTANTS, **options: Any) -> dict[str, int]:
    plan = plan_of(net(body, constants), act_bits=4, **options)
    return {name: spec.bits for name, spec in plan.activations.items()}


def test_first_and_last_layers_read_more_bits() -> None:
    assert bits(THREE) == {"x": 8, "a": 4, "b": 8, "y": 8}
    assert bits(THREE, first_last_bits=5) == {"x": 5, "a": 4, "b": 5, "y": 8}
    assert bits(THREE, first_last_bits=2) == {"x": 4, "a": 4, "b": 4, "y": 8}
    # A sum has as many as the layer that reads it asks for.
    body = (
        f"a = {CONV}(x, w1) b = {CONV}(a, w2) s = Add(b, x) c = {CONV}(s, w1) y = {CONV}(c, w2)"
    )
    assert bits(body) == {"x": 8, "a": 4, "b": 8, "s": 4, "c": 8, "y": 8}


def test_bits_are_one_along_a_chain_that_shares_a_range() -> None:
    body = (
        f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) s = Relu(b) p = GlobalAveragePool(s) "
        "f = Flatten(p) z = Gemm(f, m, mb) y = Softmax(z)"
    )
    # No layer reads s: it is only pooled, and that costs nothing at 8 bits.
    assert bits(body) == {"x": 8, "r": 4, "s": 8, "p": 8, "f": 8}
    assert bits(body, first_last_bits=4) == {"x": 4, "r": 4, "s": 8, "p": 4, "f": 4}
    pooled = f"a = {CONV}(x, w1) r = Relu(a) p = {POOL}(r) b = {CONV}(p, w2) y = {CONV}(b, w1)"
    assert bits(pooled) == {"x": 8, "r": 4, "p": 4, "b": 8, "y": 8}
