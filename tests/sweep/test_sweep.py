"""A sweep: what its file says, jobs that fail or are cut off, one table of all, each backend."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import build_proto

from onnx_attnround.__main__ import main
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.report.swept import Swept
from onnx_attnround.sweep import run as running
from onnx_attnround.sweep.jobs import Job, read_jobs

ROOT = Path(__file__).resolve().parents[2]
NET = """
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w> { y = Conv(x, w) }
"""
JOBS = """
targets = ["ort", "openvino"]
presets = ["w8a8", "w4a8"]
calib = "c.npz"
method = "nearest"
observer = "minmax"
threads = 1

[[models]]
model = "a.onnx"

[[models]]
model = "models/b.onnx"
name = "second"
weight-range = "full"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models, samples, and the jobs that use them."""
    (tmp_path / "models").mkdir()
    for name in ("a.onnx", "models/b.onnx"):
        (tmp_path / name).write_bytes(build_proto(NET).SerializeToString())
    samples = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=samples)
    (tmp_path / "jobs.toml").write_text(JOBS)
    return tmp_path


class Fake:
    """Stands for the processes: keeps which jobs were run, and how they end."""

    def __init__(self, status: dict[str, str] | None = None) -> None:
        self.ran: list[str] = []
        self.status = status or {}

    def __call__(self, job: Job, threads: int) -> dict[str, Any]:
        self.ran.append(job.name)
        status = self.status.get(job.name, "done")
        if status == "done":
            job.file(".onnx").write_bytes(b"made")
        message = "" if status == "done" else "as it was told"
        return {"status": status, "message": message, "figures": {"bytes": 10, "float_bytes": 40}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Jobs are done in this process, by the stand-in."""
    stand_in = Fake()
    monkeypatch.setattr(running, "_outcome", stand_in)

    def here(jobs: list[Job], threads: int, where: object) -> list[Swept]:
        return [running.perform_apart(job, threads) for job in jobs]

    monkeypatch.setattr(running, "_run", here)
    return stand_in


def test_models_by_targets_by_presets_with_paths_from_the_file(folder: Path) -> None:
    output, jobs = read_jobs(folder / "jobs.toml")
    assert output == folder / "swept"
    product = itertools.product(("a", "second"), ("ort", "openvino"), ("w8a8", "w4a8"))
    assert [job.name for job in jobs] == [".".join(each) for each in product]
    first, last = jobs[0], jobs[-1]
    assert (first.model, first.calib) == (str(folder / "a.onnx"), str(folder / "c.npz"))
    assert last.model == str(folder / "models" / "b.onnx")
    config = QuantConfig.parse(last.settings)
    assert (config.weight_bits, config.target, config.weight_range) == (4, "openvino", "full")
    assert QuantConfig.parse(first.settings).weight_range == "safe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'models' is missing"),
        ("models = []", "'models' is missing"),
        ("models = [3]", "got 3 in 'models', expected a path"),
        ("models = ['a.onnx', 'b/a.onnx']", "two jobs are 'a.ort.w8a8'"),
        ("models = ['a.onnx']\ntarget = ['ort']", "unknown key 'target': did you mean 'targets'?"),
        ("models = ['a.onnx']\ntargets = 'ort'", "'targets': got 'ort', expected a list"),
        ("models = ['a.onnx']\ntargets = ['tensort']", "did you mean 'tensorrt'?"),
        ("models = ['a.onnx']\npresets = ['w4']", "option `preset`: "),
        ("models = ['a.onnx']\nweight-bits = 9", "option `weight_bits`: "),
    ],
)
def test_a_mistake_is_found_before_any_job_runs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_jobs(tmp_path / "jobs.toml")
    assert message in str(caught.value)


def test_what_is_done_is_kept_until_job_or_files_change(folder: Path, fake: Fake) -> None:
    fake.status = {"a.ort.w4a8": "failed", "a.openvino.w8a8": "gate missed"}
    output, jobs = read_jobs(folder / "jobs.toml")
    found = running.sweep(output, jobs)
    assert [each.name for each in found] == [job.name for job in jobs] == fake.ran
    assert [each.status for each in found][:3] == ["done", "failed", "gate missed"]

    fake.ran.clear()
    running.sweep(output, jobs)
    assert fake.ran == ["a.ort.w4a8"]  # what failed is tried again

    fake.ran.clear()
    (output / "a.ort.w8a8.onnx").unlink()
    (output / "second.ort.w8a8.json").write_text("{")
    samples = folder / "c.npz"
    running.sweep(output, jobs)
    assert set(fake.ran) == {"a.ort.w8a8", "a.ort.w4a8", "second.ort.w8a8"}
    fake.ran.clear()
    os.utime(samples, ns=(1, 1))
    running.sweep(output, jobs)
    assert len(fake.ran) == 8


