"""Images to model inputs: resize, crop, scale, normalise; described by one record.

Per channel ``(x * scale - mean) / std`` on 8-bit values, so every result comes
from a table of 256 entries: it is computed once, in float64, and then looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.records import Array
from onnx_attnround.settings import Finite, Settings, read_toml

Transform = Callable[[Any], Any]
"""What makes inputs of an item of an iterable, in place of a :class:`Preprocess`."""

Pixels = Annotated[int, Field(ge=1)]
Place = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_POINTWISE = frozenset({"nearest", "bilinear", "bicubic"})
"""Filters that Pillow also has without antialiasing."""


class Preprocess(Settings):
    """How an image becomes one sample; the keys of a preprocessing file, in the order of use.

    ``box``: a part of the image as it comes, ``[top, left, height, width]``. ``size``: the
    shorter side after resizing, or the longer one as ``side`` says, or ``[height, width]``;
    ``None`` keeps the size. ``enlarge`` false leaves images that are smaller, ``multiple`` rounds
    sides to a multiple. ``antialias`` false takes the pixels next to a place alone, as
    OpenCV does. ``pad`` keeps the proportions: the image fits into ``[height, width]``, and
    what is left has that value, of pixels from 0 to 255, one or one per channel; the image is
    in the ``centre``, or at the top left with the padding at the ``end``. ``crop``: a centred
    square, or ``[height, width]``. ``mean`` and ``std`` have one entry, or one per channel in the
    order of ``channels``, on the scale that ``scale`` gives (0..1 by default).
    """

    noun: ClassVar[str] = "key"

    box: tuple[Place, Place, Pixels, Pixels] | None = None
    size: Pixels | tuple[Pixels, Pixels] | None = None
    side: Literal["shorter", "longer"] = "shorter"
    enlarge: bool = True
    multiple: Pixels = 1
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    antialias: bool = True
    pad: Finite | tuple[Finite, ...] | None = None
    pad_at: Literal["centre", "end"] = "centre"
    crop: Pixels | tuple[Pixels, Pixels] | None = None
    mean: tuple[Finite, ...] = (0.0,)
    std: tuple[Positive, ...] = (1.0,)
    scale: Positive = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "L"] = "RGB"

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Preprocess:
        pad = self.pad if isinstance(self.pad, tuple) else (0.0,)
        for key, values in (("mean", self.mean), ("std", self.std), ("pad", pad)):
            if len(values) not in (1, len(self.channels)):
                raise ValueError(
                    f"{key} has {len(values)} values, expected 1 or {len(self.channels)} "
                    f"for channels '{self.channels}'"
                )
        return self

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> Preprocess:
        if self.pad is not None and not isinstance(self.size, tuple):
            raise ValueError("pad fills up to a size of [height, width]: give that")
        if self.pad is not None and self.crop is not None:
            raise ValueError("pad and crop exclude each other: leave one out")
        if not self.antialias and self.interpolation not in _POINTWISE:
            raise ValueError(f"interpolation '{self.interpolation}' is antialiased by nature")
        return self

    @property
    def mode(self) -> str:
        """The Pillow mode in which images are read: ``RGB`` or ``L``."""
        return "L" if self.channels == "L" else "RGB"

    def output_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one sample made of an image of that size.

        Raises ``CalibrationError`` if the box is not within the image, or the crop is larger
        than the resized image.
        """
        height, width = self._crop_of(*self._framed(*self._box_of(height, width)))
        depth = len(self.channels)
        return (depth, height, width) if self.layout == "NCHW" else (height, width, depth)

    def apply(self, image: Image.Image | Array) -> Array:
        """One image (Pillow, or uint8 ``[height, width, channel]``) as a float32 sample.

        The sample is ``[channel, height, width]`` or ``[height, width, channel]``
        by ``layout``. Raises ``CalibrationError``.
        """
        if isinstance(image, Image.Image):
            image = pixels(image, self.mode)
        self._check(image)
        part: Array = self._boxed(image[None])[0]
        size = self._resized(*part.shape[:2])
        if size != part.shape[:2]:
            part = self._resize(part, size)
        result: Array = self._padded(self._normalised(part[None]))[0]
        return result

    def apply_batch(self, images: Array) -> Array:
        """uint8 images ``[n, height, width, channel]`` as float32 samples, stacked on axis 0.

        Equal to :meth:`apply` on each; raises ``CalibrationError``.
        """
        if self.size is not None or self.multiple > 1:
            return np.stack([self.apply(image) for image in images])
        for image in images[:1]:
            self._check(image)
        return self._normalised(self._boxed(images))

    def _check(self, image: Array) -> None:
        depth = len(self.mode)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != depth:
            raise CalibrationError(
                f"got an image of shape {list(image.shape)} and type {image.dtype}, expected uint8 "
                f"[height, width, {depth}]: convert it, or change 'channels' in the preprocessing"
            )

    def _box_of(self, height: int, width: int) -> tuple[int, int]:
        """The extent of the box in an image of that size."""
        if self.box is None:
            return height, width
        top, left, rows, columns = self.box
        if top + rows > height or left + columns > width:
            raise CalibrationError(
                f"box {list(self.box)} is not within the image, {height} x {width}: change 'box' "
                "in the preprocessing, [top, left, height, width]"
            )
        return rows, columns

    def _boxed(self, images: Array) -> Array:
        rows, columns = self._box_of(*images.shape[1:3])
        top, left = (0, 0) if self.box is None else self.box[:2]
        return images[:, top : top + rows, left : left + columns]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size of the image itself, without padding."""
        if self.pad is None:
            rows, columns = self._of_side(height, width)
        else:
            wanted = self._framed(height, width)
            ratio = min(wanted[0] / height, wanted[1] / width)
            ratio = ratio if self.enlarge else min(ratio, 1.0)
            rows, columns = max(round(height * ratio), 1), max(round(width * ratio), 1)
        if self.multiple == 1:
            return rows, columns
        step = self.multiple
        return max(round(rows / step), 1) * step, max(round(columns / step), 1) * step

    def _of_side(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        is_flat = (height <= width) == (self.side == "shorter")  # the height is what ``size`` says
        if not self.enlarge and (height if is_flat else width) <= self.size:
            return height, width
        # As torchvision: the other side is truncated, not rounded.
        if is_flat:
            return self.size, max(int(self.size * width / height), 1)
        return max(int(self.size * height / width), 1), self.size

    def _framed(self, height: int, width: int) -> tuple[int, int]:
        """The size after padding."""
        if self.pad is not None and isinstance(self.size, tuple):
            return self.size
        return self._resized(height, width)

    def _resize(self, image: Array, size: tuple[int, int]) -> Array:
        flat = Image.fromarray(np.ascontiguousarray(image[..., 0] if self.mode == "L" else image))
        kind = _FILTERS[self.interpolation]
        if self.antialias:
            return pixels(flat.resize(size[::-1], kind), self.mode)
        down, right = flat.height / size[0], flat.width / size[1]
        steps = (right, 0.0, 0.0, 0.0, down, 0.0)
        pointwise = flat.transform(size[::-1], Image.Transform.AFFINE, steps, kind)
        return pixels(pointwise, self.mode)

    def _crop_of(self, height: int, width: int) -> tuple[int, int]:
        crop = self.crop if self.crop is not None else (height, width)
        rows, columns = (crop, crop) if isinstance(crop, int) else crop
        if rows > height or columns > width:
            raise CalibrationError(
                f"crop {rows} x {columns} is larger than the image, {height} x {width} after "
                "resizing: lower 'crop' or raise 'size' in the preprocessing"
            )
        return rows, columns

    def _normalised(self, images: Array) -> Array:
        height, width = images.shape[1:3]
        rows, columns = self._crop_of(height, width)
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        images = images[:, top : top + rows, left : left + columns]
        planes = [images[..., c] for c in range(images.shape[-1])]
        if self.channels == "BGR":
            planes.reverse()
        axis = 1 if self.layout == "NCHW" else -1
        tables = _tables(self.scale, self.mean, self.std, len(planes))
        looked_up = [table[plane] for table, plane in zip(tables, planes, strict=True)]
        return np.stack(looked_up, axis)

    def _padded(self, samples: Array) -> Array:
        """Normalised samples in a frame of ``size``, filled with what the padding becomes."""
        if self.pad is None or not isinstance(self.size, tuple):
            return samples
        depth, first = len(self.channels), 2 if self.layout == "NCHW" else 1
        fill = (np.broadcast_to(self.pad, depth) * self.scale - self.mean) / self.std
        shape = (depth, 1, 1) if self.layout == "NCHW" else (1, 1, depth)
        frame = (depth, *self.size) if self.layout == "NCHW" else (*self.size, depth)
        result = np.empty((len(samples), *frame), np.float32)
        result[:] = fill.reshape(shape)
        extent = samples.shape[first : first + 2]
        free = [whole - part for whole, part in zip(self.size, extent, strict=True)]
        top, left = (each // 2 if self.pad_at == "centre" else 0 for each in free)
        place = slice(top, top + extent[0]), slice(left, left + extent[1])
        result[(slice(None),) * first + place] = samples
        return result


_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LINE: dict[str, Any] = {
    "pad": 127.5, "pad_at": "end", "antialias": False, "mean": (0.5,), "std": (0.5,),
    "channels": "BGR",
}  # fmt: skip
"""A line of text, as high as the model wants it and at most as wide, 0 behind its end."""

PREPROCESS: dict[str, Preprocess] = {
    "imagenet": Preprocess(size=256, crop=224, **_IMAGENET),
    "cifar10": Preprocess(**_IMAGENET),
    "unit": Preprocess(),
    "tf": Preprocess(mean=(0.5,), std=(0.5,), layout="NHWC"),
    "caffe": Preprocess(
        size=256, crop=224, mean=(103.939, 116.779, 123.68), scale=1.0, channels="BGR"
    ),
    "yolo": Preprocess(size=(640, 640), pad=114, antialias=False),
    "yolox": Preprocess(
        size=(640, 640), pad=114, pad_at="end", antialias=False, scale=1.0, channels="BGR"
    ),
    "ppocr-det": Preprocess(
        size=960, side="longer", enlarge=False, multiple=32, antialias=False, channels="BGR",
        **_IMAGENET,
    ),
    "ppocr-rec": Preprocess(size=(48, 320), **_LINE),
    "ppocr-cls": Preprocess(size=(48, 192), **_LINE),
    "mtcnn": Preprocess(size=(48, 48), antialias=False, mean=(127.5,), std=(128.0,), scale=1.0),
}


def load_preprocess(
    choice: Preprocess | Mapping[str, Any] | str | PathLike[str],
) -> Preprocess:
    """The preprocessing as it is, that of a name, or the one of keys, here or in a TOML file.

    Raises ``ConfigError`` that lists the valid names, or the valid keys.
    """
    if isinstance(choice, Preprocess):
        return choice
    if isinstance(choice, Mapping):
        return Preprocess(**choice)
    if not isinstance(choice, str | PathLike):
        raise ConfigError(
            f"the preprocessing is of type {type(choice).__name__}, expected a Preprocess, the "
            "name of one, or a TOML file"
        )
    if str(choice) in PREPROCESS:
        return PREPROCESS[str(choice)]
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            f"unknown preprocessing '{choice}': expected one of {', '.join(PREPROCESS)}, "
            f"or a TOML file with keys among {', '.join(Preprocess.model_fields)}"
        )
    keys = read_toml(path, "preprocessing")
    try:
        return Preprocess.model_validate(keys)
    except ConfigError as error:
        raise ConfigError(f"preprocessing '{path}': {error}") from error


def pixels(image: Image.Image, mode: str) -> Array:
    """A Pillow image as uint8 ``[height, width, channel]``, in mode ``RGB`` or ``L``.

    Raises ``CalibrationError`` for images of more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise CalibrationError(
            f"the image has more than 8 bits a channel (mode '{image.mode}'): convert it to 8 bits"
        )
    array = np.asarray(image.convert(mode))
    return array if array.ndim == 3 else array[..., None]


@lru_cache(maxsize=8)
def _tables(
    scale: float, mean: Sequence[float], std: Sequence[float], depth: int
) -> tuple[Array, ...]:
    means, stds = np.broadcast_to(mean, depth), np.broadcast_to(std, depth)
    values = np.arange(256) * scale
    return tuple(((values - m) / s).astype(np.float32) for m, s in zip(means, stds, strict=True))

