"""What quantisation costs on samples that it has not seen: this converter and ONNX Runtime's own.

    python tools/held_out.py MODEL.onnx --calib CALIB.npz --test TEST.npz [--rows TEXT,TEXT]

Prints a Markdown table. Rows are ``--method nearest`` and the defaults at W8A8 and W4A8, and
``quantize_static`` (QDQ, per channel, uint8 activations, int8 weights, MinMax) and
``quantize_dynamic`` of ONNX Runtime. For each float output there is the SQNR on the test samples,
which nothing else sees, and in brackets what the converter itself printed, from samples that it
kept apart, with its standard error. Latencies come from runs in turn, in one process. ``--rows``
has the rows whose names contain one of the texts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from compare_ort import latencies, static

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.graph import input_specs, load
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Samples, open_samples

Printed = Mapping[str, str]
"""What a converter says of each output, if it says anything."""


def main() -> None:
    """Quantise in all ways, measure, print."""
    options = _options()
    inputs = input_specs(load(options.model))
    calibration = open_samples(options.calib, inputs, limit=options.samples)
    test = open_samples(options.test, inputs, limit=options.test_samples)
    makers: dict[str, Callable[[Path], Printed]] = {
        f"{name} W{bits}A8": lambda path, method=method, bits=bits: _ours(
            options, path, method=method, weight_bits=bits
        )
        for bits in (8, 4)
        for name, method in (("nearest", "nearest"), ("onnx_attnround", "attention"))
    }
    makers["`quantize_static`"] = lambda path: static(options.model, path, calibration) or {}
    makers["`quantize_dynamic`"] = lambda path: _dynamic(options.model, path)
    with tempfile.TemporaryDirectory() as folder:
        expected = _outputs(options.model, test)
        print(_row("", [*expected, "size kB", "float / this", "CPU s"]))
        print("|---" + "|--:" * (len(expected) + 3) + "|")
        chosen = {k: v for k, v in makers.items() if any(row in k for row in options.rows)}
        for number, (label, make) in enumerate(chosen.items()):
            path, start = Path(folder, f"{number}.onnx"), time.process_time()
            try:
                printed = make(path)
                seconds = time.process_time() - start
                print(_row(label, _cells(options.model, path, test, expected, printed, seconds)))
            except Exception as error:
                print(_row(label, [f"{type(error).__name__}"] * (len(expected) + 3)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=256, help="calibration samples at most")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[""])
    parser.add_argument("--test-samples", type=int, help="test samples at most")
    return parser.parse_args()


def _ours(options: argparse.Namespace, path: Path, **settings: Any) -> Printed:
    config = QuantConfig(samples=options.samples, **settings)
    found = quantize(options.model, options.calib, config, output=path).verification
    return {
        output.name: f" ({output.sqnr_db:.1f} ± {output.sqnr_error_db or 0:.1f})"
        for output in (found.outputs if found else ())
        if output.sqnr_db is not None
    }


def _dynamic(model: Path, path: Path) -> Printed:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(model), str(path), per_channel=True, weight_type=QuantType.QInt8)
    return {}


def _outputs(path: Path, samples: Samples) -> dict[str, np.ndarray]:
    """Each float output over all samples, as a vector."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs() if "float" in output.type]
    parts = [run_on_samples(session, names, feeds) for feeds in samples.batches(8)]
    vectors = [
        np.concatenate([value.ravel() for value in found]) for found in zip(*parts, strict=True)
    ]
    return dict(zip(names, vectors, strict=True))


def _cells(
    model: Path,
    path: Path,
    test: Samples,
    expected: Mapping[str, np.ndarray],
    printed: Printed,
    seconds: float,
) -> list[str]:
    got = _outputs(path, test)
    medians = latencies({"float": model, "this": path}, test, batch=1, rounds=40)
    return [
        *(f"{_sqnr(x, got[name]):.1f}{printed.get(name, '')}" for name, x in expected.items()),
        f"{path.stat().st_size / 1000:.0f}",
        f"{medians['float'] / medians['this']:.2f}",
        f"{seconds:.0f}",
    ]


def _sqnr(expected: np.ndarray, got: np.ndarray) -> float:
    signal, error = expected.astype(np.float64), got.astype(np.float64) - expected
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(error).sum(), 1e-30)))


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
