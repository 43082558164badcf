"""Feeds matched with the model's inputs: preprocessed, cast and checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples.preprocess import PREPROCESS, Preprocess
from onnx_attnround.samples.sources import IMAGES, LABELS, Feed
from onnx_attnround.samples.streams import (
    Feeds,
    Stream,
    Streams,
    length,
    listed,
    reading,
    rows_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``count`` samples: ``rows`` are read row by row, ``fixed`` go whole into every batch.

    ``key`` is the model's static batch (``None`` if dynamic) and what neighbours
    that may share a batch have in common. Without ``rows`` it is one feed, fed as it is.
    ``chosen``, booleans ``[count]``, tells which of the samples are used; ``None`` is all.
    ``labels`` are the class labels that came along.
    """

    rows: Mapping[str, Stream]
    fixed: Mapping[str, Stream]
    count: int
    key: tuple[int | None, object]
    chosen: Array | None = None
    labels: Callable[[], Stream] | None = None

    def chunks(self, size: int) -> Iterator[Feeds]:
        """Chunks of at most ``size`` rows, in order: those of the first ``count`` that are used."""
        done = 0
        for arrays in zip(*(stream.chunks(size) for stream in self.rows.values()), strict=True):
            chunk = rows_of(dict(zip(self.rows, arrays, strict=True)), 0, self.count - done)
            if self.chosen is None:
                yield chunk
            elif (taken := self.chosen[done : done + length(chunk)]).any():
                yield {name: array[taken] for name, array in chunk.items()}
            done += length(chunk)
            if done >= self.count:
                return


def part_of(feed: Feed, specs: Sequence[InputSpec], preprocess: Preprocess | None) -> Part:
    """``feed`` as a part that fits ``specs``; raises ``CalibrationError`` if it does not."""
    raw = _matched(feed, specs, preprocess)
    if preprocess and not any(map(_is_image, raw, specs)):
        first = raw[0]
        raise CalibrationError(
            f"{first.label}: got {first.dtype} {list(first.shape)} for input '{specs[0].name}' of "
            f"{specs[0].dtype}, expected uint8 images [n, height, width, channel] and a float "
            "input: leave the preprocessing out"
        )
    streams = {
        spec.name: _fitted(stream, spec, preprocess)
        for spec, stream in zip(specs, raw, strict=True)
    }
    fixed = {spec.name: streams[spec.name] for spec in specs if not spec.shape}
    rows = {name: stream for name, stream in streams.items() if name not in fixed}
    if len({stream.shape[0] for stream in rows.values()}) > 1:
        constant = {s.name for s in specs if s.name in rows and streams[s.name].shape == s.shape}
        rows = {name: stream for name, stream in rows.items() if name not in constant}
    static = {s.shape[0] for s in specs if s.name in rows} - {None}
    lengths = {stream.shape[0] for stream in rows.values()}
    empty_beside_others = feed.as_is and lengths == {0} and len(rows) < len(streams)
    if len(lengths) > 1 or len(static) > 1 or empty_beside_others:
        _check_as_is(feed, specs, streams)
        rows = {}
    fixed = {name: stream for name, stream in streams.items() if name not in rows}
    return Part(
        rows=rows,
        fixed=fixed,
        count=next(iter(lengths)) if rows else 1,
        key=(
            next(iter(static), None) if rows else None,
            object() if fixed else tuple(stream.shape[1:] for stream in rows.values()),
        ),
        labels=_labels(feed, specs),
    )


def _labels(feed: Feed, specs: Sequence[InputSpec]) -> Callable[[], Stream] | None:
    """The class labels beside the inputs, where there are any."""
    if not isinstance(feed.found, Mapping) or LABELS in (spec.name for spec in specs):
        return feed.labels
    return feed.labels or feed.found.get(LABELS)


def _check_as_is(feed: Feed, specs: Sequence[InputSpec], streams: Mapping[str, Stream]) -> None:
    shapes = ", ".join(f"'{name}' {list(stream.shape)}" for name, stream in streams.items())
    if not feed.as_is:
        raise CalibrationError(
            f"{feed.label}: first dimensions differ: {shapes}: give every input the same number "
            "of samples, or one file per feed in a folder"
        )
    for spec in specs:
        if spec.shape and spec.shape[0] not in (None, streams[spec.name].shape[0]):
            raise CalibrationError(
                f"{feed.label}: input '{spec.name}' got {list(streams[spec.name].shape)}, expected "
                f"{_shape_text(spec.shape)}: one feed must have the model's static dimensions"
            )


def _matched(feed: Feed, specs: Sequence[InputSpec], preprocess: Preprocess | None) -> list[Stream]:
    """The streams of ``feed`` in the order of ``specs``."""
    names = [spec.name for spec in specs]
    if not isinstance(feed.found, Mapping):
        if len(specs) == 1:
            return [feed.found()]
        raise CalibrationError(
            f"'{feed.label}' holds one array, the model has {len(specs)} inputs, "
            f"{listed(names)}: give an .npz with these keys"
        )
    found = feed.found
    missing = [name for name in names if name not in found]
    if not missing:
        return [found[name]() for name in names]
    if len(specs) == 1 and IMAGES in found:
        stream = found[IMAGES]()
        if preprocess or specs[0].dtype == np.uint8:
            return [stream]
        raise CalibrationError(_wants_preprocessing(stream.label, specs[0]))
    raise CalibrationError(_missing(feed.label, missing[0], names, found))


