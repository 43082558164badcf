"""The command line in a process of its own, to which something happens at a given point.

For ``multiprocessing``: a fresh fork of a server that has imported everything, so
that a case costs no second of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from small_models import build_proto

from onnx_attnround.__main__ import main
from onnx_attnround.cli import progress
from onnx_attnround.graph import saving
from onnx_attnround.reconstruct import blockwise
from onnx_attnround.records import Event

blockwise.STEPS = 8

SLOW_TO_IMPORT = [
    "torch._dynamo",  # as Adam does
    "onnx_attnround.reconstruct.sensitivity", "onnx_attnround.reconstruct.blockwise",
    "onnx_attnround.pipeline.trade_off", "onnx_attnround.report.console",
    "onnx_attnround.report.document",
]  # fmt: skip
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
LOOPS = ("measure", "round", "refine")  # struck in the middle rather than at the start
FILES = {
    "keep": lambda path, flags: path.name == "round-00001",
    "save": lambda path, flags: path.name == "out.onnx",
    "saved": lambda path, flags: flags == os.O_RDONLY and path == Path(),
    "report": lambda path, flags: path.name == "report.json",
}
"""By the name of a point: whether it is there that a file, or its folder, is flushed to disk."""
POINTS = (
    "load", "resume", "simplify", "plan", "smooth", "calibrate", "pace", "measure", "round",
    "keep", "refine", "write", "check", "verify", "save", "saved", "report",
)  # fmt: skip


Act = Callable[[], object]


def prepared(folder: Path) -> Path:
    """A folder with what a run needs, which takes every stage there is."""
    work = folder / "work"
    work.mkdir()
    (folder / "temp").mkdir()
    rng = np.random.default_rng(0)
    onnx.save(build_proto(TEXT), work / "in.onnx")
    np.savez(work / "calib.npz", x=rng.normal(size=(240, 2, 32, 32)).astype(np.float32))
    (work / "config.toml").write_text(SETTINGS)
    return work


def files(folder: Path) -> dict[str, bytes]:
    """What lies in the folder and in that for temporary files; finished results left out."""
    found = {
        str(path.relative_to(folder.parent)): path.read_bytes() if path.is_file() else b""
        for path in (*folder.rglob("*"), *(folder.parent / "temp").rglob("*"))
    }
    return {name: data for name, data in found.items() if not name.startswith("work/kept")}


def kill(number: int) -> Act:
    """Send a signal."""
    return partial(_kill, number)


def _kill(number: int) -> None:
    os.kill(os.getpid(), number)


def limit_files(size: int) -> Act:
    """Let every file end with an error after ``size`` bytes, as on a full disk."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def start(
    folder: Path, arguments: tuple[str, ...], point: str = "", act: Act | None = None
) -> multiprocessing.process.BaseProcess:
    """The command line in ``folder``, with a folder beside it for temporary files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    process = context.Process(target=_run, args=(folder, arguments, point, act))
    process.start()
    return process


def run(
    folder: Path, point: str = "", act: Act | None = None, arguments: tuple[str, ...] = RUN
) -> int | None:
    """The exit code of the command line."""
    process = start(folder, arguments, point, act)
    process.join(60)
    return process.exitcode


def _run(folder: Path, arguments: tuple[str, ...], point: str, act: Act) -> None:
    os.chdir(folder)
    tempfile.tempdir = str(folder.parent / "temp")
    with (folder.parent / "told").open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if point in FILES:
        saving._sync = partial(_struck_sync, saving._sync, FILES[point], act)
    elif point:
        progress.shown = partial(_struck_events, progress.shown, point, act)
    sys.exit(main(arguments))


def _struck_sync(
    sync: Callable[..., None],
    here: Callable[[Path, int], bool],
    act: Act,
    path: Path,
    flags: int = os.O_RDWR,
) -> None:
    sync(path, flags)
    if here(path, flags):
        act()


@contextmanager
def _struck_events(
    shown: Callable[..., Any], point: str, act: Act, **options: bool
) -> Iterator[Callable[[Event], None]]:
    with shown(**options) as on_event:

        def struck(event: Event) -> None:
            on_event(event)
            if event.stage == point and (event.done or point not in LOOPS):
                act()

        yield struck
