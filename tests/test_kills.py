"""Killed or interrupted at any point: the input as it was, the output whole, or as it was before.

What a killed run leaves behind, the next one removes.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

from disturbed_cli import POINTS, files, kill, prepared, run

pytestmark = pytest.mark.slow

LEAVES = ("measure", "round", "keep", "refine", "save", "saved", "report")
"""Points at which files are open that a kill leaves behind."""
NEW = ("round", "save", "saved", "report")  # tried also without an older output
OLDER = b"an output of before"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of an unbroken run."""
    folder = prepared(tmp_path_factory.mktemp("whole"))
    assert run(folder) == 0
    return (folder / "out.onnx").read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
@pytest.mark.parametrize(
    ("point", "older"),
    [*((point, True) for point in POINTS), *((point, False) for point in NEW)],
)
def test_at_any_point_by_any_signal(
    point: str, number: signal.Signals, older: bool, tmp_path: Path, whole: bytes
) -> None:
    folder = prepared(tmp_path)
    if older:
        (folder / "out.onnx").write_bytes(OLDER)
    before = files(folder)
    killed = number == signal.SIGKILL
    assert run(folder, point, kill(number)) == (-number if killed else 128 + number)
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
