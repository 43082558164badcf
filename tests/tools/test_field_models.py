"""The samples that are made for public models."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "tools"))
field_models = pytest.importorskip("field_models")


def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "shape"), [("nsfw", (224, 224, 3)), ("wake", (1, 149, 64)), ("swift", (16000,))]
)
def test_samples_are_the_same_each_time_and_differ_between_parts(
    name: str, shape: tuple[int, ...]
) -> None:
    make = field_models.MODELS[name].make
    one, again, other = (
        make(photos(), random.Random(part), 2) for part in ("calib", "calib", "test")
    )
    assert [sample.shape for sample in one] == [shape] * 2
    np.testing.assert_array_equal(one, again)
    assert all(np.isfinite(sample).all() and sample.std() > 0 for sample in one)
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[1])


def test_samples_without_a_common_axis_are_files_of_a_folder(tmp_path: Path) -> None:
    sounds = field_models.MODELS["swift"].make([], random.Random(0), 3)
    field_models._save(tmp_path / "swift_calib", "audio", sounds)
    files = sorted((tmp_path / "swift_calib").iterdir())
    assert len(files) == 3
    assert np.load(files[0])["audio"].shape == (1, 16000)
    assert np.load(files[0])["fmin"].shape == ()
