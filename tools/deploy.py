"""One model for every target: is the file clean, does it run in integer, do runtimes agree?

    python tools/deploy.py MODEL.onnx --calib CALIB --eval EVAL [--preprocess cifar10]
        [--targets ort,openvino] [--storages packed,int8] [--weight-bits 8] [--samples 2000]

Prints a Markdown table, a line for each target and storage. Agreement is that of
top-1 between OpenVINO and ONNX Runtime without its optimiser, on the first samples
of EVAL; latency is the median of OpenVINO's runs on one thread, 16 samples each.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from typing import Any

import numpy as np

from onnx_attnround import QuantConfig, QuantizeResult, quantize
from onnx_attnround.check import openvino_session
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import input_specs
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import open_samples
from onnx_attnround.samples.preprocess import load_preprocess
from onnx_attnround.targets import TARGETS, get_target

BATCH, RUNS = 16, 50
COLUMNS = (
    "target", "storage", "findings", "MACs in integer", "top-1 like float", "OpenVINO agrees",
    "OpenVINO kernels in integer", "ms in ONNX Runtime", "ms in OpenVINO", "kB",
)  # fmt: skip


def main() -> None:
    """Make and run the file for each target, and print the table."""
    options = _options()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for target in options.targets.split(","):
        for storage in filter(None, options.storages.split(",")):
            if storage == "default" or storage in get_target(target).weight_storages:
                print("| " + " | ".join(_cells(options, target, storage)) + " |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--preprocess")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--storages", default="default", help="or some of packed,packed2,int8,int4")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000)
    return parser.parse_args()


def _cells(options: argparse.Namespace, target: str, storage: str) -> list[str]:
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    settings: dict[str, Any] = {"target": target, "weight_bits": options.weight_bits}
    if storage != "default":
        settings["weight_storage"] = storage
    result = quantize(options.model, options.calib, QuantConfig(**settings), preprocess=preprocess)
    specs = input_specs(result.model)
    samples = open_samples(options.eval, specs, limit=options.samples, preprocess=preprocess)
    feeds = [dict(feed) for feed in islice(samples.batches(BATCH), options.samples // BATCH)]
    measured, share = result.verification, result.checked.fusion.integer_share
    if measured is None:
        raise SystemExit("no samples to compare on")
    agreed, kernels, milliseconds = _in_openvino(result, feeds)
    return [
        target,
        storage,
        str(len(result.checked.findings)),
        "?" if share is None else f"{share:.1%}",
        f"{measured.outputs[0].agreement or 0:.2%}",
        agreed,
        kernels,
        f"{measured.latency.quantised_ms:.2f}",
        milliseconds,
        f"{measured.quantised_bytes / 1000:.0f}",
    ]


def _in_openvino(result: QuantizeResult, feeds: list[dict[str, Array]]) -> tuple[str, str, str]:
    """Top-1 agreement with ONNX Runtime, layers with integer kernels, and milliseconds."""
    try:
        compiled = openvino_session.compile_model(result.model, threads=1)
    except ModelError:
        return "refused", "–", "–"
    session = open_session(result.model, threads=1, optimise=False)
    same = [
        _same(session.run(None, feed)[0], openvino_session.run(compiled, feed)) for feed in feeds
    ]
    times = []
    for feed in islice(feeds * RUNS, RUNS):
        start = time.perf_counter()
        openvino_session.run(compiled, feed)
        times.append(time.perf_counter() - start)
    integer = openvino_session.integer_kernels(compiled)
    return (
        f"{np.concatenate(same).mean():.2%}",
        f"{len(integer)} of {len(result.plan.layers)}",
        f"{1000 * float(np.median(times)):.2f}",
    )


def _same(wanted: Array, found: dict[str, Array]) -> Array:
    equal: Array = wanted.argmax(1) == next(iter(found.values())).argmax(1)
    return equal


if __name__ == "__main__":
    main()
