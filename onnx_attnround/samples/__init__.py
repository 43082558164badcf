"""Calibration samples: one streaming reader for every form in which they come.

A source is a sequence of feeds (files, folders, mappings); a feed gives each
model input a :class:`Stream`, whose header is known and whose rows are read on
demand. Names, types, shapes and counts are judged from headers when the source
is opened, values while they stream. Memory never depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from onnx_attnround.errors import CalibrationError
from onnx_attnround.numerics import golden_places
from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples.items import Kept, feeds_of
from onnx_attnround.samples.matching import Part, part_of
from onnx_attnround.samples.preprocess import Preprocess, Transform, load_preprocess
from onnx_attnround.samples.sources import LABELS, arrays_of
from onnx_attnround.samples.streams import Feeds, Stream, length, listed, rows_of

__all__ = ["Feeds", "Samples", "keys_of", "open_samples", "read_labels"]


class Samples:
    """A re-iterable, deterministic stream of model inputs; made by :func:`open_samples`.

    ``count`` is the number of samples that :meth:`batches` gives in all.
    """

    def __init__(self, parts: Callable[[], Iterator[Part]], limit: int | None) -> None:
        """``parts`` gives the matched feeds anew at each call, of which ``limit`` rows are used."""
        self._parts = parts
        self._limit = limit
        self._most: int | None = None
        self._chosen: Array | None = None  # of the rows up to the limit, booleans; None is all
        self.count = self._usable()

    def at_most(self, batch_size: int) -> Samples:
        """The same samples, whose batches hold no more than ``batch_size``, if that is free.

        A smaller bound that they have already stays.
        """
        result = copy(self)
        result._most = min(batch_size, self._most or batch_size)
        return result

    def split(self, count: int) -> tuple[Samples, Samples] | None:
        """All samples but ``count``, and these, which lie spread over all; each in its order.

        Where the model's batch is static, whole batches change sides, so that the second
        may hold some more. ``None`` if either would be empty. Deterministic, and blind to
        the order of the samples: :func:`_evenly` says how.
        """
        units = self._units()
        numbers, index = np.unique(units[units >= 0], return_inverse=True)
        parted = -(-count * len(numbers) // self.count)
        if not 0 < parted < len(numbers):
            return None
        apart = np.zeros(len(units), bool)
        apart[units >= 0] = np.isin(index, _evenly(parted, len(numbers)))
        return self._part(~apart & (units >= 0)), self._part(apart)

    def _part(self, chosen: Array) -> Samples:
        result = copy(self)
        result._chosen = chosen
        result.count = int(np.count_nonzero(chosen))
        return result

    def _units(self) -> Array:
        """The number of the batch that each row falls in, or of the row where the batch is free.

        It is -1 for rows that are not used: at the end, they may not fill a static batch.
        ``[rows]``, int64.
        """
        pieces: list[Array] = []
        first = 0
        for (static, _), group in groupby(self._limited(), key=lambda part: part.key):
            rows, size = sum(part.count for part in group), static or 1
            numbers = first + np.arange(rows) // size
            numbers[rows - rows % size :] = -1
            first += rows // size
            pieces.append(numbers)
        units: Array = np.concatenate(pieces)
        return units if self._chosen is None else np.where(self._chosen, units, -1)

    def batches(self, batch_size: int) -> Iterator[Feeds]:
        """Feeds for the model, stacked on axis 0, each input in the model's own dtype.

        Batches hold ``batch_size`` samples (fewer where samples run out or change
        shape), or exactly the model's static batch. Raises ``CalibrationError``
        where a value is NaN, infinite or out of range.
        """
        for (static, _), group in groupby(self._selected(), key=lambda part: part.key):
            first = next(group)
            size = static or min(batch_size, self._most or batch_size)
            fixed = {name: next(stream.chunks(None)) for name, stream in first.fixed.items()}
            if not first.rows:
                yield fixed
                continue
            chunks = chain.from_iterable(part.chunks(size) for part in chain([first], group))
            for batch in _rechunk(chunks, size, drop_rest=static is not None):
                yield {**batch, **fixed}

    def labels(self) -> Array | None:
        """The class labels that came with the samples, int64 ``[n]``; ``None`` without any.

        There may be more than samples, where the model's batch is static. Raises
        ``CalibrationError`` if they are not integers ``[n]``, or not all samples have them.
        """
        found = [part.labels for part in self._parts()]
        opened = [labels() for labels in found if labels is not None]
        if not opened:
            return None
        if len(opened) < len(found):
            raise CalibrationError(
                f"{len(opened)} of {len(found)} items have labels: give all of them some, or none"
            )
        return np.concatenate([_class_indices(stream) for stream in opened])

    def _limited(self) -> Iterator[Part]:
        left = self._limit
        for part in self._parts():
            if left is None:
                yield part
                continue
            if left == self._limit:  # a static batch is never cut to nothing
                left = max(left, part.key[0] or 0)
            if left > 0:
                yield replace(part, count=min(part.count, left))
            left -= part.count
            if left <= 0:
                return

    def _selected(self) -> Iterator[Part]:
        """The parts up to the limit that have rows to use, each with a mask of these."""
        start = 0
        for part in self._limited():
            chosen = None if self._chosen is None else self._chosen[start : start + part.count]
            start += part.count
            if chosen is None or chosen.any():
                yield replace(part, chosen=chosen)

    def _usable(self) -> int:
        found = usable = 0
        batch = 1
        for (static, _), group in groupby(self._limited(), key=lambda part: part.key):
            rows = sum(part.count for part in group)
            found, batch = found + rows, static or 1
            usable += rows - rows % batch
        if not found:
            raise CalibrationError("no calibration samples found: give at least one")
        if not usable:
            raise CalibrationError(
                f"got {found} samples, expected at least one batch of {batch}, the model's static "
                "first dimension: give more samples, or export the model with a dynamic batch"
            )
        return usable


def open_samples(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    preprocess: Preprocess | str | Transform | None = None,
) -> Samples:
    """Open calibration or evaluation samples in any supported form.

    ``source`` is a path (.npz with keys = input names, .npz with uint8 ``images``
    ``[n, height, width, channel]``, .npy, an image, a folder of either, an ONNX
    ``test_data_set_*`` folder or a folder of such), an array or tensor (model with one
    input), a mapping of input names to arrays, or an iterable: a list, a generator, a
    ``DataLoader`` or dataset of PyTorch. Its items are arrays, mappings, images, files, or tuples
    in the order of the inputs, behind which labels may stand; what is no list is gone
    through once and kept in a temporary file. Arrays hold one sample or a batch of them. Only
    the first ``limit`` samples are used. ``preprocess``, or that of the name or file, is
    applied to uint8 images that feed a float input; a function is given each item of an
    iterable, and returns one. In a folder or iterable, a feed whose inputs
    cannot be stacked sample by sample is fed as it is and counts as one.

    Raises ``CalibrationError`` if the samples cannot be read or do not fit ``inputs``,
    ``ConfigError`` for an unknown ``preprocess``.
    """
    if not inputs:
        raise CalibrationError("the model has no inputs: there is nothing to calibrate with")
    transform = preprocess if callable(preprocess) else None
    chosen = None if preprocess is None or callable(preprocess) else load_preprocess(preprocess)
    feeds = feeds_of(source, inputs, transform or chosen)
    samples = Samples(lambda: (part_of(feed, inputs, chosen) for feed in feeds()), limit)
    if isinstance(feeds, Kept):
        feeds.close()
    return samples


def read_labels(path: str | Path) -> Array:
    """The class labels, int64 ``[n]``, under the key ``labels`` of an .npz file.

    Raises ``CalibrationError`` if there are none or they are not integers ``[n]``.
    """
    members = arrays_of(Path(path))
    if LABELS not in members:
        raise CalibrationError(
            f"'{path}' has no 'labels', found {listed(members)}: add an integer array [n]"
        )
    return _class_indices(members[LABELS]())


def _class_indices(stream: Stream) -> Array:
    """Labels, int64 ``[n]``, from as many integers or from one; raises ``CalibrationError``."""
    if stream.dtype.kind not in "iu" or len(stream.shape) > 1:
        raise CalibrationError(
            f"{stream.label}: got {stream.dtype} {list(stream.shape)}, expected integers [n]: "
            "give class indices"
        )
    return np.atleast_1d(next(stream.chunks(None))).astype(np.int64)


def keys_of(source: object) -> list[str]:
    """The names of the arrays in an .npz or a mapping; none for other forms."""
    return list(arrays_of(source))


def _evenly(count: int, number: int) -> Array:
    """``count`` of the indices below ``number``, ascending: one of each of ``count`` equal runs.

    Where in its run follows the golden ratio, so that no period in the order of the samples
    can favour a kind of them.
    """
    edges = np.arange(count + 1) * number // count
    chosen: Array = edges[:-1] + (golden_places(0, count) * np.diff(edges)).astype(np.int64)
    return chosen


def _rechunk(chunks: Iterable[Feeds], size: int, *, drop_rest: bool) -> Iterator[Feeds]:
    """Chunks of any length, none above ``size`` rows, joined and cut to ``size`` rows."""
    held: list[Feeds] = []
    rows = 0
    for chunk in chunks:
        held.append(chunk)
        rows += length(chunk)
        if rows >= size:
            over = rows - size
            keep = length(chunk) - over
            held[-1] = rows_of(chunk, 0, keep)
            yield _joined(held)
            held, rows = [rows_of(chunk, keep, keep + over)] if over else [], over
    if held and not drop_rest:
        yield _joined(held)


def _joined(chunks: Sequence[Feeds]) -> Feeds:
    if len(chunks) == 1:
        return chunks[0]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
