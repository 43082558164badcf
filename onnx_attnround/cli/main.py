"""The command line: ``python -m onnx_attnround quantize IN.onnx OUT.onnx --calib PATH``.

Standard output carries the result, standard error the progress and the errors.
Here is the process around a run: its signals, its errors in one line, its exit codes.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import typer

from onnx_attnround.cli.commands import PROGRAM, app, with_command
from onnx_attnround.cli.formats import annotation
from onnx_attnround.cli.options import Format, Request
from onnx_attnround.cli.run import run
from onnx_attnround.cli.wording import worded
from onnx_attnround.errors import AttnRoundError, ConfigError

SIGNALLED = 128
"""The exit code of a process that a signal ended, less the signal's number, as shells have it."""
GRACE = 1.0
"""The seconds in which the same signal, sent again, does not disturb the cleaning up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: the process's); returns the exit code."""
    # Threads of torch that spin while they wait cost a machine with other work twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Looking for garbage among all that torch and onnx define is slow, and little of it is found.
    gc.set_threshold(100_000)
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        parsed = app(with_command(given), prog_name=PROGRAM, standalone_mode=False)
    except ConfigError as error:
        return _fail(f"{error} (try --help)", error.exit_code)
    except Exception as error:
        # typer has no public base class of its usage errors; they alone word themselves.
        if not hasattr(error, "format_message"):
            raise
        return _fail(f"{error.format_message()} (try --help)", ConfigError.exit_code)
    # After --help or --version there is an exit code, and nothing to run.
    if not isinstance(parsed, Request):
        return int(parsed or 0)
    return _exit_code(replace(parsed, line=shlex.join([PROGRAM, *given])))


def _exit_code(request: Request) -> int:
    """Do what is asked for; tell an error in one line, with a traceback if ``--verbose``."""
    from_file: dict[str, Any] = {}
    try:
        with _signals_raise():
            request, from_file = request.with_file()
            run(request, from_file)
    except (Exception, KeyboardInterrupt) as error:
        message, code = _told(error)
        if request.options.format is Format.github:
            typer.echo(annotation("error", worded(message, from_file)), nl=False)
        _fail(worded(message, from_file), code)
        if request.options.verbose:
            traceback.print_exc()
        return code
    return 0


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work as Ctrl-C does, so that nothing is left behind.

    A signal that the process was started to ignore stays ignored.
    """
    last = -GRACE

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= GRACE:
            last = now
            raise KeyboardInterrupt(number)

    usual = _handlers()
    for number in usual:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _handlers() -> dict[signal.Signals, Any]:
    """The handlers of the signals that end a process, where this thread may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    present = signal.Signals.__members__  # Windows has no SIGHUP
    numbers = [present[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in present]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _told(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of an error."""
    if isinstance(error, AttnRoundError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return "interrupted", SIGNALLED + number
    if isinstance(error, MemoryError):
        return "out of memory: give fewer --samples, a smaller --batch-size, or more memory", 1
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is imported late
        return "the GPU is out of memory: give a smaller --batch-size, or take --device cpu", 1
    return f"unexpected {type(error).__name__}: {error}; please report this", 1


def _fail(message: str, code: int) -> int:
    """Print the one line of an error; returns ``code``."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code
