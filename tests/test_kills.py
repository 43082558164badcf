"""Killed or interrupted at any point: the input as it was, the output whole, or as it was before.

What a killed run leaves behind, the next one removes.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import build_proto
from struck import POINTS, start

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

TEXT = """
net (float[N, 2, 32, 32] x) => (float[N, 3] y)
<float[4, 2, 3, 3] w1, float[4] b1, float[4, 4, 3, 3] w2, float[3, 4] w3> {
    [first] c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu(c)
    [second] d = Conv <pads = [1, 1, 1, 1]> (r, w2)
    q = Relu(d)
    p = GlobalAveragePool(q)
    f = Flatten(p)
    [head] y = Gemm <transB = 1> (f, w3)
}
"""
SETTINGS = """
threads = 1
steps = 2
batch_size = 32
activation_memory_mb = 1  # so that some go to disk
allocator = "gram"
mean_bits = 4
bit_choices = [3, 4, 8]
act_bits = 4
first_last_bits = 4
reconstruct = "block"
"""
RUN = (
    *("in.onnx", "out.onnx", "--calib", "calib.npz", "--config", "config.toml"),
    *("--report", "report.json", "--work-dir", "kept"),
)
LEAVES = ("measure", "round", "keep", "refine", "save", "saved", "report")
"""Points at which files are open that a kill leaves behind."""
OLDER = b"an output of before"


def prepared(folder: Path) -> Path:
    """A folder with what a run needs, which takes every stage there is."""
    work = folder / "work"
    work.mkdir()
    (folder / "temp").mkdir()
    rng = np.random.default_rng(0)
    onnx.save(build_proto(TEXT), work / "in.onnx")
    np.savez(work / "calib.npz", x=rng.normal(size=(160, 2, 32, 32)).astype(np.float32))
    (work / "config.toml").write_text(SETTINGS)
    return work


def files(folder: Path) -> dict[str, bytes]:
    """What lies in the folder and in that for temporary files; finished results left out."""
    found = {
        str(path.relative_to(folder.parent)): path.read_bytes() if path.is_file() else b""
        for path in (*folder.rglob("*"), *(folder.parent / "temp").rglob("*"))
    }
    return {name: data for name, data in found.items() if not name.startswith("work/kept")}


def run(folder: Path, point: str = "", number: int = 0) -> int | None:
    process = start(folder, RUN, point, number)
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of an unbroken run."""
    folder = prepared(tmp_path_factory.mktemp("whole"))
    assert run(folder) == 0
    return (folder / "out.onnx").read_bytes()


@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
@pytest.mark.parametrize("point", POINTS)
def test_at_any_point_by_any_signal(
    point: str, number: signal.Signals, older: bool, tmp_path: Path, whole: bytes
) -> None:
    folder = prepared(tmp_path)
    if older:
        (folder / "out.onnx").write_bytes(OLDER)
    before = files(folder)
    killed = number == signal.SIGKILL
    assert run(folder, point, number) == (-number if killed else 128 + number)
    after = files(folder)
    if point in ("saved", "report"):
        assert after.pop("work/out.onnx") == whole
        before.pop("work/out.onnx", None)
    if killed:
        assert after.items() >= before.items()
        assert bool(after.keys() - before.keys()) == (point in LEAVES)
        assert run(folder) == 0
        assert json.loads((folder / "report.json").read_bytes())
        after = files(folder)
        after.pop("work/report.json")
        assert after.pop("work/out.onnx") == whole
        before.pop("work/out.onnx", None)
        assert list((folder / "kept").iterdir()) == []
    assert after == before