def _missing(label: str, name: str, names: Sequence[str], found: Streams) -> str:
    if len(names) == 1 and len(found) == 1:
        return (
            f"'{label}' holds '{next(iter(found))}', expected the model's input '{name}': "
            "rename the key, or save the array as .npy"
        )
    close = difflib.get_close_matches(name, found, 1)
    remedy = f"rename '{close[0]}' to '{name}'" if close else "use the input names as keys"
    return (
        f"'{label}' has no array for input '{name}': expected {listed(names)}, "
        f"found {listed(found)}: {remedy}"
    )


def _fitted(stream: Stream, spec: InputSpec, preprocess: Preprocess | None) -> Stream:
    """``stream`` as batches of what ``spec`` wants: preprocessed, cast, checked."""
    if _is_image(stream, spec):
        if preprocess is None:
            raise CalibrationError(_wants_preprocessing(stream.label, spec))
        stream = _preprocessed(_batched(stream, 4), preprocess)
    _check_dtype(stream, spec)
    stream = _batched(stream, len(spec.shape))
    wanted = (None, *spec.shape[1:]) if spec.shape else ()
    if len(wanted) != len(stream.shape) or any(
        want not in (None, got) for want, got in zip(wanted, stream.shape, strict=True)
    ):
        raise CalibrationError(
            f"{stream.label}: got shape {list(stream.shape)}, expected {_shape_text(wanted)} for "
            f"input '{spec.name}': {_shape_remedy(stream.shape, spec, preprocess)}"
        )

    def chunks(rows: int | None) -> Iterator[Array]:
        start = 0
        for chunk in stream.chunks(rows):
            yield _cast(chunk, spec.dtype, stream.label, start)
            start += len(chunk) if chunk.ndim else 1

    return replace(stream, dtype=spec.dtype, chunks=chunks)


def _shape_remedy(shape: Sequence[int], spec: InputSpec, preprocess: Preprocess | None) -> str:
    if preprocess:
        return "change size, crop or layout of the preprocessing"
    if len(shape) == len(spec.shape) == 4 and shape[3] == spec.shape[1]:
        return "transpose it from NHWC to NCHW"
    return "reshape or export it again"


def _is_image(stream: Stream, spec: InputSpec) -> bool:
    return stream.dtype == np.uint8 and len(stream.shape) in (3, 4) and spec.dtype.kind == "f"


def _batched(stream: Stream, rank: int) -> Stream:
    """One sample (``rank - 1`` dimensions) as a batch of one."""
    if len(stream.shape) != rank - 1:
        return stream
    return replace(
        stream,
        shape=(1, *stream.shape),
        chunks=lambda _: (chunk[None] for chunk in stream.chunks(None)),
    )


def _preprocessed(stream: Stream, preprocess: Preprocess) -> Stream:
    def chunks(rows: int | None) -> Iterator[Array]:
        for chunk in stream.chunks(rows):
            with reading(stream.label):
                result = preprocess.apply_batch(chunk)
            yield result

    with reading(stream.label):
        shape = preprocess.output_shape(stream.shape[1], stream.shape[2])
    return replace(
        stream, dtype=np.dtype(np.float32), shape=(stream.shape[0], *shape), chunks=chunks
    )


def _check_dtype(stream: Stream, spec: InputSpec) -> None:
    kinds = {"f": "f", "i": "iu", "u": "iu", "O": "U"}.get(spec.dtype.kind, "")
    if stream.dtype != spec.dtype and stream.dtype.kind not in kinds:
        raise CalibrationError(
            f"{stream.label}: got {stream.dtype}, expected {_called(spec.dtype)} for input "
            f"'{spec.name}': save the array in that type"
        )


def _called(dtype: np.dtype[Any]) -> str:
    """The type of an input as files have it: text is no Python object there."""
    return "text" if dtype.kind == "O" else str(dtype)


def _cast(chunk: Array, dtype: np.dtype[Any], label: str, start: int) -> Array:
    """``chunk`` in ``dtype``; ``start`` is the index of its first sample, for errors."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            cast = chunk.astype(dtype, copy=False)
        wrong, what = ~np.isfinite(cast), f"NaN, Inf or a value beyond {dtype}"
    elif dtype.kind == "O":
        return chunk.astype(dtype)  # text, as ONNX Runtime has it
    elif chunk.dtype != dtype:
        cast = chunk.astype(dtype)
        info = np.iinfo(dtype)
        wrong, what = (chunk < info.min) | (chunk > info.max), f"a value beyond {dtype}"
    else:
        return chunk
    if wrong.any():
        index = start + (int(np.argwhere(wrong)[0][0]) if chunk.ndim else 0)
        raise CalibrationError(f"{label}: sample {index} holds {what}: repair or remove it")
    return cast


def _wants_preprocessing(label: str, spec: InputSpec) -> str:
    return (
        f"{label}: got uint8 images, expected {spec.dtype} for input '{spec.name}': "
        f"name a preprocessing, one of {', '.join(PREPROCESS)} or a TOML file"
    )


def _shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
