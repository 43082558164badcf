"""Files compute the same on a CPU without VNNI, which qemu emulates, as on this one."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_attnround import QuantizeResult, quantize
from onnx_attnround.runtime.session import open_session

EMULATOR = shutil.which("qemu-x86_64")
SAMPLES = 32
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        EMULATOR is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="qemu-x86_64 (Debian's qemu-user) is not here, or Python is not for x86-64",
    ),
]

RUN = """
import sys, numpy, onnxruntime
onnxruntime.set_default_logger_severity(4)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input": numpy.load(sys.argv[2])})[0])
"""


def converted(models: Path, name: str, out: Path, **options: Any) -> QuantizeResult:
    images = np.load(models / "digits_calib.npz")["input"][:128]
    settings = {"steps": 20, "threads": 1, **options}
    return quantize(models / f"digits_{name}.onnx", images, settings, output=out)


def agreement(models: Path, out: Path, folder: Path) -> float:
    """SQNR of the outputs on an emulated Haswell, against those on this CPU, in dB."""
    images = np.load(models / "digits_eval.npz")["input"][:SAMPLES]
    np.save(folder / "x.npy", images)
    command = [EMULATOR or "", "-cpu", "Haswell-v4", sys.executable, "-c", RUN,
               str(out), str(folder / "x.npy"), str(folder / "y.npy")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    here = open_session(out, threads=1).run(None, {"input": images})[0].astype(np.float64)
    error = np.square(here - np.load(folder / "y.npy")).sum()
    return float(10 * np.log10(np.square(here).sum() / max(error, 1e-30)))


@pytest.mark.parametrize("options", [{}, {"act_bits": 7, "weight_bits": 8}, {"weight_bits": 4}])
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_the_same_without_vnni(
    name: str, options: dict[str, int], models_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    assert converted(models_dir, name, out, **options).checked.fits_int16
    assert agreement(models_dir, out, tmp_path) > 45


def test_all_codes_are_for_cpus_that_have_it(models_dir: Path, tmp_path: Path) -> None:
    """What the limit is for: full codes differ, and the check names the layers."""
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no VNNI either")
    out = tmp_path / "out.onnx"
    checked = converted(models_dir, "mobilenet", out, weight_range="full").checked
    assert checked.fits_int16 is False
    assert "pairs-beyond-int16" in {finding.rule for finding in checked.findings}
    assert agreement(models_dir, out, tmp_path) < 35
