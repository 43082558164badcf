"""8-bit weights keep to codes that add up exactly wherever the target's files run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import build

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.plan import make_plan
from onnx_attnround.targets import TARGETS

MODEL = """g (float[N,4,8,8] x) => (float[N,5] y)
    <float[4,4,3,3] c, float[4,1,3,3] d, float[4,4,3,3] e, float[4,5] m> {
        a = Conv<pads=[1,1,1,1]>(x, c)  b = Conv<group=4>(a, d)  h = Conv(b, e)
        p = GlobalAveragePool(h)  f = Flatten(p)  y = MatMul(f, m) }"""


def limits(**options: Any) -> list[int | None]:
    """The limit of a Conv, a depthwise Conv, a Conv and a MatMul."""
    plan = make_plan(build(MODEL), QuantConfig(**options), quantise_activations=True)
    return [layer.weight_spec.limit for layer in plan.layers]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [64, None, 64, 64]),
        ({"weight_bits": 4}, [64, None, 64, 64]),  # the first and the last have 8 bits
        ({"target": "openvino"}, [64, None, 64, 64]),
        ({"weight_range": "full"}, [None] * 4),
        ({"act_bits": 7}, [64, None, None, 64]),  # so have the activations that they read
        ({"act_bits": 4}, [64, None, None, 64]),
        ({"act_bits": 16}, [None] * 4),
        ({"act_bits": 32}, [None] * 4),
        *(({"target": target}, [64, None, 64, 64]) for target in ("ort-arm", "qnn")),
        ({"target": "tensorrt"}, [None] * 4),
    ],
)
def test_the_limit_follows_from_the_codes_of_the_activations(
    options: dict[str, Any], expected: list[int | None]
) -> None:
    assert limits(**options) == expected


def test_the_limit_is_the_largest_with_which_no_pair_leaves_int16() -> None:
    for highest in (1, 127, 128, 200, 255):
        limit = TARGETS["ort"].code_limit(highest)
        assert limit is not None
        assert 2 * limit * highest <= 32767 < 2 * (limit + 1) * highest


@pytest.mark.parametrize("method", ["attention", "adaround", "nearest"])
@pytest.mark.parametrize("reconstruct", ["layer", "block"])
def test_every_method_keeps_to_it(method: str, reconstruct: str) -> None:
    x = np.random.default_rng(0).normal(size=(16, 4, 8, 8)).astype(np.float32)
    result = quantize(
        build(MODEL), {"x": x},
        QuantConfig(method=method, reconstruct=reconstruct, steps=5, threads=1),
    )  # fmt: skip
    largest = [int(np.abs(found.codes.astype(int)).max()) for found in result.roundings.values()]
    assert [60 <= code <= 64 for code in largest] == [True, False, True, True]
    assert largest[1] > 64
    assert result.checked.fits_int16
    assert result.checked.findings == ()
    assert set(result.allocation.bits.values()) == {8}
