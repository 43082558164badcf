"""The arithmetic is that of ONNX Runtime, bit for bit; ranges give sound parameters."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnx_attnround.numerics import TINY
from onnx_attnround.qdq.arithmetic import (
    channel_view,
    code_dtype,
    dequantize,
    params_from_range,
    quantize,
    spread,
)
from onnx_attnround.records import QuantSpec

TYPES = {
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (-32768, 32767),
    "UINT16": (0, 65535),
    "INT4": (-8, 7),
    "UINT4": (0, 15),
}
CHANNELS = 5
FINITE = np.finfo(np.float32)


def ort_codes_and_values(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """What QuantizeLinear and then DequantizeLinear of ONNX Runtime make of ``x``."""
    code_type = getattr(TensorProto, dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["codes"], axis=1),
        helper.make_node("DequantizeLinear", ["codes", "scale", "point"], ["values"], axis=1),
        helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.INT32),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("wide", TensorProto.INT32, x.shape),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, x.shape),
        ],
        [
            onnx.numpy_helper.from_array(scale, "scale"),
            helper.make_tensor("point", code_type, scale.shape, zero_point.reshape(-1).tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    codes, values = session.run(None, {"x": x})
    return codes, values


def awkward_values(scale: np.ndarray, lowest: int, highest: int, seed: int) -> np.ndarray:
    """Ties, the edges of the range, far beyond it, tiny values and noise; ``[n, CHANNELS]``."""
    rng = np.random.default_rng(seed)
    levels = np.unique(np.r_[lowest - 3 : lowest + 4, -4:5, highest - 3 : highest + 4])
    middles = rng.integers(lowest, highest, 40)
    steps = np.concatenate([levels, levels + 0.5, middles + 0.5, rng.normal(size=40) * highest])
    x = steps.astype(np.float32)[:, None] * scale.reshape(-1).astype(np.float32)
    x = np.broadcast_to(x, (len(steps), CHANNELS))
    near = np.concatenate([np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -FINITE.max)])
    fixed = np.array([0.0, -0.0, FINITE.tiny, FINITE.smallest_subnormal, FINITE.max, FINITE.min])
    extremes = np.repeat(fixed.astype(np.float32)[:, None], CHANNELS, axis=1)
    return np.ascontiguousarray(np.concatenate([x, near, extremes]))


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-30, 30))
def test_bit_for_bit_equal_to_onnx_runtime(
    dtype: str, per_channel: bool, seed: int, exponent: float
) -> None:
    """A third of the scales are powers of two, where a tie is a tie."""
    lowest, highest = TYPES[dtype]
    rng = np.random.default_rng(seed)
    shape = (CHANNELS,) if per_channel else ()
    power = round(exponent) if seed % 3 == 0 else exponent + rng.uniform(-1, 1, shape)
    scale = np.broadcast_to(np.exp2(power), shape).astype(np.float32)
    zero_point = rng.integers(lowest, highest + 1, shape)
    x = awkward_values(scale, lowest, highest, seed)
    if per_channel and dtype.endswith("INT4"):
        x = x[(np.abs(x) < 2.0**31 * scale).all(1)]  # else the kernel's int32 overflows
    with np.errstate(over="ignore"):
        codes = quantize(x, scale, zero_point.astype(np.float32), lowest, highest)
    values = dequantize(codes, scale, zero_point.astype(np.float32))
    assert codes.dtype == values.dtype == np.float32
    expected_codes, expected_values = ort_codes_and_values(x, scale, zero_point, dtype)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(values.view(np.uint32) << 1, expected_values.view(np.uint32) << 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_torch_gives_what_numpy_gives(dtype: str) -> None:
    lowest, highest = TYPES[dtype]
    scale = np.linspace(0.01, 3, CHANNELS, dtype=np.float32)
    zero_point = np.linspace(lowest, highest, CHANNELS).round().astype(np.float32)
    x = awkward_values(scale, lowest, highest, 0)
    tensors = [torch.from_numpy(array) for array in (x, scale, zero_point)]
    with np.errstate(over="ignore"):
        codes = quantize(x, scale, zero_point, lowest, highest)
    torch_codes = quantize(*tensors, lowest, highest)
    np.testing.assert_array_equal(torch_codes.numpy(), codes)
    torch_values = dequantize(torch_codes, *tensors[1:])
    np.testing.assert_array_equal(torch_values.numpy(), dequantize(codes, scale, zero_point))


# --- params_from_range --------------------------------------------------------------------

SPECS = st.builds(
    lambda bits, kind: QuantSpec(bits=bits, signed=kind[0], symmetric=kind[1], limit=kind[2]),
    st.sampled_from([2, 3, 4, 5, 8, 16]),
    st.sampled_from(
        [(True, True, None), (True, True, 64), (True, True, 1), (True, False, None)]
        + [(False, True, None), (False, False, None)]
    ),
)
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-100, 100, width=32)


@settings(max_examples=500, deadline=None)
@given(SPECS, FLOATS, FLOATS)
def test_range_is_covered_and_zero_exact(spec: QuantSpec, one: float, other: float) -> None:
    lo, hi = min(one, other), max(one, other)
    params = params_from_range(spec, lo, hi)
    scale, point = float(params.scale), int(params.zero_point)
    assert params.spec == spec
    assert (params.scale.dtype, params.scale.shape) == (np.float32, ())
    assert (params.zero_point.dtype, params.zero_point.shape) == (code_dtype(spec), ())
    assert FINITE.tiny <= scale < np.inf
    assert spec.qmin <= point <= spec.qmax
    zero = quantize(np.float32(0), params.scale, point, spec.qmin, spec.qmax)
    assert dequantize(zero, params.scale, point) == 0
    half = 0.5 * scale * (1 + 1e-5) + 1e-6 * max(-lo, hi)
    assert (spec.qmin - point) * scale <= min(lo, 0) + half
    assert (spec.qmax - point) * scale >= max(hi, 0) - half
    if spec.symmetric:
        assert point == (0 if spec.signed else 2 ** (spec.bits - 1))
    elif (width := max(hi, 0) - min(lo, 0)) >= TINY:
        assert scale == pytest.approx(width / (spec.qmax - spec.qmin), rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_values_of_the_range_return_within_half_a_step(
    spec: QuantSpec, one: float, other: float
) -> None:
    lo, hi = min(one, other), max(one, other)
    params = params_from_range(spec, lo, hi)
    x = np.linspace(lo, hi, 101, dtype=np.float32)
    point = params.zero_point.astype(np.float32)
    codes = quantize(x, params.scale, point, spec.qmin, spec.qmax)
    error = np.abs(dequantize(codes, params.scale, point).astype(np.float64) - x)
    # The zero point, rounded too, may push an end of the range out by half a step.
    assert error.max() <= params.scale * 0.5001 + 1e-6 * max(abs(lo), abs(hi))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45, 1e-38])
@pytest.mark.parametrize("least_range", [0.0, 1e-4])
def test_constant_nothing_has_the_range_to_one(
    signed: bool, symmetric: bool, value: float, least_range: float
) -> None:
    spec = QuantSpec(bits=8, signed=signed, symmetric=symmetric, least_range=least_range)
    params = params_from_range(spec, value, value)
    assert params == params_from_range(spec, 0.0, 1.0)
    assert params.scale == np.float32(1 / (127 if symmetric else 255))


def test_positive_and_negative_constants() -> None:
    spec = QuantSpec(bits=8, signed=False, symmetric=False)
    above, below = params_from_range(spec, 5.1, 5.1), params_from_range(spec, -5.1, -5.1)
    assert (above.scale, above.zero_point) == (np.float32(0.02), 0)
    assert (below.scale, below.zero_point) == (np.float32(0.02), 255)


def test_symmetric_range_takes_the_side_that_needs_more() -> None:
    spec = QuantSpec(bits=8, signed=True, symmetric=True)
    limited = QuantSpec(bits=8, signed=True, symmetric=True, limit=64)
    assert params_from_range(spec, -1.28, 1.0).scale == np.float32(0.01)
    assert params_from_range(spec, -1.0, 1.27).scale == np.float32(0.01)
    assert params_from_range(limited, -0.64, 0.6).scale == np.float32(0.01)


def test_a_limit_bounds_the_codes_of_both_signs_where_the_width_does_not() -> None:
    for bits, lowest, highest in ((8, -64, 64), (7, -64, 63), (4, -8, 7)):
        spec = QuantSpec(bits=bits, signed=True, symmetric=True, limit=64)
        assert (spec.qmin, spec.qmax) == (lowest, highest)


def test_whole_of_float32_is_a_range() -> None:
    for bits, signed in ((2, False), (8, False), (8, True), (16, True)):
        spec = QuantSpec(bits=bits, signed=signed, symmetric=False)
        params = params_from_range(spec, float(FINITE.min), float(FINITE.max))
        middle = (spec.qmin + spec.qmax) / 2
        assert np.isfinite(params.scale)
        assert abs(int(params.zero_point) - middle) <= 0.5


@pytest.mark.parametrize(
    ("bits", "signed", "name"),
    [(2, True, "int8"), (8, True, "int8"), (4, False, "uint8"), (9, True, "int16"),
     (16, False, "uint16")],
)  # fmt: skip
def test_code_dtype_holds_the_codes(bits: int, signed: bool, name: str) -> None:
    spec = QuantSpec(bits=bits, signed=signed, symmetric=True)
    limits = np.iinfo(code_dtype(spec))
    assert code_dtype(spec) == name
    assert limits.min <= spec.qmin
    assert spec.qmax <= limits.max


@pytest.mark.parametrize("axis", [0, 1])
def test_spread_repeats_the_scale_of_a_block(axis: int) -> None:
    spec = QuantSpec(bits=4, signed=True, symmetric=True, axis=axis, block_size=2)
    scale = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], np.float32)  # three blocks
    wanted = np.array([[1, 10], [1, 10], [2, 20], [2, 20], [3, 30]], np.float32)  # five inputs
    scale, wanted = (scale, wanted) if axis else (scale.T, wanted.T)
    np.testing.assert_array_equal(spread(scale, wanted.shape, spec), wanted)


def test_channel_view_broadcasts_along_the_axis() -> None:
    values = np.arange(3)
    assert channel_view(values, 4, 1).shape == (1, 3, 1, 1)
    assert channel_view(values, 2, 0).shape == (3, 1)
    assert channel_view(values, 4, None) is values
    scalar = np.asarray(2.0)
    assert channel_view(scalar, 4, 0) is scalar
