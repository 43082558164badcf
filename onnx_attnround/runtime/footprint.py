"""What a sample takes in memory while a model runs on it, as ONNX Runtime's profile tells."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_attnround.graph.scratch import scratch
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Samples

ROOM = 256 << 20
"""The bytes that the activations of one run may take."""

NODES = 4
"""Nodes of the largest kind whose values are held at once: what runs, and what waits for it."""


def affordable_batch(model: ir.Model, samples: Samples) -> int:
    """How many of ``samples`` to run at a time so that activations take ``ROOM``; 1 or more.

    Judged by the first sample, and the node that reads and makes most; without a bound where
    the profile cannot be kept. Raises
    ``CalibrationError`` if ONNX Runtime fails on it.
    """
    feeds = next(samples.batches(1))
    rows = max((len(values) for values in feeds.values() if values.ndim), default=1)
    with scratch(Path(tempfile.gettempdir())) as folder:
        session = open_session(model, threads=1, profile=folder / "profile")
        run_on_samples(session, [], feeds)
        events = _events(Path(session.end_profiling()))
    sizes = (event.get("args", {}) for event in events)
    largest = max(
        (int(e["activation_size"]) + int(e["output_size"]) for e in sizes if "output_size" in e),
        default=0,
    )
    return max(ROOM * rows // max(NODES * largest, 1), 1)


def _events(profile: Path) -> list[dict[str, Any]]:
    """The events of a profile; none of one that a full disk has cut off.

    That is no reason to end here: what cannot be written is told where it is needed.
    """
    try:
        events: list[dict[str, Any]] = json.loads(profile.read_text())
    except (OSError, ValueError):
        return []
    return events
