"""A weight that several layers read is rounded once and stored once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layered_models import noise
from small_models import build

from onnx_attnround import QuantizeResult, quantize

CELLS = {
    "unrolled": """g (float[N,8] x) => (float[N,8] y) <float[8,8] w>
        { [l0] a = MatMul(x, w)  b = Tanh(a)  [l1] c = MatMul(b, w)  d = Tanh(c)
          [l2] e = MatMul(d, w)  f = Relu(e)  [l3] y = MatMul(f, w) }""",
    "with a bias": """g (float[N,8] x) => (float[N,8] y) <float[8,8] w, float[8] v>
        { [l0] a = Gemm<transB=1>(x, w, v)  b = Tanh(a)  [l1] c = Gemm<transB=1>(b, w, v)
          d = Tanh(c)  [l2] y = Gemm<transB=1>(d, w, v) }""",
    "siamese": """g (float[N,3,6,6] x, float[N,3,6,6] z) => (float[N,4,6,6] y)
        <float[4,3,3,3] w, float[4] v>
        { [l0] a = Conv<pads=[1,1,1,1]>(x, w, v)  b = Relu(a)
          [l1] c = Conv<pads=[1,1,1,1]>(z, w, v)  d = Relu(c)  y = Sub(b, d) }""",
}


def result_of(name: str, **options: Any) -> QuantizeResult:
    model = build(CELLS[name])
    return quantize(model, noise(model, 64), {"threads": 1, **options})


def stored(result: QuantizeResult, dims: int) -> list[np.ndarray]:
    """The integer constants of so many dimensions in the file."""
    tensors = (value.const_value for value in result.model.graph.initializers.values())
    found = [t for t in tensors if t is not None and t.dtype.is_integer()]
    return [t.numpy() for t in found if len(t.shape) == dims]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 4},
        {"method": "nearest"},
        {"act_bits": 32, "weight_bits": 4},
        {"target": "qnn"},
        {"target": "tensorrt"},
        {"weight_bits": 4, "act_bits": 4, "reconstruct": "block"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CELLS)
def test_one_copy_in_the_file(name: str, options: dict[str, Any]) -> None:
    result = result_of(name, **options)
    assert len(stored(result, 4 if name == "siamese" else 2)) == 1
    first, *others = result.roundings.values()
    for other in others:
        np.testing.assert_array_equal(other.codes, first.codes)
        np.testing.assert_array_equal(other.scale, first.scale)
    assert not any("more than once" in note for note in result.notes)


def biases(result: QuantizeResult) -> Iterator[np.ndarray]:
    yield from (rounding.bias for rounding in result.roundings.values())


def test_a_bias_is_stored_once_where_one_scale_can_serve() -> None:
    once = result_of("with a bias", act_bits=32, weight_bits=4)
    assert len({bias.tobytes() for bias in biases(once)}) == 1
    assert not any("with a bias for each reader" in note for note in once.notes)
    apart = result_of("with a bias")
    assert len({bias.tobytes() for bias in biases(apart)}) == 3
    assert any("with a bias for each reader" in note for note in apart.notes)


def test_other_bits_are_a_copy_with_a_note() -> None:
    result = result_of("unrolled", layer_bits={"l1": 4})
    assert result.allocation.bits == {"l0": 8, "l1": 4, "l2": 8, "l3": 8}
    assert len(stored(result, 2)) == 2
    assert any("'w' (2 times)" in note for note in result.notes)


def test_first_and_last_readers_keep_the_bits_of_the_whole() -> None:
    """Two copies would take more room than one of the wider bits."""
    assert set(result_of("unrolled", weight_bits=4).allocation.bits.values()) == {8}


def test_budgets_count_a_weight_once() -> None:
    options = {"mean_bits": 6, "first_last_bits": 8, "allocator": "gram", "bit_choices": [4, 6]}
    model = build("""g (float[N,8] x) => (float[N,8] y)
        <float[8,8] u, float[8,8] w, float[8,8] v>
        { [first] a = MatMul(x, u)  b = Tanh(a)  [l1] c = MatMul(b, w)  d = Tanh(c)
          [l2] e = MatMul(d, w)  f = Tanh(e)  [last] y = MatMul(f, v) }""")
    result = quantize(model, noise(model, 64), {"threads": 1, **options})
    assert result.allocation.bits == {"first": 8, "l1": 6, "l2": 6, "last": 8}
    assert result.allocation.mean_bits == 6



def test_the_rounding_serves_all_readers() -> None:
    """Rounded for its first reader, which sees one direction, the second would be no better."""
    rng = np.random.default_rng(0)
    model = build("""g (float[N,16] x, float[N,16] z) => (float[N,16] y) <float[16,16] w>
        { [l0] a = MatMul(x, w)  [l1] b = MatMul(z, w)  y = Add(a, b) }""")
    mixes = rng.normal(size=(2, 2, 16))
    feeds = {
        name: (rng.normal(size=(256, 2)) @ mix + 0.05 * rng.normal(size=(256, 16))).astype("f4")
        for name, mix in zip("xz", mixes, strict=True)
    }
    options = {"threads": 1, "act_bits": 32, "weight_bits": 3, "first_last_bits": 3}
    learned, nearest = (
        quantize(model, feeds, {**options, "method": method})
        for method in ("attention", "nearest")
    )
    weight = model.graph.initializers["w"].const_value.numpy()
    for name in "xz":
        found = [
            float(np.square(feeds[name] @ (rounding.codes * rounding.scale - weight)).sum())
            for rounding in (learned.roundings["l0"], nearest.roundings["l0"])
        ]
        assert found[0] < 0.5 * found[1]
