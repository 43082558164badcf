"""Temporary folders vanish with their work, and those of killed processes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_attnround.graph.scratch import PREFIX, scratch

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from onnx_attnround.graph.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "file").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has such a folder, and the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_vanishes_with_all_that_is_in_it(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    with pytest.raises(error or StopIteration), scratch(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"x")
        assert folder.parent == tmp_path
        raise error or StopIteration
    assert list(tmp_path.iterdir()) == []


def test_folders_in_use_are_left_alone(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], Path]
) -> None:
    _, held = holder
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([held, first, second])
    assert (held / "file").read_bytes() == b"x"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], Path]
) -> None:
    process, held = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (held / "file").exists()
    with scratch(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_nothing_else_is_swept_away(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{PREFIX}link").symlink_to(outside)
    (work / f"{PREFIX}file").write_bytes(b"x")
    (work / "attnround-folder").mkdir()
    before = sorted(work.iterdir())
    with scratch(work):
        pass
    assert sorted(work.iterdir()) == before
    assert outside.is_dir()


def test_a_folder_that_is_missing_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"), scratch(tmp_path / "missing"):
        pass
