"""What the user gave, as a sequence of feeds: files, folders, arrays, mappings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples.audio import recording
from onnx_attnround.samples.preprocess import Preprocess, pixels
from onnx_attnround.samples.streams import (
    Stream,
    Streams,
    image,
    listed,
    memory,
    npy_file,
    npz,
    reading,
)

IMAGES, LABELS = "images", "labels"
"""Names of arrays that are read beside the inputs of the model."""

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_FORMS = (
    ".npz, .npy, .wav, an image, or a folder of .npz, .npy, .wav, images or ONNX test_data_set_* "
    "folders"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Arrays by name, or one without a name, and where they come from.

    ``as_is`` allows a feed whose inputs cannot be stacked sample by sample. ``labels`` are
    those of the entry beside the inputs of a tuple; of names, they are found under ``labels``.
    """

    label: str
    found: Streams | Callable[[], Stream]
    as_is: bool
    labels: Callable[[], Stream] | None = None


def is_array(value: object) -> bool:
    """Whether ``value`` is an array of NumPy, or of a library that hands such over."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def feeds_of_whole(
    source: object, specs: Sequence[InputSpec], preprocess: Preprocess | None
) -> Callable[[], Iterable[Feed]]:
    """A function that gives the feeds of a path, an array or a mapping anew at each call."""
    if isinstance(source, str | PathLike):
        return _feeds_of_path(Path(source), specs, preprocess)
    if isinstance(source, Mapping):
        feed = Feed(label="mapping", found=arrays_of(source), as_is=False)
    elif is_array(source):
        array = as_array("array", source, preprocess)
        feed = Feed(label="array", found=lambda: memory("array", array), as_is=False)
    else:
        raise CalibrationError(
            f"got samples of type {type(source).__name__}, expected a path, an array, a mapping "
            "of input names to arrays, or an iterable of arrays, tuples or mappings, such as a "
            "list or a DataLoader"
        )
    return lambda: [feed]


def arrays_of(source: object) -> Streams:
    """The arrays of an .npz or a mapping by their names; none for other forms."""
    if isinstance(source, Mapping):
        return mapping_of("mapping", source, None)
    if isinstance(source, str | PathLike) and Path(source).suffix == ".npz":
        return npz(Path(source))
    return {}


def mapping_of(label: str, arrays: Mapping[str, Any], preprocess: Preprocess | None) -> Streams:
    """The arrays of a mapping by their names, read as :func:`as_array` does when asked for."""
    return {
        str(key): partial(_array_stream, f"{label}['{key}']", value, preprocess)
        for key, value in arrays.items()
    }


def _array_stream(label: str, value: object, preprocess: Preprocess | None) -> Stream:
    return memory(label, as_array(label, value, preprocess))


def as_array(label: str, value: object, preprocess: Preprocess | None) -> Array:
    """What NumPy makes of an array, a tensor, an image of Pillow or nested lists of numbers."""
    if isinstance(value, Image.Image):
        return pixels(value, preprocess.mode if preprocess else "RGB")
    if hasattr(value, "detach"):  # a tensor of PyTorch, which may need a gradient or be elsewhere
        value = value.detach().cpu()
    try:
        array: Array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{label}: {_no_array(value)}: {error}") from error
    if array.dtype.hasobject:
        raise CalibrationError(f"{label}: {_no_array(value)}")
    return array


def _no_array(value: object) -> str:
    return (
        f"got {type(value).__name__}, expected an array or a tensor that NumPy can hold, such as "
        "float32"
    )


def _feeds_of_path(
    path: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None
) -> Callable[[], Iterable[Feed]]:
    if path.is_file():
        return lambda: [file_feed(path, specs, preprocess, as_is=False)]
    if not path.is_dir():
        raise CalibrationError(f"'{path}' not found: expected {_FORMS}")
    sets = (
        [path]
        if any(path.glob("input_*.pb"))
        else _sorted(folder for folder in path.glob("test_data_set_*") if folder.is_dir())
    )
    if sets:
        return lambda: (_data_set(folder, specs) for folder in sets)
    files = _sorted(file for file in path.iterdir() if file.suffix.lower() in (".npz", ".npy"))
    for suffixes in (_IMAGE_SUFFIXES, {".wav"}):
        files = files or _sorted(
            file for file in path.rglob("*") if file.suffix.lower() in suffixes
        )
    if not files:
        raise CalibrationError(f"folder '{path}' holds no samples: expected {_FORMS}")
    return lambda: (file_feed(file, specs, preprocess, as_is=True) for file in files)


def file_feed(
    path: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None, *, as_is: bool
) -> Feed:
    """The feed of a file, whose form its name tells; raises ``CalibrationError``."""
    found: Streams | Callable[[], Stream]
    suffix = path.suffix.lower()
    if suffix == ".npz":
        found = npz(path)
    elif suffix == ".npy":
        found = partial(npy_file, path)
    elif suffix in _IMAGE_SUFFIXES:
        found = partial(image, path, preprocess.mode if preprocess else "RGB")
    elif suffix == ".wav":
        found = partial(recording, path, specs[0])
    else:
        raise CalibrationError(f"'{path}' is of an unknown form: expected {_FORMS}")
    return Feed(label=str(path), found=found, as_is=as_is)


def _data_set(folder: Path, specs: Sequence[InputSpec]) -> Feed:
    """One ONNX test data set: tensors by name where their names are the inputs', else by number."""
    files = _sorted(folder.glob("input_*.pb"))
    tensors = [_tensor(file) for file in files]
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(spec.name for spec in specs):
        if len(files) != len(specs):
            raise CalibrationError(
                f"'{folder}' holds {len(files)} files input_*.pb, expected one for each of the "
                f"model's {len(specs)} inputs: {listed(spec.name for spec in specs)}"
            )
        names = [spec.name for spec in specs]
    found = {
        name: partial(memory, str(file), _tensor_values(file, tensor))
        for name, file, tensor in zip(names, files, tensors, strict=True)
    }
    return Feed(label=str(folder), found=found, as_is=True)


def _tensor(path: Path) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    with reading(str(path)):
        tensor.ParseFromString(path.read_bytes())
    return tensor


def _tensor_values(path: Path, tensor: onnx.TensorProto) -> Array:
    with reading(str(path)):
        return onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))


def _sorted(paths: Iterable[Path]) -> list[Path]:
    """By name, runs of digits as numbers (``set_2`` before ``set_10``), hidden files left out."""

    def key(path: Path) -> list[str | int]:
        pieces = re.split("([0-9]+)", path.as_posix())
        return [int(p) if p.isascii() and p.isdecimal() else p for p in pieces]

    return sorted((path for path in paths if not path.name.startswith(".")), key=key)
