"""Moments against their definition, from patches that ONNX Runtime itself unfolds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_attnround.ops import weight_matrix, weight_tensor
from onnx_attnround.qdq.arithmetic import code_dtype
from onnx_attnround.records import Array, LayerPlan, QuantParams, QuantSpec
from onnx_attnround.rounding import moments
from onnx_attnround.rounding.moments import Moments, collect, wanted_patches


def plan(op_type: str, weight_shape: tuple[int, ...], **attributes: Any) -> LayerPlan:
    return LayerPlan(
        node="n",
        op_type=op_type,
        x="x",
        y="y",
        weight="w",
        bias=None,
        weight_shape=weight_shape,
        weight_spec=QuantSpec(bits=4, signed=True, symmetric=True, axis=0),
        attributes=attributes,
    )


CASES = {
    "conv": (plan("Conv", (5, 3, 3, 3), pads=[1, 1, 0, 2], strides=[2, 1]), (3, 9, 8)),
    "dilated conv": (plan("Conv", (4, 2, 3, 2), dilations=[2, 3], group=2), (4, 9, 9)),
    "same conv": (plan("Conv", (4, 3, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]), (3, 8, 7)),
    "depthwise": (plan("Conv", (6, 1, 3, 3), pads=[1] * 4, group=6), (6, 5, 5)),
    "conv 1d": (plan("Conv", (4, 3, 5), pads=[2, 2]), (3, 12)),
    "transpose": (
        plan("ConvTranspose", (4, 3, 3, 3), strides=[2, 2], pads=[1] * 4, group=2), (4, 5, 4)
    ),
    "gemm": (plan("Gemm", (7, 4)), (7,)),
    "gemm b": (plan("Gemm", (4, 7), transB=1), (7,)),
    "matmul": (plan("MatMul", (6, 5)), (4, 6)),
    "matmul 4d": (plan("MatMul", (6, 5)), (2, 3, 6)),
}  # fmt: skip
SAMPLES = 12


@dataclass
class Given:
    """A layer with its weight ``[g, o, d]``, its two inputs, and their patches ``[g, n, d]``."""

    layer: LayerPlan
    weight: torch.Tensor
    x: Array
    v: Array
    params: QuantParams | None
    patches: tuple[Array, Array]

    def collect(self, batch: int = SAMPLES, *, centred: bool = False) -> Moments:
        batches = (
            (torch.from_numpy(self.x[at : at + batch]), torch.from_numpy(self.v[at : at + batch]))
            for at in range(0, len(self.x), batch)
        )
        return collect(
            self.layer, self.weight, batches, len(self.x), self.params, centred=centred
        )


def given_case(name: str, bits: int = 8, *, samples: int = SAMPLES) -> Given:
    layer, shape = CASES[name]
    rng = np.random.default_rng(len(name))
    x = (rng.normal(size=(samples, *shape)) + 0.5).astype(np.float32)
    kernel = rng.normal(size=layer.weight_shape).astype(np.float32)
    weight = torch.from_numpy(weight_matrix(layer, kernel).copy())
    v = (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    params, real = None, v
    if bits < 32:
        spec = QuantSpec(bits=bits, signed=bits == 4, symmetric=False)
        scale, zero = np.float32(4.0 / 2**bits), np.array((spec.qmax + spec.qmin) // 2)
        params = QuantParams(spec=spec, scale=scale, zero_point=zero.astype(code_dtype(spec)))
        codes = np.clip(np.rint(v / scale) + zero, spec.qmin, spec.qmax)
        v, real = codes.astype(code_dtype(spec)), ((codes - zero) * scale).astype(np.float32)
    return Given(layer, weight, x, v, params, (unfold(layer, x), unfold(layer, real)))


def unfold(layer: LayerPlan, x: Array) -> Array:
    """Patches ``[g, n, d]``: the layer's own outputs when its weight is the identity."""
    groups, outputs, depth = weight_matrix(layer, np.zeros(layer.weight_shape)).shape
    shape = [depth * size // outputs if axis == out_axis(layer) else size
             for axis, size in enumerate(layer.weight_shape)]  # fmt: skip
    identity = np.broadcast_to(np.eye(depth, dtype=np.float32), (groups, depth, depth))
    kernel = weight_tensor(replace(layer, weight_shape=tuple(shape)), identity)
    node = onnx.helper.make_node(layer.op_type, ["x", "w"], ["y"], **layer.attributes)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g",
        [info("x", 1, x.shape), info("w", 1, kernel.shape)], [info("y", 1, None)],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x, "w": kernel})[0].astype(np.float64)
    if layer.op_type in ("Gemm", "MatMul"):
        return y.reshape(1, -1, depth)
    return y.reshape(len(y), groups, depth, -1).transpose(1, 0, 3, 2).reshape(groups, -1, depth)


def out_axis(layer: LayerPlan) -> int:
    """The axis of the weight that counts outputs."""
    gemm = 1 - layer.attributes.get("transB", 0)
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": gemm}[layer.op_type]


def direct(case: Given, *, centred: bool) -> dict[str, Array]:
    """The moments as their docstring defines them, in float64."""
    x, v = case.patches
    e, count = x - v, x.shape[1]
    mean_v, mean_e = v.mean(1), e.mean(1)
    weight = case.weight.numpy().astype(np.float64)
    out_x, out_e = x @ weight.swapaxes(1, 2), e @ weight.swapaxes(1, 2)
    signal = out_x.var(1)
    if centred:
        v, e, out_e = v - mean_v[:, None], e - mean_e[:, None], out_e - out_e.mean(1)[:, None]
    return {
        "gram": v.swapaxes(1, 2) @ v / count,
        "linear": out_e.swapaxes(1, 2) @ v / count,
        "mean_v": mean_v,
        "mean_e": mean_e,
        "power": (out_e**2).mean(1),
        "signal": signal,
    }


