"""mask: padded tokens are found, and left out of ranges, moments and figures."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.records import Array
from onnx_attnround.samples.mask import counted, find_mask, tokens, without_padding, zero_padding

WAYS = {
    "by name": ("int64[N, T] attention_mask", "z = Identity(attention_mask)"),
    "by Where": (
        "bool[N, T] mask",
        "k = Unsqueeze(mask, ones) b = Where(k, scores, low) z = Softmax(b)",
    ),
    "by Mul": (
        "int32[N, T] key_mask",
        """f = Cast<to = 1>(key_mask) u = Unsqueeze(f, ones) d = Sub(one, u) m = Mul(d, low)
        b = Add(scores, m) z = Softmax(b)""",
    ),
    "an image": ("float[N, T] mask", "f = Unsqueeze(mask, ones) z = Mul(f, scores)"),
    "an index": (
        "int64[N, T] mask_ids",
        "e = Gather(table, mask_ids) b = Add(scores, e) z = Softmax(b)",
    ),
    "of another rank": ("int64[N, T, 1] attention_mask", "z = Identity(attention_mask)"),
    "inverted": ("bool[N, T] key_padding_mask", "z = Not(key_padding_mask)"),
    "of another name": (
        "bool[N, T] kept",
        "k = Unsqueeze(kept, ones) b = Where(k, scores, low) z = Softmax(b)",
    ),
}
FOUND = {"by name": "attention_mask", "by Where": "mask", "by Mul": "key_mask"}


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_told_by_name_and_by_what_they_reach(way: str) -> None:
    declared, body = WAYS[way]
    model = build(
        f"""net (float[N, T, 4] x, {declared}) => (float[N, T, 4] y)
        <int64[1] ones = {{1}}, float one = {{1.0}}, float low = {{-10000.0}}, float[4, 4] w,
         float[9, 4] table> {{ scores = Abs(x) {body} y = MatMul(x, w) }}"""
    )
    assert find_mask(model) == FOUND.get(way)


def test_padding_is_told_only_by_zeros_among_ones() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert tokens({"m": mask}, None) is None
    assert tokens({"m": np.ones((2, 3), int)}, "m") is None
    assert tokens({"m": mask * 2}, "m") is None
    kept = tokens({"m": mask}, "m")
    assert kept is not None and kept.dtype == bool
    values = np.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(without_padding(values, kept), [[0, 1], [2, 3], [6, 7]])
    flat = values.reshape(6, 2)
    np.testing.assert_array_equal(without_padding(flat, kept), [[0, 1], [2, 3], [6, 7]])
    assert zero_padding(values, kept).sum() == without_padding(values, kept).sum()
    for other in (np.ones((2, 3)), np.ones((2, 2, 3)), np.ones((2, 3, 4, 5)), np.ones(6)):
        assert counted(other.shape, kept) is None
        assert without_padding(other, kept) is zero_padding(other, kept) is other


def encoder() -> ir.Model:
    """Two layers over tokens, with a mask that the Softmax of a third output reads."""
    return build(
        """net (float[N, 12, 16] x, int64[N, 12] attention_mask)
        => (float[N, 12, 8] y, float[N, 12] z)
        <float[16, 32] v, float[32, 8] w> {
            a = MatMul(x, v)
            r = Relu(a)
            y = MatMul(r, w)
            f = Cast<to = 1>(attention_mask)
            z = Softmax(f)
        }"""
    )


def padded(count: int, scale: float, seed: int = 0) -> dict[str, Array]:
    """Sentences of 3 to 12 tokens; what pads them is ``scale`` times as large."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(12) < rng.integers(3, 13, size=count)[:, None]).astype(np.int64)
    x = rng.normal(size=(count, 12, 16)) * np.where(mask, 1, scale)[..., None]
    return {"x": x.astype(np.float32), "attention_mask": mask}


@pytest.mark.parametrize(
    "how", [{"method": "nearest"}, {"method": "attention"}, {"reconstruct": "block"}], ids=str
)
def test_padding_changes_nothing(how: dict[str, str]) -> None:
    config = QuantConfig(weight_bits=4, first_last_bits=4, observer="minmax", steps=5, **how)
    small, large = (quantize(encoder(), padded(128, scale), config) for scale in (0.0, 300.0))
    assert not any(block.skipped for block in (*small.blocks, *large.blocks))
    for node, rounding in small.roundings.items():
        other = large.roundings[node]
        assert (rounding.codes == other.codes).mean() > 0.999
        np.testing.assert_allclose(rounding.scale, other.scale, rtol=1e-4)
    for result in (small, large):
        assert result.verification is not None
        assert result.verification.outputs[0].judged == 0
    first, second = (r.verification.outputs[0].sqnr_db for r in (small, large))
    assert first == pytest.approx(second, abs=0.01)
    layers = [list(r.verification.layer_sqnr.values()) for r in (small, large)]
    assert layers[0] == pytest.approx(layers[1], abs=0.01)
