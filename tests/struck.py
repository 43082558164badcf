"""The command line in a process of its own, which is struck by a signal at a given point.

For ``multiprocessing``: a fresh fork of a server that has imported everything, so
that a case costs no second of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from onnx_attnround import progress, refine
from onnx_attnround.__main__ import main
from onnx_attnround.graph import saving
from onnx_attnround.records import Event

refine.STEPS = 8

SLOW_TO_IMPORT = [
    "torch._dynamo",  # as Adam does
    "onnx_attnround.sensitivity", "onnx_attnround.refine", "onnx_attnround.pareto",
    "onnx_attnround.report",
]  # fmt: skip
LOOPS = ("measure", "round", "refine")  # struck in the middle rather than at the start
FILES = {
    "keep": lambda path, flags: path.name == "round-00001",
    "save": lambda path, flags: path.name == "out.onnx",
    "saved": lambda path, flags: flags == os.O_RDONLY and path == Path(),
    "report": lambda path, flags: path.name == "report.json",
}
"""By the name of a point: whether it is there that a file, or its folder, is flushed to disk."""
POINTS = (
    "load", "resume", "simplify", "plan", "calibrate", "measure", "round", "keep", "refine",
    "write", "check", "verify", "save", "saved", "report",
)  # fmt: skip


def start(
    folder: Path, arguments: tuple[str, ...], point: str = "", number: int = 0
) -> multiprocessing.process.BaseProcess:
    """The command line in ``folder``, with a folder beside it for temporary files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    process = context.Process(target=_run, args=(folder, arguments, point, number))
    process.start()
    return process


def _run(folder: Path, arguments: tuple[str, ...], point: str, number: int) -> None:
    os.chdir(folder)
    tempfile.tempdir = str(folder.parent / "temp")
    with (folder.parent / "told").open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if point in FILES:
        saving._sync = partial(_struck_sync, saving._sync, FILES[point], number)
    elif point:
        progress.shown = partial(_struck_events, progress.shown, point, number)
    sys.exit(main(arguments))


def _struck_sync(
    sync: Callable[..., None],
    here: Callable[[Path, int], bool],
    number: int,
    path: Path,
    flags: int = os.O_RDWR,
) -> None:
    sync(path, flags)
    if here(path, flags):
        os.kill(os.getpid(), number)


@contextmanager
def _struck_events(
    shown: Callable[..., Any], point: str, number: int, **options: bool
) -> Iterator[Callable[[Event], None]]:
    with shown(**options) as on_event:

        def struck(event: Event) -> None:
            on_event(event)
            if event.stage == point and (event.done or point not in LOOPS):
                os.kill(os.getpid(), number)

        yield struck
