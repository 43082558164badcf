"""Both models in ONNX Runtime, as functions from feeds to outputs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import onnx_ir as ir

from onnx_attnround.errors import AttnRoundError, ModelError, OutputError
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session, told_as

Feed = Mapping[str, Array]
Outputs = Mapping[str, Any]
Forward = Callable[[Feed], dict[str, Any]]
"""A function that runs a model: from a feed to its outputs by name."""
Runs = tuple[Forward, Forward]
Models = tuple[ir.Model, ir.Model]
Kind = Literal["float", "quantised"]
Step = Callable[[str, int], None]
"""A function that is told of progress: what was run, and on how many samples."""

BATCH = 16


def open_pair(models: Models, threads: int | None, *, exact_sums: bool = True) -> Runs:
    """Runs of the float and the quantised model, on up to ``threads`` threads.

    Without ``exact_sums`` they add products as this CPU does by default, which may be faster.
    Raises ``ModelError`` or ``OutputError`` for a model that does not load.
    """
    float_run = open_one(models[0], "float", threads)
    return float_run, open_one(models[1], "quantised", threads, exact_sums=exact_sums)


def open_one(
    model: ir.Model, kind: Kind, threads: int | None, *, exact_sums: bool = True
) -> Forward:
    """A run of one of the two; raises as :func:`open_pair`."""
    error = ModelError if kind == "float" else OutputError
    return _open(model, kind, error, threads=threads, exact_sums=exact_sums)


def run_both(runs: Runs, feed: Feed) -> tuple[Outputs, Outputs]:
    """Outputs of the float and the quantised model; ``OutputError`` if the names differ."""
    expected, got = runs[0](feed), runs[1](feed)
    if expected.keys() != got.keys():
        raise OutputError(
            f"the quantised model's outputs: got {', '.join(got)}, expected "
            f"{', '.join(expected)} as in the float model; please report this"
        )
    return expected, got


def sample_count(feed: Feed) -> int:
    """How many samples a feed holds: the leading dimension of its first tensor with elements."""
    return next((len(value) for value in feed.values() if value.ndim and value.size), 1)


def _open(model: ir.Model, kind: Kind, error: type[AttnRoundError], **options: Any) -> Forward:
    """A function from feeds to outputs by name, whose failures are worded as ``error``."""
    remedy = "; `exclude` that node, or the layers around it" if error is OutputError else ""
    try:
        session = open_session(model, **options)
    except ModelError as cause:
        raise error(f"the {kind} model: {cause}{remedy}") from cause
    names = [output.name for output in session.get_outputs()]

    def run(feed: Feed) -> dict[str, Any]:
        with told_as(error, f"ONNX Runtime cannot run the {kind} model", remedy):
            return dict(zip(names, session.run(names, dict(feed)), strict=True))

    return run
