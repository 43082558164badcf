"""Temporary folders that do not stay: gone at the end, or when the next one is made.

A process that is killed cannot clean up. So each folder is locked while its owner
lives, and whoever makes one beside it removes those that nobody holds any more.
Where there are no such locks (Windows, NFS), folders of the dead are left alone.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".attnround-"


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, which vanishes with all that is in it; raises ``OSError``."""
    _sweep(parent)
    folder, lock = _made(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _made(parent: Path) -> tuple[Path, int | None]:
    """A new folder and its lock. One that was swept away before it was locked is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _lock(folder, wait=True)
        if folder.is_dir():
            return folder, lock
        _unlock(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders that nobody holds."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = _lock(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the folder until it is closed; ``None`` if that cannot be had."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, gone, another's, or on a file system without locks
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        with suppress(OSError):
            os.close(descriptor)
