"""Each recipe of docs/preprocessing.md against what its family of models computes, in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnx_attnround.records import Array
from onnx_attnround.samples.preprocess import PREPROCESS, Preprocess, load_preprocess
from onnx_attnround.settings import tomllib

PAGE = Path(__file__).resolve().parents[2] / "docs" / "preprocessing.md"
_RECIPE = re.compile(r"^\*\*(\S+?)\*\*.*?^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES: dict[str, str] = dict(_RECIPE.findall(PAGE.read_text()))
LEVEL = 1.25
"""Pillow rounds a resized image to whole levels, along one axis after the other."""


def photo(height: int, width: int) -> Array:
    """Smooth colours, so that resizing by other means agrees to a level."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows / height, columns / width, (rows + columns) / (height + width)]
    return (255 * np.stack(planes, -1)).astype(np.uint8)


def resized(image: Array, height: int, width: int) -> Array:
    """Bilinear between the centres of the four pixels around a place, as OpenCV's INTER_LINEAR."""
    result = image.astype(np.float64)
    for axis, size in ((0, height), (1, width)):
        length = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        result = result.take(low, axis) * (1 - share) + result.take(high, axis) * share
    return result


def letterbox(image: Array, top_left: bool) -> Array:
    height, width = image.shape[:2]
    fit = resized(image, round(height * 640 / width), 640)
    canvas = np.full((640, 640, 3), 114.0)
    top = 0 if top_left else (640 - len(fit)) // 2
    canvas[top : top + len(fit)] = fit
    return canvas


def line(image: Array, columns: int) -> Array:
    height, width = image.shape[:2]
    fit = resized(image, 48, round(48 * width / height))
    canvas = np.full((48, columns, 3), 127.5)
    canvas[:, : fit.shape[1]] = fit
    return canvas


def sides(image: Array) -> Array:
    height, width = image.shape[:2]
    ratio = 960 / max(height, width)
    return resized(image, *(round(int(side * ratio) / 32) * 32 for side in (height, width)))


def centre(image: Array) -> Array:
    scaled = resized(image, 256, int(256 * image.shape[1] / image.shape[0]))
    left = round((scaled.shape[1] - 224) / 2)
    return scaled[16:240, left : left + 224]


def region(image: Array) -> Array:
    grey = np.asarray(Image.fromarray(image).convert("L"))[:240, 40:280, None]
    return resized(grey, 28, 28)


FAMILIES: dict[str, Callable[[Array], Array]] = {
    "imagenet": centre,
    "caffe": centre,
    "tf": lambda image: image.astype(np.float64),
    "yolo": lambda image: letterbox(image, top_left=False),
    "yolox": lambda image: letterbox(image, top_left=True),
    "ppocr-det": sides,
    "ppocr-rec": lambda image: line(image, 320),
    "ppocr-cls": lambda image: line(image, 192),
    "mtcnn": lambda image: resized(image, 48, 48),
    "grey": region,
}
"""What a model of the family reads, before mean, deviation and layout; levels of 0 to 255."""

SCALES = {
    "imagenet": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "tf": (127.5, 127.5),
    "caffe": ([103.939, 116.779, 123.68], 1.0),
    "yolo": (0.0, 255.0),
    "yolox": (0.0, 1.0),
    "ppocr-det": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "ppocr-rec": (127.5, 127.5),
    "ppocr-cls": (127.5, 127.5),
    "mtcnn": (127.5, 128.0),
    "grey": (0.0, 255.0),
}
BGR = {"caffe", "yolox", "ppocr-det", "ppocr-rec", "ppocr-cls"}
EXTENTS = {"ppocr-rec": (60, 300), "ppocr-cls": (60, 150), "ppocr-det": (900, 1300)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_what_its_family_reads(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPES[name])
    preprocess = load_preprocess(file)
    image = photo(*EXTENTS.get(name, (400, 560)))
    mean, deviation = (np.asarray(each) for each in SCALES[name])
    levels = FAMILIES[name](image)[..., :: -1 if name in BGR else 1]
    wanted = (levels - mean) / deviation
    got = preprocess.apply(image[..., :1] if preprocess.mode == "L" else image)
    if name == "grey":
        got = preprocess.apply(Image.fromarray(image))
    got = got if preprocess.layout == "NHWC" else got.transpose(1, 2, 0)
    assert got.shape == wanted.shape
    assert np.abs((got - wanted) * deviation).max() <= LEVEL


def test_a_recipe_of_each_name_and_every_key_is_described() -> None:
    assert set(RECIPES) - {"grey"} == set(PREPROCESS) - {"cifar10", "unit"}
    for name in set(RECIPES) - {"grey"}:
        assert Preprocess(**tomllib.loads(RECIPES[name])) == PREPROCESS[name]
    keys = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(keys))) == set(Preprocess.model_fields)


def test_the_area_that_is_padded_is_what_padding_becomes() -> None:
    sample = PREPROCESS["ppocr-rec"].apply(photo(48, 100))
    assert np.array_equal(sample[:, :, 100:], np.zeros((3, 48, 220)))
    framed = Preprocess(size=(8, 8), pad=(10.0, 20.0, 30.0), scale=1.0, layout="NHWC")
    assert framed.apply(photo(4, 8))[0, 0].tolist() == [10.0, 20.0, 30.0]
    assert framed.output_shape(4, 8) == (8, 8, 3)


def test_smaller_images_stay_where_none_is_to_be_enlarged() -> None:
    shrink = Preprocess(size=64, side="longer", enlarge=False, multiple=8)
    assert shrink.output_shape(30, 41) == (3, 32, 40)
    assert shrink.output_shape(100, 50) == (3, 64, 32)
    assert shrink.apply_batch(photo(30, 41)[None]).shape == (1, 3, 32, 40)
    framed = Preprocess(size=(8, 8), pad=0, enlarge=False, layout="NHWC")
    assert np.count_nonzero(framed.apply(np.full((2, 4, 3), 255, np.uint8))) == 2 * 4 * 3
