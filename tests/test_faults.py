"""Bad input and interrupts, each in a process: one clear line, a code, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import build_proto

from onnx_attnround.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"load", "simplify", "plan", "smooth", "calibrate", "pace"}
STAGES |= {"round", "write", "check", "verify"}
RUN = ("in.onnx", "out.onnx", "--calib", "calib.npz", "--threads", "1")
TEXT = """
net (float[N, 2, 6, 6] x) => (float[N, 3] y)
<float[4, 2, 3, 3] w1, float[4] b1, float[3, 4] w2> {
    [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    [head] y = Gemm <transB = 1> (f, w2)
}
"""

Break = Callable[[Path], object]


def samples(count: int = 8, **changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(count, 2, 6, 6)).astype(np.float32), **changed}


def save_samples(arrays: dict[str, np.ndarray], name: str = "calib.npz") -> Break:
    return lambda folder: np.savez(folder / name, **arrays)


def write(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name: str) -> Break:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def nan_sample() -> dict[str, np.ndarray]:
    arrays = samples()
    arrays["x"][5, 1, 2, 3] = np.nan
    return arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small model and samples, which runs without a fault."""
    work = tmp_path / "work"
    work.mkdir()
    onnx.save(build_proto(TEXT), work / "in.onnx")
    save_samples(samples())(work)
    (tmp_path / "temp").mkdir()
    return work


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command line, with a folder of its own for temporary files.

    It heeds SIGINT even where the tests run in the background, with SIGINT ignored.
    """
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder.parent / "temp"),
        "HOME": str(folder.parent),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "onnx_attnround", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file beside the model and in the folder for temporary files."""
    return {
        path: path.read_bytes() if path.is_file() else b"" for path in folder.parent.rglob("*")
    }


def error_line(stderr: str) -> str:
    """The one line of an error, behind which only the names of stages stand."""
    *stages, line = stderr.splitlines()
    assert set(stages) <= STAGES, stderr
    assert line.startswith("error: "), stderr
    return line


@dataclass(frozen=True)
class Fault:
    """What is broken, how it is run, and what the user is told; if ``late``, after slow work."""

    message: str
    broken: Break = lambda folder: None
    arguments: tuple[str, ...] = RUN
    code: int = 1
    late: bool = False


FAULTS = {
    "model missing": Fault("model 'no.onnx' does not exist", arguments=("no.onnx", "out.onnx")),
    "model truncated": Fault("'in.onnx' is not", truncate("in.onnx")),
    "model of other bytes": Fault("'in.onnx' is not", write("in.onnx", b"\x00hello\xff" * 99)),
    "model empty": Fault("'in.onnx' holds no graph", write("in.onnx", b"")),
    "samples missing": Fault(
        "'calib.npz' not found", lambda folder: (folder / "calib.npz").unlink()
    ),
    "samples truncated": Fault("calib.npz", truncate("calib.npz")),
    "samples of other bytes": Fault("calib.npz", write("calib.npz", b"hello")),
    "samples of another name": Fault(
        "input 'x'", save_samples({"z": np.zeros((8, 2, 6, 6), np.float32)})
    ),
    "samples of another shape": Fault(
        "[?, 2, 6, 6]", save_samples({"x": np.zeros((8, 6, 6, 2), np.float32)})
    ),
    "samples with NaN": Fault("NaN", save_samples(nan_sample())),
    "samples that hold objects": Fault(
        "calib.npz", save_samples({"x": np.array([None, "a"], dtype=object)})
    ),
    "no sample": Fault("no calibration samples", save_samples(samples(count=0))),
    "too few labels": Fault(
        "labels",
        save_samples(samples(labels=np.zeros(7, np.int64)), "eval.npz"),
        (*RUN, "--eval", "eval.npz"),
    ),
    "a label of no class": Fault(
        "0 to 2",
        save_samples(samples(labels=np.full(8, 3)), "eval.npz"),
        (*RUN, "--eval", "eval.npz"),
        late=True,
    ),
    "setting unknown": Fault(
        "unknown key 'weight_bit': did you mean 'weight_bits'?",
        write("a.toml", b"weight_bit = 4"),
        (*RUN, "--config", "a.toml"),
        code=2,
    ),
    "settings not TOML": Fault(
        "cannot read config 'a.toml'",
        write("a.toml", b"4 bits"),
        (*RUN, "--config", "a.toml"),
        code=2,
    ),
    "option unknown": Fault("--weight-bit", arguments=(*RUN, "--weight-bit", "4"), code=2),
    "value out of range": Fault("--weight-bits", arguments=(*RUN, "--weight-bits", "1"), code=2),
    "value of another type": Fault("--samples", arguments=(*RUN, "--samples", "all"), code=2),
    "value not finite": Fault("--mean-bits", arguments=(*RUN, "--mean-bits", "nan"), code=2),
    "pattern fits no node": Fault(
        "'/head/*' matches no node", arguments=(*RUN, "--exclude", "/head/*"), code=2
    ),
    "nothing to quantise": Fault("nothing to quantise", arguments=(*RUN, "--exclude", "*")),
    "output folder missing": Fault(
        "folder 'no' of the output does not exist", arguments=("in.onnx", "no/out.onnx", *RUN[2:])
    ),
    "output is a folder": Fault("is a folder", lambda folder: (folder / "out.onnx").mkdir()),
    "output is no file": Fault(
        "not a regular file", lambda folder: os.mkfifo(folder / "out.onnx")
    ),
    "output is the input": Fault(
        "is the input model itself", arguments=("in.onnx", "./in.onnx", *RUN[2:])
    ),
    "output is a hard link to the input": Fault(
        "is the input model itself", lambda folder: os.link(folder / "in.onnx", folder / "out.onnx")
    ),
    "output holds the input's weights": Fault(
        "'w.data' holds weights of the input model",
        lambda folder: onnx.save(
            onnx.load(folder / "in.onnx"), folder / "in.onnx", save_as_external_data=True,
            location="w.data", size_threshold=0,
        ),
        ("in.onnx", "w.data", *RUN[2:]),
    ),
    "report folder missing": Fault(
        "folder 'no' of the output does not exist", arguments=(*RUN, "--report", "no/r.json")
    ),
    "report is a folder": Fault(
        "'r.json' is a folder",
        lambda folder: (folder / "r.json").mkdir(),
        (*RUN, "--report", "r.json"),
    ),
    "work dir is a file": Fault(
        "cannot write to work dir 'in.onnx'", arguments=(*RUN, "--work-dir", "in.onnx")
    ),
    "work dir below a file": Fault(
        "cannot write to work dir 'in.onnx/work'", arguments=(*RUN, "--work-dir", "in.onnx/work")
    ),
    "output is a link to the input": Fault(
        "is the input model itself", lambda folder: (folder / "out.onnx").symlink_to("in.onnx")
    ),
    "output is the samples": Fault(
        "--calib", arguments=("in.onnx", "calib.npz", *RUN[2:]), code=2
    ),
    "output is the report": Fault(
        "--report", arguments=("in.onnx", "o.json", *RUN[2:], "--report", "./o.json"), code=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_told_in_one_line_and_leaves_no_trace(fault: Fault, folder: Path) -> None:
    fault.broken(folder)
    before = contents(folder)
    process = start(folder, *fault.arguments)
    printed, told = process.communicate(timeout=60)
    assert fault.message in error_line(told)
    assert ("round" in told.splitlines()) == fault.late
    assert process.returncode == fault.code
    assert printed == ""
    assert contents(folder) == before


def test_without_a_fault_only_the_output_is_left(folder: Path) -> None:
    before = contents(folder)
    process = start(folder, *RUN)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert contents(folder).keys() - before.keys() == {folder / "out.onnx"}


# --- interrupts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of a run whose calibrate, round and verify take some seconds each.

    The activations exceed their memory, so that ``round`` keeps them in files.
    """
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("calib", 20_000), ("eval", 150_000)):
        np.savez(data / f"{name}.npz", input=rng.random((count, 1, 8, 8), np.float32))
    (data / "config.toml").write_text("activation_memory_mb = 1\nthreads = 1\n")
    return (
        str(models_dir / "digits_resnet.onnx"), "out.onnx",
        *("--calib", str(data / "calib.npz"), "--eval", str(data / "eval.npz")),
        *("--config", str(data / "config.toml")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "number"),
    [("calibrate", signal.SIGINT), ("round", signal.SIGTERM), ("verify", signal.SIGINT)],
)
def test_an_interrupt_ends_the_run_and_leaves_no_trace(
    stage: str, number: signal.Signals, long_run: tuple[str, ...], folder: Path
) -> None:
    before = contents(folder)
    count = {"calibrate": 20_000, "round": 5_000, "verify": 64}[stage]
    with start(folder, *long_run, "--samples", str(count)) as process:
        wait_for(process, stage, folder)
        process.send_signal(number)
        process.send_signal(number)  # an impatient user's second one does no harm
        printed, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told.splitlines()[-1:] == ["error: interrupted"]
    assert "Traceback" not in told
    assert printed == ""
    assert contents(folder) == before


def wait_for(process: subprocess.Popen[str], stage: str, folder: Path) -> None:
    """Return when the stage has begun and, for ``round``, has put activations into files."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == stage:
            break
    else:
        pytest.fail(f"the run ended before '{stage}'")
    while stage == "round" and not any((folder.parent / "temp").rglob("*.bin")):
        assert process.poll() is None
        time.sleep(0.01)


def test_a_caller_keeps_its_own_handlers(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert main([str(tmp_path / "no.onnx"), str(tmp_path / "out.onnx")]) == 1
    assert [signal.getsignal(number) for number in numbers] == before
