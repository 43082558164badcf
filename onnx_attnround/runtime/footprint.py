"""What a sample takes in memory while a model runs on it, as ONNX Runtime's profile tells."""

from __future__ import annotations

import onnx_ir as ir

from onnx_attnround.runtime.profile import profiled
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
    sizes = (event.get("args", {}) for event in profiled(model, feeds))
    largest = max(
        (int(e["activation_size"]) + int(e["output_size"]) for e in sizes if "output_size" in e),
        default=0,
    )
    return max(ROOM * rows // max(NODES * largest, 1), 1)
