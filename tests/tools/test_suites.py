"""Short legs of the two suites in tools/: the onnx package's own cases, and the fuzzer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnx_attnround import quantize

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import fuzz
import onnx_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="workers are bounded by rlimit"),
]


def ignore(outcome: onnx_cases.Outcome) -> None:
    """Outcomes are looked at together."""


def test_a_sample_of_the_onnx_cases() -> None:
    wanted = list(onnx_cases.cases(every=150, only="[nps]*/*"))
    outcomes = onnx_cases.judge_all(wanted, 2, 120, ignore)
    assert len(outcomes) == len(wanted) > 25
    assert [one for one in outcomes if one.kind in onnx_cases.FAILURES] == []
    assert sum(one.kind == "converted" for one in outcomes) > len(wanted) / 4


def test_a_short_run_of_the_fuzzer() -> None:
    outcomes = onnx_cases.judge_all(list(fuzz.cases(1, range(45))), 2, 120, ignore)
    assert {one.case.form for one in outcomes} == set(fuzz.FORMS)
    assert [one for one in outcomes if fuzz.failed(one)] == []


@pytest.mark.parametrize("bits", [8, 32])
def test_outputs_of_quantised_layers_may_change(bits: int, tmp_path: Path) -> None:
    """Also of a Conv whose weights alone are quantised: a Cast and a Mul make floats of them."""
    (tmp_path / "m.onnx").write_bytes(next(fuzz.cases(0, range(68, 69))).model)
    feeds = onnx_cases.random_feeds(tmp_path / "m.onnx")
    result = quantize(tmp_path / "m.onnx", list(feeds), {"act_bits": bits, "steps": 5})
    outputs = {value.name for value in result.model.graph.outputs}
    assert outputs <= onnx_cases._quantised(result)


def test_the_judge_tells_failures_apart() -> None:
    """A suite that can't fail proves nothing."""
    sound = next(fuzz.cases(0, range(2, 3)))
    assert onnx_cases.judge(sound)[0] == "converted"
    worker = onnx_cases.Worker(0.01)
    assert worker.run(sound).kind == "too slow"
    broken = onnx_cases.Case("none", "graph", b"\0\0", ())
    kind, why = onnx_cases.judge(broken)
    assert (kind, "is not an ONNX file" in why) == ("refused", True)
    assert fuzz.failed(onnx_cases.Outcome(broken, kind, why))
