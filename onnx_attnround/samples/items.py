"""Iterables as a sequence of feeds: lists, loaders and datasets, whose items are read once.

An item is an array, a tuple in the order of the model's inputs, a mapping by their
names, an image or a file, as it comes or as a function makes it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.records import InputSpec
from onnx_attnround.samples.preprocess import Preprocess, Transform
from onnx_attnround.samples.sources import (
    IMAGES,
    LABELS,
    Feed,
    as_array,
    feeds_of_whole,
    file_feed,
    is_array,
    mapping_of,
)
from onnx_attnround.samples.streams import Stream, Streams, listed, memory


def feeds_of(
    source: object, specs: Sequence[InputSpec], preprocess: Preprocess | Transform | None
) -> Callable[[], Iterable[Feed]]:
    """A function that gives the feeds of ``source`` anew at each call.

    A list or a tuple is gone through again each time. What any other iterable gives, and
    what a function makes of items, may differ the next time: it is drawn once, and
    the function is a :class:`Kept`.
    """
    transform = preprocess if callable(preprocess) else None
    described = None if callable(preprocess) else preprocess
    items = _items_of(source)
    if items is None and transform is not None:
        raise ConfigError(
            "`preprocess` is a function, which is for the items of an iterable: give a list, a "
            "loader or a dataset, or a preprocessing by name or file"
        )
    if items is None:
        return feeds_of_whole(source, specs, described)

    def feeds() -> Iterator[Feed]:
        for index, item in enumerate(items):
            given = item if transform is None else transform(item)
            yield _item(f"item {index}", given, specs, described)

    if isinstance(source, list | tuple) and transform is None:
        return feeds
    return Kept(feeds(), {IMAGES, LABELS, *(spec.name for spec in specs)})


def _items_of(source: object) -> Iterable[object] | None:
    """What an iterable or a dataset of PyTorch gives; ``None`` for what is a feed as a whole."""
    if isinstance(source, str | PathLike | Mapping) or is_array(source):
        return None
    if isinstance(source, Iterable):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[index] for index in range(len(source)))
    return None


def _item(
    label: str, item: object, specs: Sequence[InputSpec], preprocess: Preprocess | None
) -> Feed:
    """One item of an iterable: a file, arrays by name or in the order of the inputs, or one."""
    if isinstance(item, str | PathLike):
        return file_feed(Path(item), specs, preprocess, as_is=True)
    if isinstance(item, Mapping):
        return Feed(label=label, found=mapping_of(label, item, preprocess), as_is=True)
    if isinstance(item, list | tuple):
        return _tuple(label, item, specs, preprocess)
    array = as_array(label, item, preprocess)
    return Feed(label=label, found=partial(memory, label, array), as_is=True)


def _tuple(
    label: str, item: Sequence[object], specs: Sequence[InputSpec], preprocess: Preprocess | None
) -> Feed:
    """The inputs in the order of the model's, with or without labels behind them."""
    if len(item) not in (len(specs), len(specs) + 1):
        raise CalibrationError(
            f"{label}: got {len(item)} entries, expected the model's {len(specs)} inputs "
            f"{listed(spec.name for spec in specs)}, or these and labels: give `preprocess` a "
            "function that picks the inputs of an item"
        )
    names = [spec.name for spec in specs]
    found = mapping_of(label, dict(zip(names, item, strict=False)), preprocess)
    labels = None
    if len(item) > len(specs):
        array = as_array(f"{label}, labels", item[-1], None)
        labels = partial(memory, f"{label}, labels", array)
    return Feed(label=label, found=found, as_is=True, labels=labels)


class Kept:
    """Feeds that can be had once, kept in a file without a name: each call gives them anew.

    They are drawn on demand, so that no more are than are asked for.
    """

    def __init__(self, feeds: Iterator[Feed], wanted: Collection[str]) -> None:
        """``feeds`` are drawn one by one; of what has a name, what is ``wanted`` is kept."""
        self._rest = feeds
        self._wanted = wanted
        self._drawn: list[Feed] = []
        self._file = tempfile.TemporaryFile(prefix="attnround-")  # noqa: SIM115, lives as long
        weakref.finalize(self, self._file.close)

    def __call__(self) -> Iterator[Feed]:
        """The feeds from the first one on."""
        for index in itertools.count():
            if index == len(self._drawn) and not self._draw():
                return
            yield self._drawn[index]

    def close(self) -> None:
        """Draw no more, so that a loader may end its workers; what was drawn stays."""
        self._rest = iter(())

    def _draw(self) -> bool:
        feed = next(self._rest, None)
        if feed is None:
            return False
        labels = None if feed.labels is None else self._kept(feed.labels())
        self._drawn.append(replace(feed, found=self._found(feed), labels=labels))
        return True

    def _found(self, feed: Feed) -> Streams | Callable[[], Stream]:
        """What the feed holds, as it is kept; a name that nobody reads stays without values."""
        if not isinstance(feed.found, Mapping):
            return self._kept(feed.found())
        unread = partial(memory, feed.label, np.zeros(0))
        return {
            name: self._kept(opened()) if name in self._wanted else unread
            for name, opened in feed.found.items()
        }

    def _kept(self, stream: Stream) -> Callable[[], Stream]:
        array = next(stream.chunks(None))
        if not array.size:  # which nothing can be mapped to
            return partial(memory, stream.label, array)
        try:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(array.tobytes())
            self._file.flush()
        except OSError as error:
            raise CalibrationError(
                f"no room for {stream.label} in '{tempfile.gettempdir()}': {error.strerror}; let "
                "TMPDIR name a folder with more, or give fewer `samples`"
            ) from error
        mapped = partial(np.memmap, self._file, array.dtype, "r", start, array.shape)
        return lambda: memory(stream.label, mapped())


