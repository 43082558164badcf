"""Disks that fill, folders that vanish, runs that get in each other's way."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import onnx
import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

from disturbed_cli import RUN, files, limit_files, prepared, run, start

pytestmark = pytest.mark.slow

WITHOUT_WORK_DIR = RUN[:-2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path)


def told(folder: Path) -> str:
    """The error, which is one line at the end."""
    *stages, line = (folder.parent / "told").read_text().splitlines()
    assert not [stage for stage in stages if "rror" in stage]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("point", "size", "arguments", "message"),
    [
        ("plan", 100_000, WITHOUT_WORK_DIR, "cannot keep activations on disk"),
        ("plan", 3_000, RUN, "cannot write 'kept/"),
        ("plan", 3_000, (*RUN[:-1], "./deep/er"), "cannot write 'deep/er/"),
        ("check", 3_000, RUN, "temporary"),
        ("verify", 3_000, RUN, "cannot write 'out.onnx'"),
        ("saved", 3_000, RUN, "cannot write 'report.json'"),
    ],
    ids=["activations", "work dir", "work dir that was made", "check", "output", "report"],
)
def test_a_disk_that_fills(
    point: str, size: int, arguments: tuple[str, ...], message: str, folder: Path
) -> None:
    before = files(folder)
    assert run(folder, point, limit_files(size), arguments) == 1
    line = told(folder)
    assert message in line
    assert "free some" in line
    after = files(folder)
    if point == "saved":
        onnx.checker.check_model(after.pop("work/out.onnx"))
    assert {name: data for name, data in after.items() if "deep" not in name} == before
    assert run(folder) == 0


@pytest.mark.parametrize("gone", ["results", "kept"])
def test_a_folder_that_vanishes(gone: str, folder: Path) -> None:
    """That of the output ends the run, which then goes on; that of the results is made again."""
    arguments = ("in.onnx", "results/out.onnx", *RUN[2:])
    (folder / "results").mkdir()
    code = run(
        folder, "verify", partial(shutil.rmtree, folder / gone, ignore_errors=True), arguments
    )
    if gone == "results":
        assert code == 1
        assert "folder 'results' of the output does not exist; create it first" in told(folder)
        (folder / gone).mkdir()
        assert run(folder, "", None, (*arguments, "-v")) == 0
        assert "round 3/3 head" in (folder.parent / "told").read_text()
        assert (folder.parent / "told").read_text().count("(from the work dir)") == 8
    else:
        assert code == 0
    onnx.checker.check_model(str(folder / "results" / "out.onnx"))


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same run", "other seed"])
def test_two_runs_to_one_output(seeds: tuple[int, int], folder: Path) -> None:
    """Both are done, and what is there in the end is the whole output of one."""
    wanted = []
    for seed in set(seeds):
        assert run(folder, "", None, (*RUN, "--seed", str(seed))) == 0
        wanted.append((folder / "out.onnx").read_bytes())
        (folder / "out.onnx").unlink()
    (folder / "report.json").unlink()
    before = files(folder)
    for _ in range(2):
        both = [start(folder, (*RUN, "--seed", str(seed))) for seed in seeds]
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        after = files(folder)
        assert after.pop("work/out.onnx") in wanted
        after.pop("work/report.json")
        assert after == before
        assert list((folder / "kept").iterdir()) == []