def part(moments: Moments, name: str) -> Array:
    """One of the moments; the Gram matrix in full."""
    if name == "gram":
        groups, depth = moments.mean_v.shape
        return moments.gram.times(torch.eye(depth).expand(groups, depth, depth)).numpy()
    return getattr(moments, name).numpy()


def assert_close(moments: Moments, expected: dict[str, Array], tolerance: float) -> None:
    for name, want in expected.items():
        got = part(moments, name)
        assert got.shape == want.shape, name
        np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=name
        )


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("name", CASES)
def test_equal_what_they_are_defined_as(
    name: str, bits: int, centred: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(moments, "WIDE", 0)
    case = given_case(name, bits)
    assert_close(case.collect(centred=centred), direct(case, centred=centred), 3e-5)


@pytest.mark.parametrize("name", CASES)
def test_do_not_depend_on_the_batch_size(name: str) -> None:
    case = given_case(name)
    expected = direct(case, centred=True)
    for batch in (1, 5):
        assert_close(case.collect(batch, centred=True), expected, 3e-5)


@pytest.fixture(scope="module")
def large() -> Given:
    """So many positions that only some of them are sampled."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(16, 1, 64, 64)).astype(np.float32).cumsum(3)
    layer = plan("Conv", (2, 1, 3, 3))
    weight = torch.from_numpy(rng.normal(size=(1, 2, 9)).astype(np.float32))
    v = (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    return Given(layer, weight, x, v, None, (unfold(layer, x), unfold(layer, v)))


def test_sampled_positions_depend_on_the_samples_index_alone(large: Given) -> None:
    once = large.collect()
    exact = direct(large, centred=False)
    assert not np.allclose(part(once, "gram"), exact["gram"], rtol=1e-4)
    reference = {name: part(once, name) for name in exact}
    for batch in (1, 3, 16):
        assert_close(large.collect(batch), reference, 3e-5)


def test_sampled_positions_stand_for_all(large: Given) -> None:
    expected = direct(large, centred=False)
    assert_close(large.collect(3), {n: expected[n] for n in ("gram", "power", "signal")}, 0.05)


def test_inputs_are_left_as_they_are() -> None:
    case = given_case("conv", 32)
    x, v = case.x.copy(), case.v.copy()
    case.collect()
    np.testing.assert_array_equal(case.x, x)
    np.testing.assert_array_equal(case.v, v)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(CASES)),
    st.integers(0, 2**31),
    st.floats(-1, 1).filter(lambda c: abs(c) > 1e-2),
)
def test_centring_is_the_best_bias(name: str, seed: int, other: float) -> None:
    """Centred moments give the least error over all biases; the mean error is that bias."""
    case = given_case(name)
    moments = case.collect(centred=True)
    rng = np.random.default_rng(seed)
    weight = case.weight.numpy().astype(np.float64)
    delta = 0.3 * rng.normal(size=weight.shape)
    x, v = case.patches
    errors = x @ weight.swapaxes(1, 2) - v @ (weight + delta).swapaxes(1, 2)
    gram, linear, power, mean_v, mean_e = (
        part(moments, name).astype(np.float64)
        for name in ("gram", "linear", "power", "mean_v", "mean_e")
    )
    loss = (delta * (delta @ gram - 2 * linear)).sum(-1) + power
    bias = (weight @ mean_e[..., None] - delta @ mean_v[..., None])[..., 0]
    scale = (errors**2).mean()
    np.testing.assert_allclose(bias, errors.mean(1), atol=1e-5 * np.sqrt(scale))
    np.testing.assert_allclose(
        loss, ((errors - bias[:, None]) ** 2).mean(1), rtol=1e-4, atol=1e-5 * scale
    )
    assert (((errors - bias[:, None] - other) ** 2).mean(1) > loss).all()


@pytest.mark.parametrize(
    ("depth", "patches"), [(1, 512), (9, 4608), (32, 16384), (512, 16384), (1024, 32768)]
)
def test_patches_grow_with_the_inputs(depth: int, patches: int) -> None:
    assert wanted_patches(depth) == patches


def test_powers_need_no_more_patches_for_more_inputs() -> None:
    assert wanted_patches(4096, correlations=False) == wanted_patches(32, correlations=False)
    assert wanted_patches(9, correlations=False) == wanted_patches(9)


@pytest.mark.parametrize("name", CASES)
def test_patches_may_be_looked_at_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to a sample at a time; which sample is in which fold stays the same."""
    case = given_case(name)
    whole = case.collect(centred=True)
    monkeypatch.setattr(moments, "PIECE", 1)
    pieces = case.collect(5, centred=True)
    for one, other in zip((whole, *whole.folds), (pieces, *pieces.folds), strict=True):
        for kind in ("gram", "linear", "power", "mean_v", "mean_e"):
            wanted = part(one, kind)
            np.testing.assert_allclose(
                part(other, kind), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
            )


def test_no_batches_is_an_error() -> None:
    case = given_case("gemm")
    with pytest.raises(ValueError, match="no batches"):
        collect(case.layer, case.weight, iter(()), 0, None, centred=False)
