"""Recordings as samples: a .wav file in frames as long as the model's input."""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples.streams import Stream, reading


def recording(path: Path, spec: InputSpec) -> Stream:
    """A .wav file of PCM as float32 from -1 to 1, its channels averaged, for the input ``spec``.

    The input has one axis of time beside that of the samples, all others being 1: frames follow
    each other without overlap, and a rest that fills none is left out; where the model takes any
    length, the file is one frame. Raises ``CalibrationError`` for other inputs and files.
    """
    with reading(str(path)), wave.open(str(path), "rb") as file:
        total = file.getnframes()
    length = _frame(str(path), spec) or total
    count = total // max(length, 1)
    if not count:
        raise CalibrationError(
            f"{path}: got {total} samples, expected at least the {max(length, 1)} of a frame of "
            f"input '{spec.name}': leave the file out, or join recordings"
        )
    shape = [length if _is_time(size) else 1 for size in spec.shape[1:]]

    def chunks(rows: int | None) -> Iterator[Array]:
        with reading(str(path)), wave.open(str(path), "rb") as file:
            step = rows or count
            for start in range(0, count, step):
                frames = min(step, count - start)
                yield _values(file, frames * length).reshape(frames, *shape)

    return Stream(
        label=str(path), dtype=np.dtype(np.float32), shape=(count, *shape), chunks=chunks
    )


def _is_time(size: int | None) -> bool:
    return size != 1


def _frame(label: str, spec: InputSpec) -> int | None:
    """The length of a frame, ``None`` where the model takes any."""
    times = [size for size in spec.shape[1:] if _is_time(size)]
    if spec.dtype.kind != "f" or len(times) != 1:
        raise CalibrationError(
            f"{label}: input '{spec.name}' is {spec.dtype} {list(spec.shape)}, expected a float "
            "input with one axis of time and 1 elsewhere: compute what the model reads, such as "
            "a spectrogram, and save that as .npz"
        )
    return times[0]


def _values(file: wave.Wave_read, count: int) -> Array:
    """The next ``count`` samples, float32 ``[count]``; of 8 bits they are unsigned in the file."""
    data, width, channels = file.readframes(count), file.getsampwidth(), file.getnchannels()
    if len(data) < count * width * channels:
        raise EOFError("the data end early")
    if width == 1:
        values = np.frombuffer(data, np.uint8).astype(np.float32) - 128
    else:  # little-endian of any width, as the highest bytes of 32 bits
        padded = np.zeros((count * channels, 4), np.uint8)
        padded[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        values = (padded.view("<i4")[:, 0] >> 8 * (4 - width)).astype(np.float32)
    mono: Array = values.reshape(count, channels).mean(1) * math.ldexp(1.0, 1 - 8 * width)
    return mono
