"""Latency and size of the two models."""

from __future__ import annotations

import time
import timeit
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.check import Fusion
from onnx_attnround.graph import serialised
from onnx_attnround.records import Array
from onnx_attnround.runtime.profile import profiled
from onnx_attnround.samples import Samples
from onnx_attnround.verify.results import KernelTime, Latency
from onnx_attnround.verify.runs import Feed, Forward, Models, open_one, open_pair, sample_count

CLOCK = (
    time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter
)
"""Tells the time of a run on one thread, the caller's.

By what that thread computes, where that is told finely enough: other processes count for nothing.
"""

LATENCY_SECONDS = 1.0
"""The seconds for which both models are timed, as far as ``LATENCY_PAIRS`` allow."""

PROFILED = 3
"""The runs of which the least time of each node is taken."""

LATENCY_PAIRS = (3, 25)
"""The fewest and the most pairs of runs, however long they take."""

LONGEST = 1.0
"""Seconds of a float run in batches, above which single samples tell enough."""


def float_seconds(model: ir.Model, samples: Samples) -> float:
    """The median time of a run of ``model`` on a single sample, on one thread.

    Raises ``ModelError`` if it does not load or run.
    """
    run, feed = open_one(model, "float", 1), next(samples.batches(1))
    run(feed)
    times = timeit.repeat(partial(run, feed), timer=CLOCK, number=1, repeat=LATENCY_PAIRS[0])
    return float(np.median(times))


def measure_speed(models: Models, samples: Samples, batch: int) -> Latency:
    """Interleaved latency of ``batch`` samples on one thread; errors as of ``verify``.

    Of single ones, where so many take longer than ``LONGEST`` in the float model. With the
    session options that ONNX Runtime has by default, as files are run.
    """
    feed, runs = next(samples.batches(1)), open_pair(models, 1, exact_sums=False)
    if batch > sample_count(feed):
        runs[0](feed)
        seconds = timeit.timeit(partial(runs[0], feed), timer=CLOCK, number=1)
        feed = next(samples.batches(batch)) if batch * seconds <= LONGEST else feed
    times = _times_in_turns(runs, feed)
    medians = 1000 * np.median(times, axis=0)
    low, middle, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
    return Latency(
        batch=sample_count(feed),
        pairs=len(times),
        float_ms=float(medians[0]),
        quantised_ms=float(medians[1]),
        speedup=float(middle),
        spread=(float(low), float(high)),
    )


def kernel_times(models: Models, samples: Samples, batch: int) -> tuple[KernelTime, ...]:
    """Where the time of ``batch`` samples goes in both models, on one thread: most first.

    Of each node the least time of some runs counts. Errors as of ``profiled``.
    """
    feed = next(samples.batches(batch))
    before, after = (_by_kernel(profiled(model, feed, PROFILED)) for model in models)
    found = [
        KernelTime(op_type=op, float_ms=before[op] / 1000, quantised_ms=after[op] / 1000)
        for op in before | after
    ]
    return tuple(sorted(found, key=lambda each: -max(each.float_ms, each.quantised_ms)))


def _by_kernel(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Microseconds by type of node."""
    least: dict[tuple[str, str], int] = {}
    for event in events:
        if event.get("cat") == "Node" and (op := event.get("args", {}).get("op_name")):
            node = op, str(event["name"])
            least[node] = min(least.get(node, event["dur"]), event["dur"])
    total = Counter[str]()
    for (op, _), taken in least.items():
        total[op] += taken
    return total


def fastest(models: Sequence[ir.Model], samples: Samples, batch: int) -> int:
    """The place of the quantised model that takes the least time in turns; errors as of ``verify``.

    By the median of its times over those of the first, which run beside them.
    """
    runs = [open_one(model, "quantised", 1, exact_sums=False) for model in models]
    times = _times_in_turns(runs, next(samples.batches(batch)))
    return int(np.argmin(np.median(times / times[:, :1], axis=0)))


def slower_note(latency: Latency, fusion: Fusion) -> list[str]:
    """A note if a file for ONNX Runtime is slower there than the float model, beyond noise."""
    if not latency.slower:
        return []
    total = len(fusion.macs)
    why = (
        f"{len(fusion.integer)} of {total} layers run in integer"
        if len(fusion.integer) < total
        else "its layers are too small to gain by integer kernels"
    )
    return [
        f"slower than the float model here, {latency.speedup:.2f}x at batch {latency.batch} on one "
        f"thread: {why}"
    ]


def serialised_bytes(model: ir.Model) -> int:
    """The size of the serialised model in bytes, external weights included."""
    return sum(map(len, serialised(model)))


def _times_in_turns(runs: Sequence[Forward], feed: Feed) -> Array:
    """Seconds ``[rounds, runs]`` of runs in turn, after one of each unmeasured."""
    for run in runs:
        run(feed)
    least, most = LATENCY_PAIRS
    times: list[list[float]] = []
    end = time.perf_counter() + LATENCY_SECONDS
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        times.append([timeit.timeit(partial(run, feed), timer=CLOCK, number=1) for run in runs])
    return np.asarray(times)
