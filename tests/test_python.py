"""From the objects of a Python program, a module and its loader, to a checked file; and its log."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from small_models import build

from onnx_attnround import from_torch, quantize, trade_off

NET = """
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w> { y = Conv(x, w) }
"""


@pytest.mark.slow
def test_from_a_module_and_its_loader_to_a_checked_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4)
    )
    images, labels = torch.randn(160, 1, 8, 8), torch.randint(4, (160,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    output = tmp_path / "net.int.onnx"
    result = quantize(
        from_torch(net, images[:1]), loader, output=output, evaluation=loader, threads=1
    )
    assert result.verification is not None and result.verification.accuracy is not None
    assert result.verification.samples == 160 and not result.checked.refused
    with torch.no_grad():
        agreeing = (net(images).argmax(1) == labels).float().mean().item()
    assert result.verification.accuracy.float_top1 == pytest.approx(agreeing)
    (made,) = ort.InferenceSession(output).run(None, {"input": images.numpy()})
    assert np.mean(made.argmax(1) == net(images).argmax(1).numpy()) > 0.9


def test_events_are_logged_once_and_nothing_shows_unasked(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    fast = {"method": "nearest", "observer": "minmax", "threads": 1}
    with caplog.at_level(logging.DEBUG, logger="onnx_attnround"):
        trade_off(build(NET), samples, mean_bits=[8], **fast)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    stages = [line for line in told if not line.startswith("note: ")]
    assert stages[:2] == ["load", "simplify"] and "verify w8" in stages
    assert len(stages) == len(set(stages))
    assert any(line.startswith("note: 8 calibration samples are too few") for line in told)
    assert any(record.levelno == logging.DEBUG for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_a_warning_of_the_library_would_not_show_without_a_handler() -> None:
    script = (
        "import logging, onnx_attnround; logging.getLogger('onnx_attnround').warning('unasked')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
