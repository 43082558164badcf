"""The tool that measures all quantisers on samples that they have not seen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from small_models import build

TOOL = Path(__file__).parents[2] / "tools" / "held_out.py"
CHAIN = """g (float[N,4,8,8] x) => (float[N,6] y)
    <float[6,4,3,3] a, float[6,6,3,3] middle, float[6,6,1,1] b>
    { p = Conv<pads=[1,1,1,1]>(x, a)
      q = Relu(p)
      m = Conv<pads=[1,1,1,1]>(q, middle)
      n = Relu(m)
      r = Conv(n, b)
      s = GlobalAveragePool(r)
      y = Flatten(s) }"""


def test_a_row_for_each_way_with_what_was_printed_beside_what_is_true(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = build(CHAIN)
    for value in model.graph.initializers.values():
        weights = rng.normal(size=value.const_value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(weights, name=value.name)
    ir.save(model, tmp_path / "m.onnx")
    for name in ("calib", "test"):
        np.savez(tmp_path / f"{name}.npz", x=rng.normal(size=(96, 4, 8, 8)).astype(np.float32))
    command = [sys.executable, TOOL, "m.onnx", "--calib", "calib.npz", "--test", "test.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == [
        "nearest W8A8", "onnx_attnround W8A8", "nearest W4A8", "onnx_attnround W4A8",
        "`quantize_static`", "`quantize_dynamic`",
    ]  # fmt: skip
    for row in rows[:4]:
        true, printed, error = map(float, re.findall(r"[\d.]+", row[1]))
        assert abs(true - printed) < 3 + 4 * error
    assert float(rows[1][1].split()[0]) > float(rows[3][1].split()[0]) + 6


def test_rows_are_chosen_by_their_names(tmp_path: Path) -> None:
    ir.save(build(CHAIN), tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(48, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    command = [sys.executable, TOOL, "m.onnx", "--calib", "x.npz", "--test", "x.npz"]
    command += ["--rows", "static,nearest W8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert rows == ["nearest W8A8", "`quantize_static`"]
