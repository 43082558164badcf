"""Samples, or positions of all samples, that are masked throughout are NaN behind a Softmax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import build_proto

from onnx_attnround import QuantizeResult, quantize

ATTENTION = """net (float[N,6,8] x, float[N,{rows},6] m) => (float[N,6,8] y)
<float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo, float[8,16] wu, float[16,8] wd,
 float k> {{
    q = MatMul(x, wq)
    h = MatMul(x, wk)
    v = MatMul(x, wv)
    p = Transpose<perm = [0, 2, 1]>(h)
    r = MatMul(q, p)
    c = Cast<to = 9>(m)
    s = Where(c, k, r)
    a = Softmax(s)
    z = MatMul(a, v)
    o = MatMul(z, wo)
    u = MatMul(o, wu)
    g = Relu(u)
    d = MatMul(g, wd)
    y = Add(d, x)
}}"""


def converted(masks: np.ndarray, folder: Path, **options: object) -> QuantizeResult:
    model = build_proto(ATTENTION.format(rows=masks.shape[1]))
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "k"]
    del model.graph.initializer[:]
    fill = onnx.numpy_helper.from_array(np.float32(-np.inf), "k")
    model.graph.initializer.extend([*kept, fill])
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(0).normal(size=(len(masks), 6, 8)).astype(np.float32)
    return quantize(folder / "in.onnx", {"x": x, "m": masks}, {"threads": 1, **options})


def one_sample() -> np.ndarray:
    lengths = np.random.default_rng(1).integers(2, 7, size=(64, 1, 1))
    masks = (np.arange(6) >= lengths).astype(np.float32)
    masks[5] = 1
    return masks


def padded_rows() -> np.ndarray:
    """Positions beyond the length of a sample see nothing, as in most of the samples."""
    lengths = np.random.default_rng(1).integers(2, 7, size=(64, 1, 1))
    padded = np.arange(6) >= lengths
    return (padded | padded.swapaxes(1, 2)).astype(np.float32)


@pytest.mark.parametrize("masks", [one_sample, padded_rows])
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 25),
        ({"weight_bits": 4, "first_last_bits": 4}, 12),
        ({"weight_bits": 4, "reconstruct": "block"}, 15),
        ({"weight_bits": 4, "act_bits": 32}, 15),
        ({"mean_bits": 5, "allocator": "gram"}, 15),
        ({"target": "qnn"}, 18),
    ],
)
def test_the_rest_is_calibrated_and_rounded_on(
    masks, options: dict[str, object], least: float, tmp_path: Path
) -> None:
    result = converted(masks(), tmp_path, **options)
    (output,) = result.verification.outputs
    assert output.sqnr_db >= least
    for rounding in result.roundings.values():
        assert np.isfinite(rounding.mse_final)
        assert np.isfinite(rounding.scale).all()
    told = [note for note in result.notes if note.startswith("NaN or infinite")]
    assert len(told) == (options.get("act_bits") != 32)


def test_rounding_is_learned_on_the_rest(tmp_path: Path) -> None:
    options = {"weight_bits": 3, "first_last_bits": 3, "act_bits": 32}
    learned, nearest = (
        converted(one_sample(), tmp_path, **options, method=method).verification.outputs[0].sqnr_db
        for method in ("attention", "nearest")
    )
    assert learned > nearest + 0.5
