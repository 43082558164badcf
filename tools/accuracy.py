"""Top-1, agreement and SQNR of the converter on one model, over bit widths, methods and seeds.

    python tools/accuracy.py MODEL.onnx --calib CALIB --eval EVAL.npz [--preprocess cifar10]
        [--bits 8,4,3,2] [--act-bits 8] [--mean-bits 4] [--allocators coding-length,gram]
        [--methods attention,nearest] [--seeds 0,1]

Prints a Markdown table, a line for each setting: means over the seeds, and the spread of top-1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.samples.preprocess import load_preprocess

COLUMNS = "setting", "method", "top-1", "drop", "spread", "agreement", "SQNR dB", "size", "CPU s"


def main() -> None:
    """Run all settings of the command line and print the table."""
    options = _options()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for label, settings in _settings(options):
        for method in options.methods.split(","):
            seeds = [int(seed) for seed in options.seeds.split(",")]
            runs = [_run(options, {**settings, "method": method, "seed": seed}) for seed in seeds]
            print(_line(label, method, runs), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--preprocess")
    parser.add_argument("--bits", default="8,4,3,2", help="uniform widths")
    parser.add_argument("--mean-bits", default="", help="mixed precision: mean widths")
    parser.add_argument("--allocators", default="coding-length", help="of the mean widths")
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--first-last-bits", type=int, default=8)
    parser.add_argument("--methods", default="attention")
    parser.add_argument("--reconstruct", default="layer", help="layer or block")
    parser.add_argument("--seeds", default="0")
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    common = {
        "act_bits": options.act_bits,
        "first_last_bits": options.first_last_bits,
        "reconstruct": options.reconstruct,
    }
    for bits in filter(None, options.bits.split(",")):
        yield f"W{bits}A{options.act_bits}", {**common, "weight_bits": int(bits)}
    for mean in filter(None, options.mean_bits.split(",")):
        for allocator in options.allocators.split(","):
            mixed = {**common, "weight_bits": 4, "mean_bits": float(mean), "allocator": allocator}
            yield f"W{mean} {allocator} A{options.act_bits}", mixed


def _run(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[float, ...]:
    start = time.process_time()
    result = quantize(
        options.model,
        options.calib,
        QuantConfig.parse(settings),
        evaluation=options.eval,
        preprocess=load_preprocess(options.preprocess) if options.preprocess else None,
    )
    seconds = time.process_time() - start
    measured = result.verification
    if measured is None or measured.accuracy is None:
        raise SystemExit("no labels: give an --eval file with 'labels'")
    output = measured.outputs[0]
    return (
        measured.accuracy.quantised_top1,
        measured.accuracy.drop_points,
        output.agreement or 0.0,
        output.sqnr_db or 0.0,
        measured.quantised_bytes,
        seconds,
    )


def _line(label: str, method: str, runs: list[tuple[float, ...]]) -> str:
    top1, drop, agreement, sqnr, size, seconds = np.mean(runs, axis=0)
    spread = np.ptp([run[0] for run in runs]) * 100
    cells = (
        label,
        method,
        f"{top1:.4f}",
        f"{drop:.2f}",
        f"{spread:.2f}",
        f"{agreement:.4f}",
        f"{sqnr:.1f}",
        f"{size / 1000:.0f} kB",
        f"{seconds:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
