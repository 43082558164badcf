"""Latency and size of the two models, and which layers run in integer."""

from __future__ import annotations

import re
import tempfile
import time
import timeit
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnx_attnround.records import Array
from onnx_attnround.samples import Samples
from onnx_attnround.verify.results import Latency
from onnx_attnround.verify.runs import BATCH, Feed, Models, Runs, open_pair, run_both, sample_count

LATENCY_SECONDS = 1.0
LATENCY_PAIRS = (3, 50)  # at least and at most, however long they take

# The weighted ops that ONNX Runtime's fusions leave where a layer runs in integer.
INTEGER_OPS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
    "QLinearConv", "QLinearMatMul",
})  # fmt: skip


def measure_speed(models: Models, samples: Samples) -> tuple[Latency, frozenset[str]]:
    """Interleaved latency on one thread, and the names of the nodes run in integer."""
    feed = next(samples.batches(BATCH))
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        runs = open_pair(models, 1, optimised)
        integer = _integer_nodes(optimised)
    times = _interleaved_times(runs, feed)
    medians = 1000 * np.median(times, axis=0)
    low, high = np.percentile(times[:, 0] / times[:, 1], [25, 75])
    latency = Latency(
        batch=sample_count(feed),
        pairs=len(times),
        float_ms=float(medians[0]),
        quantised_ms=float(medians[1]),
        spread=(float(low), float(high)),
    )
    return latency, integer


def serialised_bytes(model: ir.Model) -> int:
    """The size of the serialised model in bytes, external weights included."""
    external = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    )
    return int(ir.to_proto(model).ByteSize()) + external


def _interleaved_times(runs: Runs, feed: Feed) -> Array:
    """Seconds ``[pairs, 2]`` of float and quantised runs in turn, after one of each unmeasured."""
    run_both(runs, feed)
    least, most = LATENCY_PAIRS
    times: list[list[float]] = []
    end = time.perf_counter() + LATENCY_SECONDS
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        times.append([timeit.timeit(partial(run, feed), number=1) for run in runs])
    return np.asarray(times)


def _integer_nodes(optimised: Path) -> frozenset[str]:
    """Names of the nodes that run in integer, by the graph that ONNX Runtime optimised.

    Layout changes add ``_token_<n>`` to the name of the node that they replace.
    """
    names = [
        node.name
        for node in onnx.load(optimised, load_external_data=False).graph.node
        if node.op_type in INTEGER_OPS
    ]
    return frozenset(names) | {re.sub(r"(_token_\d+)+$", "", name) for name in names}
