"""How fast some files of one network are, taking turns in one process.

    python tools/latency.py FLOAT.onnx OTHER.onnx ... --calib CALIB [--runtime openvino]
        [--preprocess cifar10] [--batch 16] [--threads 1] [--rounds 300]

Prints a Markdown table: median milliseconds, its quartiles, and the ratio of the first file's
time to this one's, as a median over the rounds with its quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_attnround.check import openvino_session
from onnx_attnround.graph import input_specs, load
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import open_samples
from onnx_attnround.samples.preprocess import load_preprocess

Run = Callable[[Mapping[str, Array]], Any]


def main() -> None:
    """Open all files, let them take turns, print."""
    options = _options()
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    samples = open_samples(
        options.calib, input_specs(load(options.files[0])), preprocess=preprocess
    )
    feeds = next(samples.batches(options.batch))
    runs = [_open(path, options.runtime, options.threads) for path in options.files]
    for run in runs:
        run(feeds)
    times = np.array([[_milliseconds(run, feeds) for run in runs] for _ in range(options.rounds)])
    print("| file | kB | ms | quartiles | first / this | quartiles |\n|---" + "|--:" * 5 + "|")
    for path, mine in zip(options.files, times.T, strict=True):
        low, middle, high = np.percentile(mine, [25, 50, 75])
        worst, usual, best = np.percentile(times[:, 0] / mine, [25, 50, 75])
        print(
            f"| {path} | {path.stat().st_size / 1000:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} "
            f"| {usual:.2f} | {worst:.2f} to {best:.2f} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--preprocess")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    return parser.parse_args()


def _open(path: Path, runtime: str, threads: int) -> Run:
    if runtime == "openvino":
        compiled = openvino_session.compile_model(load(path), threads=threads)
        return lambda feeds: openvino_session.run(compiled, feeds)
    session = open_session(path, threads=threads)
    return lambda feeds: session.run(None, dict(feeds))


def _milliseconds(run: Run, feeds: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    run(feeds)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
