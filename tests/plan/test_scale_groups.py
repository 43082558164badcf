"""Which weights get blocks of scales, and what is told where they get none."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import build

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.plan import make_plan
from onnx_attnround.records import QuantPlan

NET = (
    "g (float[N,2,8,8] x) => (float[N,c] y) <float[2,2,3,3] w, float[72,100] a, float[100] ab, "
    "float[32,100] b, float[32,32] d, float[32] db> { c = Conv(x, w) f = Flatten(c) "
    "p = MatMul(f, a) r = Add(p, ab) q = Gemm<transB=1>(r, b) y = Gemm(q, d, db) }"
)


def plan(**options: Any) -> QuantPlan:
    return make_plan(build(NET), QuantConfig.parse(options), quantise_activations=False)


def sizes(made: QuantPlan, bits: int = 4) -> dict[str, int | None]:
    return {layer.y: layer.spec_of(bits).block_size for layer in made.layers}


def test_matrices_of_more_than_one_block_get_them() -> None:
    made = plan(block_size=32)
    assert sizes(made) == {"c": None, "p": 32, "q": 32, "y": None}
    assert set(made.unblocked.values()) == {
        "Conv takes one scale per channel", "32 inputs fill no more than one"
    }  # fmt: skip
    assert sizes(plan(block_size=16))["y"] == 16
    assert set(sizes(plan()).values()) == {None}
    assert plan().unblocked == {}


def test_a_last_block_is_short_only_where_the_target_takes_it() -> None:
    assert sizes(plan(block_size=64))["q"] == 64  # of 100 inputs
    made = plan(block_size=64, target="openvino")
    assert sizes(made)["q"] is None
    assert "its 100 inputs are no multiple of 64" in made.unblocked.values()


def test_some_targets_take_blocks_of_few_bits_only() -> None:
    net = "g (float[N,128] x) => (float[N,c] y) <float[128,8] w> { y = MatMul(x, w) }"
    config = QuantConfig(block_size=64, target="tensorrt")
    made = make_plan(build(net), config, quantise_activations=False)
    assert (sizes(made, 4), sizes(made, 8)) == ({"y": 64}, {"y": None})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 32, "target": "tensorrt"}, "'tensorrt' takes 64, 128, got 32"),
        ({"block_size": 64, "target": "tensorrt", "weight_storage": "int8"}, "int4, got int8"),
        ({"block_size": 24}, "option `block_size`: .*16, 32, 64, 128 or 256, got 24"),
        ({"block_size": 512}, "got 512"),
    ],
)
def test_what_a_target_does_not_take_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**options)


@pytest.mark.parametrize("target", ["ort", "qnn"])
def test_blocks_want_float_activations(target: str) -> None:
    config = QuantConfig(block_size=32, target=target)
    with pytest.raises(ConfigError, match="activations are to be quantised.* give `act_bits` 32"):
        make_plan(build(NET), config, quantise_activations=True)
