"""What the peer benchmark says of a file and how it keeps its figures; no peer is run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import benchmark_peers  # noqa: E402
from peers import quality  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_of_weights_on_a_grid(bits: int) -> None:
    generator = np.random.default_rng(bits)
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), [6, 4, 40])
    codes[:, 0, :2] = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    scale = generator.uniform(0.001, 0.1, [6, 1, 1])
    weights = (codes * scale).astype(np.float32)
    assert quality.bits_of(weights, 0) == bits
    assert quality.bits_of(np.moveaxis(weights, 0, 1), 1) == bits
    assert quality.bits_of(weights, None) > bits  # six scales are no grid


def test_bits_of_float_and_of_constant_weights() -> None:
    assert quality.bits_of(np.random.default_rng(0).normal(size=[4, 300]), 0) > 8
    assert quality.bits_of(np.zeros([4, 3]), 0) == 1
    assert quality.bits_of(np.full([4, 3], 0.7), 0) == 1


QDQ = """
<ir_version: 10, opset_import: ["": 21]>
tiny (float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y)
<int8[2, 3, 1, 1] codes = {-8, 7, 0, 1, 2, -8},
 float[2] weight_scale = {0.5, 0.25}, int8[2] weight_zero = {0, 0},
 float scale = {0.05}, uint8 zero = {128}>
{
  q = QuantizeLinear (x, scale, zero)
  d = DequantizeLinear (q, scale, zero)
  w = DequantizeLinear <axis = 0> (codes, weight_scale, weight_zero)
  c = Conv (d, w)
  p = QuantizeLinear (c, scale, zero)
  y = DequantizeLinear (p, scale, zero)
}
"""


def test_inspect_tells_integer_layers_and_bits(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    onnx.save(onnx.parser.parse_model(QDQ), path)
    told = quality.inspect(path)
    assert (told["integer_layers"], told["layers"]) == (1, 1)
    assert told["layers_by_bits"] == {"4": 1}
    assert told["bytes"] == path.stat().st_size


def test_inspect_tells_float_layers(models_dir: Path) -> None:
    told = quality.inspect(models_dir / "digits_resnet.onnx")
    assert told["integer_layers"] == 0
    assert told["layers"] == sum(told["layers_by_bits"].values()) > 1
    assert benchmark_peers.bits_told(told["layers_by_bits"]) == "float"


def test_compare() -> None:
    expected = np.array([[1.0, 0.0], [0.0, 2.0]])
    got = np.array([[1.0, 0.0], [2.0, 1.0]])
    told = quality.compare(got, expected, np.array([0, 0]))
    assert told == {"top1": 1.0, "agreement": 0.5, "sqnr_db": pytest.approx(0.0)}
    assert quality.compare(expected, expected, np.array([0, 1]))["sqnr_db"] == np.inf


def test_results_replace_the_rows_that_were_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row = {"setting": "W4A8", "peer": "aimet", "method": "adaround", "remarks": []}
    benchmark_peers.Results(path).add({**row, "top1": 0.5})
    benchmark_peers.Results(path).add({**row, "setting": "W4A4", "cannot": "no such bits"})
    benchmark_peers.Results(path).add({**row, "setting": "W8A8", "peer": "ours", "method": "layer"})
    later = benchmark_peers.Results(path)
    later.add({**row, "simulated": {"top1": 0.75}})
    assert [line["setting"] for line in json.loads(path.read_text())] == ["W8A8", "W4A8", "W4A4"]
    *_, measured, refused = later.table().splitlines()
    assert "| 0.7500 |" in measured and measured.endswith("| simulated only |")
    assert refused.endswith("| cannot: no such bits |")


def test_only_takes_peers_and_their_methods() -> None:
    chosen = benchmark_peers._methods("quark:adaround,ort")
    assert chosen == [("ort", "static"), ("quark", "adaround")]
    with pytest.raises(argparse.ArgumentTypeError, match="quark:lsq"):
        benchmark_peers._methods("ours,quark:lsq")


def test_every_peer_has_a_script() -> None:
    scripts = {path.stem for path in (TOOLS / "peers").glob("run_*.py")}
    assert scripts == {f"run_{name}" for name in benchmark_peers.PEERS if name != "ours"}
