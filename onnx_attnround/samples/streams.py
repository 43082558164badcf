"""Arrays with a known header whose rows are read on demand, from files or memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array
from onnx_attnround.samples.preprocess import pixels

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """An array with a known header.

    ``chunks(n)`` yields consecutive chunks of at most ``n`` rows (entries of
    axis 0); ``chunks(None)`` yields the whole array at once.
    """

    label: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Callable[[int | None], Iterator[Array]]


Streams = Mapping[str, Callable[[], Stream]]


def memory(label: str, array: Array) -> Stream:
    """An array in memory."""

    def chunks(rows: int | None) -> Iterator[Array]:
        if rows is None:
            yield array
        else:
            yield from (array[start : start + rows] for start in range(0, len(array), rows))

    return Stream(label=label, dtype=array.dtype, shape=array.shape, chunks=chunks)


def _npy(label: str, opened: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> Stream:
    """A .npy stream of ``size`` bytes that ``opened`` opens at its start."""
    with reading(label), opened() as file:
        dtype, shape = _npy_header(label, file)
        held = size - file.tell()
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    expected = row_bytes * (shape[0] if shape else 1)
    if held < expected:
        raise CalibrationError(
            f"{label}: got {held} bytes of data, expected {expected}: "
            "the file is cut short, save it again"
        )

    def chunks(rows: int | None) -> Iterator[Array]:
        with reading(label), opened() as file:
            _npy_header(label, file)
            if rows is None:
                yield _read(file, expected, dtype).reshape(shape)
                return
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                yield _read(file, count * row_bytes, dtype).reshape(count, *shape[1:])

    return Stream(label=label, dtype=dtype, shape=shape, chunks=chunks)


def _npy_header(label: str, file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise CalibrationError(f"{label}: holds Python objects: save a plain numeric array")
    if fortran and len(shape) > 1:
        raise CalibrationError(
            f"{label}: is in Fortran order, which cannot be streamed: "
            "save np.ascontiguousarray of it"
        )
    if min(shape, default=0) < 0:
        raise CalibrationError(f"{label}: got the invalid shape {list(shape)}: save it again")
    return dtype, shape


def _read(file: IO[bytes], size: int, dtype: np.dtype[Any]) -> Array:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("the data end early")
    return np.frombuffer(data, dtype)


def npz(path: Path) -> Streams:
    """The arrays of an .npz file by key; nothing but the directory is read yet."""

    @contextmanager
    def opened(member: str) -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file

    def stream(info: zipfile.ZipInfo, key: str) -> Stream:
        return _npy(f"{path}['{key}']", lambda: opened(info.filename), info.file_size)

    with reading(str(path)), zipfile.ZipFile(path) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    return {key: partial(stream, info, key) for key, info in infos.items()}


def npy_file(path: Path) -> Stream:
    """The array of an .npy file."""
    return _npy(str(path), lambda: path.open("rb"), path.stat().st_size)


def image(path: Path, mode: str) -> Stream:
    """An image file as uint8 ``[1, height, width, channel]``."""
    with reading(str(path)), Image.open(path) as opened:
        shape = (1, opened.height, opened.width, len(mode))

    def chunks(_: int | None) -> Iterator[Array]:
        with reading(str(path)), Image.open(path) as opened:
            yield pixels(opened, mode)[None]

    return Stream(label=str(path), dtype=np.dtype(np.uint8), shape=shape, chunks=chunks)


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Word the errors of the file formats as ``CalibrationError`` on ``label``."""
    try:
        yield
    except FileNotFoundError as error:
        raise CalibrationError(f"'{label}' not found: check the path") from error
    except CalibrationError as error:
        if str(error).startswith(label):
            raise
        raise CalibrationError(f"{label}: {error}") from error
    except Exception as error:  # zip, zlib, numpy, Pillow and protobuf raise unrelated types
        raise CalibrationError(
            f"cannot read '{label}': {' '.join(str(error).split())}: "
            "it is damaged or of another format, save it again"
        ) from error


def rows_of(chunk: Feeds, start: int, stop: int) -> Feeds:
    """Rows ``start`` to ``stop`` of every array."""
    return {name: array[start:stop] for name, array in chunk.items()}


def length(chunk: Feeds) -> int:
    """The number of rows."""
    return len(next(iter(chunk.values())))


def listed(names: Iterable[str]) -> str:
    """Quoted names for a message."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"
