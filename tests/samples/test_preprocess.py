from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.samples.preprocess import PREPROCESS, Preprocess, load_preprocess

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_formula_is_scale_mean_std_per_channel() -> None:
    image = noise(5, 7, 3)
    expected = ((image / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    result = PREPROCESS["cifar10"].apply(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PREPROCESS)
def test_batch_equals_single_and_pillow(name: str) -> None:
    images = noise(3, 300, 280, 3)
    preprocess = PREPROCESS[name]
    batch = preprocess.apply_batch(images)
    assert batch.shape[1:] == preprocess.output_shape(300, 280)
    for image, sample in zip(images, batch, strict=True):
        np.testing.assert_array_equal(preprocess.apply(image), sample)
        np.testing.assert_array_equal(preprocess.apply(Image.fromarray(image)), sample)


def test_tf_is_channels_last_from_minus_one_to_one() -> None:
    image = np.array([[[0, 127, 255]]], np.uint8)
    expected = np.array([[[-1, 127 / 127.5 - 1, 1]]], np.float32)
    np.testing.assert_allclose(PREPROCESS["tf"].apply(image), expected, atol=1e-7)


def test_size_is_the_shorter_side_and_crop_is_centred() -> None:
    assert Preprocess(size=8).output_shape(10, 21) == (3, 8, 16)
    assert Preprocess(size=8).output_shape(21, 10) == (3, 16, 8)
    assert Preprocess(size=(4, 6)).output_shape(21, 10) == (3, 4, 6)
    image = noise(8, 6, 3)
    expected = Preprocess().apply(image)[:, 2:6, 2:4]
    np.testing.assert_array_equal(Preprocess(crop=(4, 2)).apply(image), expected)


def test_resize_is_antialiased_bilinear() -> None:
    image = noise(64, 64, 3)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
    result = Preprocess(size=16, layout="NHWC").apply(image) * 255
    np.testing.assert_allclose(result, np.asarray(expected), atol=1e-4)


def test_channel_order_and_grey() -> None:
    image = noise(4, 4, 3)
    rgb = Preprocess(mean=(0.1, 0.2, 0.3)).apply(image)
    bgr = Preprocess(mean=(0.3, 0.2, 0.1), channels="BGR").apply(image)
    np.testing.assert_array_equal(bgr, rgb[::-1])
    grey = Preprocess(channels="L", size=2)
    assert grey.apply(image[..., :1]).shape == (1, 2, 2)
    assert grey.apply(Image.fromarray(image)).shape == (1, 2, 2)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"crop 224 x 224 is larger .* 32 x 40"):
        Preprocess(crop=224).apply(noise(32, 40, 3))
    with pytest.raises(CalibrationError, match=r"shape \[4, 4, 1\] .* expected uint8 .* 3\]"):
        Preprocess().apply(noise(4, 4, 1))
    with pytest.raises(CalibrationError, match="type float32"):
        Preprocess().apply_batch(noise(2, 4, 4, 3).astype(np.float32))
    with pytest.raises(CalibrationError, match="more than 8 bits"):
        Preprocess(channels="L").apply(Image.fromarray(np.zeros((4, 4), np.int32)))


@pytest.mark.parametrize(
    "values",
    [
        {"mean": (0.1, 0.2)},
        {"std": (0.0,)},
        {"channels": "L", "mean": (0.1, 0.2, 0.3)},
        {"size": 0},
        {"scale": float("inf")},
        {"sise": 3},
    ],
)
def test_invalid_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Preprocess(**values)


def test_load_by_name_and_from_toml(tmp_path) -> None:
    assert load_preprocess("imagenet") is PREPROCESS["imagenet"]
    file = tmp_path / "mine.toml"
    file.write_text('size = [8, 6]\nmean = [0.5]\nchannels = "BGR"\n')
    assert load_preprocess(file) == Preprocess(size=(8, 6), mean=(0.5,), channels="BGR")
    assert load_preprocess(str(file)) == load_preprocess(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise = 3\n", r"unknown key 'sise': did you mean 'size'\? expected one of box"),
        ("size = -3\n", "key 'size': .* got -3"),
        ("mean = [1.0, 2.0]\n", "mean has 2 values, expected 1 or 3"),
        ("size = \n", "cannot read preprocessing"),
    ],
)
def test_mistakes_in_toml_are_one_clear_line(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_preprocess(file)
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'imagnet': expected one of imagenet, cifar10, unit, tf"):
        load_preprocess("imagnet")
