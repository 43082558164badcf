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
from onnx_attnround.runtime.session import EXACT_SUMS, open_session

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
for option in sys.argv[4:]:
    options.add_session_config_entry(option, "1")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input": numpy.load(sys.argv[2])})[0])
"""


def converted(models: Path, name: str, out: Path, **options: Any) -> QuantizeResult:
    images = np.load(models / "digits_calib.npz")["input"][:128]
    settings = {"steps": 20, "threads": 1, **options}
    return quantize(models / f"digits_{name}.onnx", images, settings, output=out)


def emulated(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python on an emulated Haswell."""
    command = [EMULATOR or "", "-cpu", "Haswell-v4", sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    """Signal over error in dB, 300 at most."""
    power, error = (float(np.square(x.astype(np.float64)).sum()) for x in (wanted, wanted - got))
    return 10 * float(np.log10(power / max(error, 1e-30 * power)))


def agreement(models: Path, out: Path, folder: Path, *options: str) -> float:
    """SQNR of the outputs on an emulated Haswell, against the exact ones, in dB.

    The emulated session has these ``options``, or those that are the default.
    """
    images = np.load(models / "digits_eval.npz")["input"][:SAMPLES]
    np.save(folder / "x.npy", images)
    done = emulated("-c", RUN, out, folder / "x.npy", folder / "y.npy", *options)
    assert done.returncode == 0, done.stderr
    exact = open_session(out, threads=1).run(None, {"input": images})[0]
    return sqnr(exact, np.load(folder / "y.npy"))


@pytest.mark.parametrize("options", [{}, {"act_bits": 7, "weight_bits": 8}, {"weight_bits": 4}])
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_the_same_without_vnni(
    name: str, options: dict[str, int], models_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    assert converted(models_dir, name, out, **options).checked.fits_int16
    assert agreement(models_dir, out, tmp_path) > 45


def test_all_codes_need_vnni_or_a_session_option(models_dir: Path, tmp_path: Path) -> None:
    """What the limit is for: full codes differ, and the check names the layers."""
    out = tmp_path / "out.onnx"
    checked = converted(models_dir, "mobilenet", out, weight_range="full").checked
    assert checked.fits_int16 is False
    assert "pairs-beyond-int16" in {finding.rule for finding in checked.findings}
    assert agreement(models_dir, out, tmp_path) < 35
    assert agreement(models_dir, out, tmp_path, EXACT_SUMS) > 45
    done = emulated("-m", "onnx_attnround", "check", out, "--calib", tmp_path / "x.npy")
    assert "sums-cut-off" in done.stdout, done.stderr


def test_what_is_made_without_vnni_is_right_elsewhere(models_dir: Path, tmp_path: Path) -> None:
    """Here for a target that has all codes: no session of a conversion may cut sums off."""
    source, out = models_dir / "digits_mobilenet.onnx", tmp_path / "out.onnx"
    images = np.load(models_dir / "digits_calib.npz")["input"][:SAMPLES]
    np.save(tmp_path / "x.npy", images)
    done = emulated("-m", "onnx_attnround", source, out, "--calib", tmp_path / "x.npy",
                    "--target", "qnn", "--method", "nearest", "--threads", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted, got = (
        open_session(path, threads=1, optimise=False).run(None, {"input": images})[0]
        for path in (source, out)
    )
    assert sqnr(wanted, got) > 30
