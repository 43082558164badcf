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
from onnx_attnround.settings import Settings, read_toml

Transform = Callable[[Any], Any]
"""What makes inputs of an item of an iterable, in place of a :class:`Preprocess`."""

Pixels = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(Settings):
    """How an image becomes one sample; the keys of a preprocessing file.

    ``size``: the shorter side after resizing, or ``[height, width]``; ``None``
    keeps the size. ``crop``: a centred square, or ``[height, width]``. ``mean``
    and ``std`` have one entry, or one per channel in the order of ``channels``,
    on the scale that ``scale`` gives (0..1 by default).
    """

    noun: ClassVar[str] = "key"

    size: Pixels | tuple[Pixels, Pixels] | None = None
    crop: Pixels | tuple[Pixels, Pixels] | None = None
    mean: tuple[Finite, ...] = (0.0,)
    std: tuple[Positive, ...] = (1.0,)
    scale: Positive = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "L"] = "RGB"

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Preprocess:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, len(self.channels)):
                raise ValueError(
                    f"{key} has {len(values)} values, expected 1 or {len(self.channels)} "
                    f"for channels '{self.channels}'"
                )
        return self

    @property
    def mode(self) -> str:
        """The Pillow mode in which images are read: ``RGB`` or ``L``."""
        return "L" if self.channels == "L" else "RGB"

    def output_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one sample made of an image of that size.

        Raises ``CalibrationError`` if the crop is larger than the resized image.
        """
        height, width = self._crop_of(*self._resized(height, width))
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
        size = self._resized(*image.shape[:2])
        if size != image.shape[:2]:
            flat = Image.fromarray(image[..., 0] if self.mode == "L" else image)
            resized = flat.resize(size[::-1], Image.Resampling.BILINEAR)
            image = pixels(resized, self.mode)
        result: Array = self._normalised(image[None])[0]
        return result

    def apply_batch(self, images: Array) -> Array:
        """uint8 images ``[n, height, width, channel]`` as float32 samples, stacked on axis 0.

        Equal to :meth:`apply` on each; raises ``CalibrationError``.
        """
        if self.size is not None:
            return np.stack([self.apply(image) for image in images])
        for image in images[:1]:
            self._check(image)
        return self._normalised(images)

    def _check(self, image: Array) -> None:
        depth = len(self.mode)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != depth:
            raise CalibrationError(
                f"got an image of shape {list(image.shape)} and type {image.dtype}, expected uint8 "
                f"[height, width, {depth}]: convert it, or change 'channels' in the preprocessing"
            )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        # As torchvision: the longer side is truncated, not rounded.
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

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


_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

PREPROCESS: dict[str, Preprocess] = {
    "imagenet": Preprocess(size=256, crop=224, **_IMAGENET),
    "cifar10": Preprocess(**_IMAGENET),
    "unit": Preprocess(),
    "tf": Preprocess(mean=(0.5,), std=(0.5,), layout="NHWC"),
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