def test_the_command_tells_all_in_one_table_and_a_page(
    folder: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(folder / "jobs.toml"), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("done") == 8 and "4.00x" in printed.out
    (folder / "swept" / "a.ort.w8a8.html").write_text("its page")
    fake.status = {"a.ort.w4a8": "gate missed"}
    os.utime(folder / "c.npz", ns=(2, 2))
    assert main(["sweep", str(folder / "jobs.toml"), "-q"]) == 3
    fake.status = {"a.ort.w8a8": "failed", "second.ort.w8a8": "failed"}
    os.utime(folder / "c.npz", ns=(3, 3))
    capsys.readouterr()
    assert main(["sweep", str(folder / "jobs.toml"), "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert "error: failed: 2 of 8 jobs, first a.ort.w8a8: as it was told" in printed.err
    jobs = json.loads(printed.out)["jobs"]
    assert len(jobs) == 8
    assert json.loads((folder / "swept" / "sweep.json").read_text())["jobs"] == jobs
    page = (folder / "swept" / "sweep.html").read_text()
    assert "6 of 8 jobs are done" in page and '<a href="a.ort.w8a8.html">' in page
    assert "| second.openvino.w4a8 |" in (folder / "swept" / "sweep.md").read_text()


def test_a_backend_that_is_not_there_is_told_with_its_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", str(folder / "jobs.toml"), "--backend", "ray"]) == 2
    assert "pip install 'onnx-attnround[ray]'" in capsys.readouterr().err
    assert main(["sweep", str(folder / "jobs.toml"), "--backend", "slurm"]) == 2
    assert "unknown backend 'slurm': expected one of loky, ray, dask" in capsys.readouterr().err


# --- in processes -------------------------------------------------------------------------


def started(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "onnx_attnround", "sweep", "jobs.toml", "--workers", "2", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    """The models that a sweep has made, by their names."""
    return {path.name: path.read_bytes() for path in (folder / "swept").glob("*.onnx")}


@pytest.mark.slow
def test_a_local_cluster_of_dask_does_the_jobs(folder: Path) -> None:
    pytest.importorskip("distributed")
    (folder / "jobs.toml").write_text(JOBS.replace('"ort", ', "").replace('"w8a8", ', ""))
    done = started(folder, "--backend", "dask")
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    assert set(results(folder)) == {"a.openvino.w4a8.onnx", "second.openvino.w4a8.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "ray"])
def test_a_sweep_that_is_killed_goes_on_where_it_was(backend: str, folder: Path) -> None:
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    first = started(folder, "--backend", backend)
    deadline = time.monotonic() + 300
    while len(list((folder / "swept").glob("*.*.*.json"))) < 2 and time.monotonic() < deadline:
        assert first.poll() is None, first.stderr and first.stderr.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "swept").glob("*.*.*.json")}
    assert len(kept) >= 2
    second = started(folder, "--backend", backend)
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert len(results(folder)) == 8
    for path, written in kept.items():
        assert path.stat().st_mtime_ns == written  # not done again
    for data in results(folder).values():
        onnx.checker.check_model(onnx.load_from_string(data))
    assert not (folder / "swept" / ".work").exists()


@pytest.mark.slow
def test_what_ends_one_process_ends_no_other(folder: Path) -> None:
    (folder / "models" / "b.onnx").write_bytes(b"no model")
    (folder / "jobs.toml").write_text(
        JOBS.replace('"openvino"]', '"qnn"]').replace('"w8a8", ', "")
    )
    done = started(folder)
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 1
    told = f"failed: 2 of 4 jobs, first second.ort.w4a8: '{folder / 'models' / 'b.onnx'}' is not an"
    assert told in errors.decode()
    assert set(results(folder)) == {"a.ort.w4a8.onnx", "a.qnn.w4a8.onnx"}


def test_a_crash_is_a_failed_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "crash"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    output, (job, *_) = read_jobs(folder / "jobs.toml")
    output.mkdir()
    found = running.perform_apart(job, 1)
    assert (found.status, found.message) == (
        "failed", "its process ended by signal 9, see a.ort.w8a8.log",
    )  # fmt: skip
