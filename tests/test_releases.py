"""Files run in the oldest ONNX Runtime that the check names, and the tool in its own oldest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onnx_attnround import QuantConfig, QuantizeResult, quantize
from onnx_attnround.graph import save
from onnx_attnround.runtime.session import open_session

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
RELEASES = ROOT / ".venv" / "onnxruntime"  # filled by `make test`
OLDEST_FOR_THE_TOOL = "1.23.2"  # as in pyproject.toml

RUN = """
import sys, numpy, onnxruntime
onnxruntime.set_default_logger_severity(4)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input": numpy.load(sys.argv[2])})[0])
print(onnxruntime.__version__)
"""


def in_release(release: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with that release of ONNX Runtime in place of the installed one."""
    folder = RELEASES / release
    if not (folder / "onnxruntime").is_dir():
        pytest.skip(f"ONNX Runtime {release} is not in {RELEASES.relative_to(ROOT)}: `make test`")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def images() -> np.ndarray:
    return np.load(MODELS / "digits_calib.npz")["input"][:32]


@cache
def digits(storage: str, bits: int) -> QuantizeResult:
    config = QuantConfig(weight_bits=bits, weight_storage=storage, steps=5, threads=1)
    return quantize(MODELS / "digits_resnet.onnx", images(), config)


@pytest.mark.parametrize(
    ("storage", "bits", "oldest", "too_old"),
    [
        ("int8", 8, "1.17", None),
        ("int4", 4, "1.20", "1.17.3"),
        ("packed", 4, "1.23.2", "1.20.1"),
        ("packed2", 2, "1.24.4", "1.23.2"),
    ],
)
def test_files_run_in_the_oldest_release_that_is_named(
    storage: str, bits: int, oldest: str, too_old: str | None, tmp_path: Path
) -> None:
    result = digits(storage, bits)
    assert result.checked.oldest_onnxruntime == oldest
    save(result.model, tmp_path / "model.onnx")
    np.save(tmp_path / "input.npy", images())
    arguments = ("-c", RUN, *(tmp_path / name for name in ("model.onnx", "input.npy", "out.npy")))
    release = next(r for r in ("1.17.3", "1.20.1", "1.23.2", "1.24.4") if r.startswith(oldest))
    done = in_release(release, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == release
    newest = open_session(result.model, threads=1).run(None, {"input": images()})[0]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), newest, rtol=1e-3, atol=1e-3)
    if too_old is not None:
        assert in_release(too_old, *arguments).returncode != 0


COUNT = """
import sys, collections, onnx, onnxruntime
onnxruntime.set_default_logger_severity(4)
options = onnxruntime.SessionOptions()
options.optimized_model_filepath = sys.argv[1] + ".optimised"
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
nodes = onnx.load(options.optimized_model_filepath).graph.node
print(*sorted(node.op_type for node in nodes if node.op_type.startswith("Q")))
"""


@pytest.mark.parametrize("release", ["1.17.3", "1.20.1", "1.23.2", "1.24.4"])
def test_older_releases_fuse_all_layers(release: str, tmp_path: Path) -> None:
    """Among others, layers whose bias has no zero point."""
    save(digits("int8", 8).model, tmp_path / "model.onnx")
    done = in_release(release, "-c", COUNT, tmp_path / "model.onnx")
    assert done.returncode == 0, done.stderr
    fused = Counter(done.stdout.split())
    assert (fused["QLinearConv"], fused["QGemm"], fused["QLinearAdd"]) == (8, 1, 3)


def test_what_the_check_says_of_amx_is_so(tmp_path: Path) -> None:
    """The stem has 24 outputs."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.is_file() or "amx_int8" not in cpu.read_text():
        pytest.skip("this CPU has no AMX")
    config = QuantConfig(method="nearest", threads=1)
    result = quantize(MODELS / "digits_mobilenet.onnx", images(), config)
    assert "half-full-tiles" in {finding.rule for finding in result.checked.findings}
    save(result.model, tmp_path / "model.onnx")
    np.save(tmp_path / "input.npy", images())
    newest = open_session(result.model, threads=1).run(None, {"input": images()})[0]
    for release, right in (("1.20.1", True), ("1.24.4", False)):
        output = tmp_path / f"{release}.npy"
        done = in_release(
            release, "-c", RUN, tmp_path / "model.onnx", tmp_path / "input.npy", output
        )
        assert done.returncode == 0, done.stderr
        assert np.allclose(np.load(output), newest, rtol=1e-3, atol=1e-3) == right


@pytest.mark.parametrize("bits", ["8", "4"])
def test_the_tool_runs_on_the_oldest_release_that_it_asks_for(bits: str, tmp_path: Path) -> None:
    assert f"onnxruntime-gpu>={OLDEST_FOR_THE_TOOL};" in (ROOT / "pyproject.toml").read_text()
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    done = in_release(
        OLDEST_FOR_THE_TOOL, "-m", "onnx_attnround", MODELS / "digits_resnet.onnx", output,
        "--calib", MODELS / "digits_calib.npz", "--samples", "32", "--weight-bits", bits,
        "--report", report, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())
    assert told["versions"]["onnxruntime"] == OLDEST_FOR_THE_TOOL
    assert output.is_file()
