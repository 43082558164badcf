"""Advice: what costs most is named, in lines of a config that a run takes, and that help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import build

from onnx_attnround import GateError, QuantizeResult, quantize
from onnx_attnround.config import QuantConfig
from onnx_attnround.report import markdown
from onnx_attnround.report.document import report_dict
from onnx_attnround.report.page import run_page
from onnx_attnround.verify import Advice
from onnx_attnround.verify.advice import Remedy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FAST: dict[str, Any] = {"method": "nearest", "observer": "minmax", "threads": 1, "smooth": "never"}
NET = """
net (float[N,8,8,8] x) => (float[N,4,8,8] y)
<float[8,8,3,3] w1, float[8,8,3,3] w2, float[8,8,3,3] w3, float[4,8,3,3] w4> {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  b = Relu(a)
  c = Conv <pads = [1, 1, 1, 1]> (b, w2)
  d = Relu(c)
  e = Conv <pads = [1, 1, 1, 1]> (d, w3)
  f = Relu(e)
  y = Conv <pads = [1, 1, 1, 1]> (f, w4)
}
"""


def noise(count: int = 96) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 8, 8, 8)).astype(np.float32)


def missed(**settings: Any) -> QuantizeResult:
    """A run whose gate cannot be reached."""
    with pytest.raises(GateError) as caught:
        quantize(build(NET), noise(), **{"min_sqnr": 200, **FAST, **settings})
    result = caught.value.result
    assert isinstance(result, QuantizeResult)
    return result


def sqnr(result: QuantizeResult) -> float:
    assert result.verification is not None and result.verification.worst_output is not None
    found = result.verification.worst_output.sqnr_db
    assert found is not None
    return found


def test_a_layer_of_few_bits_is_the_most_costly() -> None:
    advice = missed(layer_bits={"Conv_2": 3}).advice
    assert advice is not None
    first = advice.remedies[0]
    assert (first.key, first.name, first.bits) == ("layer_bits", "Conv_2", 8)
    assert first.alone_db + 10 < advice.remedies[1].alone_db
    assert 0.9 < advice.share <= 1


def test_a_tensor_of_few_bits_is_the_most_costly() -> None:
    advice = missed(activation_bits={"d": 3}).advice
    assert advice is not None
    first = advice.remedies[0]
    assert (first.key, first.name, first.bits) == ("activation_bits", "d", 8)


@pytest.mark.parametrize(
    "settings", [{"weight_bits": 3}, {"act_bits": 4}, {}, {"act_bits": 32, "weight_bits": 3}]
)
def test_what_is_advised_can_be_given_and_helps(settings: dict[str, Any]) -> None:
    """Names, of tensors that an Identity parts too, and TOML are what a config takes."""
    poor = missed(**settings)
    assert poor.advice is not None and len(poor.advice.remedies) <= 5
    given = tomllib.loads(poor.advice.block)
    assert set(given) <= {"exclude", "layer_bits", "activation_bits"}
    better = quantize(build(NET), noise(), **{**FAST, **settings, **given})
    assert better.advice is None
    assert sqnr(better) > sqnr(poor) + 2


def test_without_a_miss_there_is_no_advice() -> None:
    result = quantize(build(NET), noise(), **FAST, min_sqnr=1)
    assert result.advice is None and "advise" not in result.seconds


def test_it_is_printed_and_in_every_report() -> None:
    result = missed(layer_bits={"Conv_2": 3})
    assert result.advice is not None
    line = '"Conv_2" = 8  # '
    assert line in result.summary() and "[layer_bits]" in result.summary()
    assert line in markdown.run(result)
    assert "What would help" in run_page(result) and "&#34;Conv_2&#34; = 8" in run_page(result)
    told = report_dict(result)["advice"]
    assert told["remedies"][0]["name"] == "Conv_2" and line in told["config"]


def test_the_block_is_toml_whatever_the_names(tmp_path: Path) -> None:
    names = ('/a"b\\c', "d\te", "f = 1 # ä")
    keys: tuple[Any, ...] = ("exclude", "layer_bits", "activation_bits")
    advice = Advice(
        remedies=tuple(
            Remedy(key=key, name=name, bits=None if key == "exclude" else 8, alone_db=12.0)
            for key, name in zip(keys, names, strict=True)
        ),
        share=1.0,
    )
    read = tomllib.loads(advice.block)
    assert read == {
        "exclude": [names[0]], "layer_bits": {names[1]: 8}, "activation_bits": {names[2]: 8}
    }  # fmt: skip
    assert QuantConfig.parse(read).exclude == (names[0],)
