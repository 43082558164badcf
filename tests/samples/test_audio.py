"""Recordings become frames of the length that the model's input has."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples import open_samples


def spec(*shape: int | None) -> InputSpec:
    return InputSpec(name="audio", dtype=np.dtype(np.float32), shape=shape)


def tone(count: int, channels: int = 1) -> Array:
    """Values from -1 to 1, ``[count, channels]``."""
    at = np.arange(count)[:, None] + 7 * np.arange(channels)
    return 0.9 * np.sin(at / 5)


def write(path: Path, values: Array, width: int = 2) -> None:
    codes = np.round(values * 2 ** (8 * width - 1)).astype("<i8")
    codes = codes + 128 if width == 1 else codes
    data = codes.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((values.shape[1], width, 16000, 0, "NONE", ""))
        file.writeframes(data)


def read(source: Path, wanted: InputSpec, batch: int = 3) -> list[Array]:
    return [feeds["audio"] for feeds in open_samples(source, [wanted]).batches(batch)]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_values_lie_between_minus_one_and_one(tmp_path: Path, width: int, channels: int) -> None:
    values = tone(64, channels)
    write(tmp_path / "a.wav", values, width)
    (frame,) = read(tmp_path / "a.wav", spec(None, 64))
    assert frame.dtype == np.float32
    np.testing.assert_allclose(frame[0], values.mean(1), atol=2.0 ** (1 - 8 * width) + 1e-7)


@pytest.mark.parametrize("shape", [(None, 16), (None, 1, 16), (1, 16, 1)])
def test_frames_follow_each_other_and_a_rest_is_left_out(
    tmp_path: Path, shape: tuple[int | None, ...]
) -> None:
    values = tone(70)
    write(tmp_path / "a.wav", values)
    frames = np.concatenate(read(tmp_path / "a.wav", spec(*shape)))
    assert frames.shape == (4, *shape[1:])
    np.testing.assert_allclose(frames.ravel(), values[:64, 0], atol=1e-4)


def test_a_folder_is_read_in_order_and_a_free_length_takes_whole_files(tmp_path: Path) -> None:
    for number, count in ((2, 30), (10, 20)):
        write(tmp_path / f"clip{number}.wav", tone(count))
    whole = read(tmp_path, spec(None, 1, None))
    assert [frame.shape for frame in whole] == [(1, 1, 30), (1, 1, 20)]
    assert sum(map(len, read(tmp_path, spec(None, 10)))) == 5


def test_what_is_no_recording_for_the_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(10))
    with pytest.raises(CalibrationError, match="got 10 samples, expected at least the 16"):
        read(tmp_path / "a.wav", spec(None, 16))
    with pytest.raises(CalibrationError, match="one axis of time"):
        read(tmp_path / "a.wav", spec(None, 80, 3000))
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(CalibrationError, match="cannot read"):
        read(tmp_path / "b.wav", spec(None, 4))
