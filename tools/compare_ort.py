"""ONNX Runtime's own static quantisation and this converter, side by side on one model.

    python tools/compare_ort.py MODEL.onnx --calib CALIB --eval EVAL.npz [--preprocess cifar10]

Prints a Markdown table with a row for each of: the float model; ``quantize_static`` after its
``quant_pre_process`` (QDQ, per channel, uint8 activations, int8 weights, MinMax); this converter
at W8A8; and at W4A8 with packed weights. All see the same calibration samples, and the
evaluation samples only at the end. Latencies come from runs in turn, in one process.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.graph import input_specs, load
from onnx_attnround.report.document import versions
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import Samples, open_samples, read_labels
from onnx_attnround.samples.preprocess import load_preprocess

CALIBRATION_SAMPLES = 1024
CALIBRATION_BATCH = 32
EVALUATION_BATCH = 250
LATENCY_BATCH = 16
LATENCY_ROUNDS = 300
CHANNELS_OPSET = 13  # in which QuantizeLinear has an axis
COLUMNS = (
    "", "top-1", "agrees with float", "SQNR dB", "size kB", "ms", "float / this",
    "quantize_static / this", "CPU s",
)  # fmt: skip


def main() -> None:
    """Quantise in all ways, measure, print."""
    for module in (
        "onnxruntime.quantization.shape_inference",
        "onnx_attnround.reconstruct.layerwise",
    ):
        importlib.import_module(module)  # now, so that no conversion is charged for it
    options = _options()
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    inputs = input_specs(load(options.model))
    calibration = open_samples(
        options.calib, inputs, limit=CALIBRATION_SAMPLES, preprocess=preprocess
    )
    evaluation = open_samples(options.eval, inputs, preprocess=preprocess)
    labels = read_labels(options.eval)[: evaluation.count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = {
            "`quantize_static` W8A8": lambda path: static(options.model, path, calibration),
            "onnx_attnround W8A8": lambda path: _ours(options, path, preprocess, bits=8),
            "onnx_attnround W4A8, packed": lambda path: _ours(options, path, preprocess, bits=4),
        }
        files, seconds = {"float": options.model}, {"float": 0.0}
        for number, (label, make) in enumerate(makers.items()):
            files[label] = folder / f"{number}.onnx"
            seconds[label] = _cpu_seconds(make, files[label])
        _print(files, seconds, evaluation, labels)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--eval", required=True, type=Path, help="an .npz with labels")
    parser.add_argument("--preprocess")
    return parser.parse_args()


class _Reader:
    """Calibration samples in the form that quantize_static reads."""

    def __init__(self, samples: Samples) -> None:
        self._batches: Iterator[Mapping[str, Any]] = samples.batches(CALIBRATION_BATCH)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._batches, None)


def static(model: Path, output: Path, calibration: Samples) -> None:
    """``quantize_static`` behind its own preparation, in an opset with scales per channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, output = model.resolve(), output.resolve()
    prepared, here = output.with_suffix(".prepared.onnx"), Path.cwd()
    logging.disable(logging.WARNING)
    os.chdir(output.parent)  # the inference of shapes leaves files in the folder where it fails
    try:
        quant_pre_process(str(model), str(prepared))
    except Exception:  # it gives up on symbols in many ways
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    finally:
        os.chdir(here)
    loaded = onnx.load(prepared)
    if next(each.version for each in loaded.opset_import if not each.domain) < CHANNELS_OPSET:
        onnx.save(onnx.version_converter.convert_version(loaded, CHANNELS_OPSET), prepared)
    quantize_static(
        str(prepared),
        str(output),
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def _ours(options: argparse.Namespace, output: Path, preprocess: Any, *, bits: int) -> None:
    config = QuantConfig(
        weight_bits=bits, samples=CALIBRATION_SAMPLES, batch_size=CALIBRATION_BATCH
    )
    quantize(options.model, options.calib, config, output=output, preprocess=preprocess)


def _cpu_seconds(work: Callable[[Path], None], path: Path) -> float:
    start = time.process_time()
    work(path)
    return time.process_time() - start


def _print(
    files: Mapping[str, Path],
    seconds: Mapping[str, float],
    evaluation: Samples,
    labels: np.ndarray,
) -> None:
    used = {**versions(), "Python": platform.python_version()}
    print(", ".join(f"{name} {version}" for name, version in used.items()) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---" + "|--:" * (len(COLUMNS) - 1) + "|")
    medians = latencies(files, evaluation)
    expected = _outputs(files["float"], evaluation)
    for label, path in files.items():
        got = expected if label == "float" else _outputs(path, evaluation)
        cells = (
            *_accuracy(expected, got, labels, is_float=label == "float"),
            f"{path.stat().st_size / 1000:.0f}",
            f"{medians[label]:.2f}",
            f"{medians['float'] / medians[label]:.2f}",
            f"{medians['`quantize_static` W8A8'] / medians[label]:.2f}",
            "" if label == "float" else f"{seconds[label]:.1f}",
        )
        print(f"| {label} | " + " | ".join(cells) + " |")


def _accuracy(
    expected: np.ndarray, got: np.ndarray, labels: np.ndarray, *, is_float: bool
) -> tuple[str, str, str]:
    top1 = f"{np.mean(got.argmax(1) == labels):.4f}"
    if is_float:
        return top1, "", ""
    agreement = np.mean(got.argmax(1) == expected.argmax(1))
    error = got.astype(np.float64) - expected
    sqnr = 10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / np.sum(error**2))
    return top1, f"{agreement:.4f}", f"{sqnr:.1f}"


def _outputs(path: Path, evaluation: Samples) -> np.ndarray:
    """The first output over all evaluation samples."""
    session = open_session(path)
    name = session.get_outputs()[0].name
    batches = evaluation.batches(EVALUATION_BATCH)
    return np.concatenate([session.run([name], feeds)[0] for feeds in batches])


def latencies(
    files: Mapping[str, Path],
    samples: Samples,
    batch: int = LATENCY_BATCH,
    rounds: int = LATENCY_ROUNDS,
) -> dict[str, float]:
    """Median milliseconds for one batch on one thread; the models take turns."""
    feeds = next(samples.batches(batch))
    sessions = {label: open_session(path, threads=1) for label, path in files.items()}
    for session in sessions.values():
        session.run(None, feeds)
    times = [
        [_milliseconds(session, feeds) for session in sessions.values()] for _ in range(rounds)
    ]
    return dict(zip(sessions, np.median(times, axis=0), strict=True))


def _milliseconds(session: Any, feeds: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    session.run(None, feeds)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
