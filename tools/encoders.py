"""Transformers: this tool, ONNX Runtime's own quantisers and NNCF, on the same samples.

    python tools/encoders.py MODEL.onnx --calib CALIB --eval EVAL [--samples 128] [--judged 256]
        [--work FOLDER] [--nncf PYTHON] [--rounds 60]

``CALIB`` and ``EVAL`` are .npz files or folders of them; nothing is fitted to ``EVAL``. Prints a
Markdown table with a line for each way to quantise: the SQNR of the worst float output over the
evaluation samples, run one at a time, padded tokens left out; the size; how much faster than
in float one sample runs on one thread, a median over ``--rounds`` in which all files take turns;
and the CPU-seconds of the conversion. ``--nncf`` is the Python of an environment with NNCF 3.4
(``pip install nncf==3.4.0 onnx==1.23.2 onnxruntime==1.31.1``), whose SmoothQuant comes with the
model type transformer. A file that is in ``--work`` already is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization import quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnx_attnround import quantize
from onnx_attnround.graph import input_specs, load
from onnx_attnround.report.document import versions
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import Feeds, Samples, open_samples
from onnx_attnround.verify import output_sqnr

COLUMNS = "", "SQNR dB", "MB", "float / this", "CPU s"
OURS = {
    "this tool, static": {},
    "… `--activations auto`": {"activations": "auto"},
    "… `--activations dynamic`": {"activations": "dynamic"},
    "… `--weight-bits 4`": {"weight_bits": 4},
    "… `--weight-bits 4 --act-bits 32 --block-size 32`": {
        "weight_bits": 4, "act_bits": 32, "block_size": 32
    },
}  # fmt: skip
Make = Callable[[Path], None]


def main() -> None:
    """Quantise in all ways, measure, print."""
    logging.disable(logging.WARNING)
    options = _options()
    specs = input_specs(load(options.model))
    calibration = open_samples(options.calib, specs, limit=options.samples).at_most(1)
    evaluation = open_samples(options.eval, specs, limit=options.judged).at_most(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        files = {"float": options.model}
        costs = {"float": ""}
        for number, (label, make) in enumerate(_makers(options, calibration, work).items()):
            path = work / f"{number}.onnx"
            costs[label] = _made(make, path)
            if path.exists():
                files[label] = path
        _print(files, costs, evaluation, options.rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--samples", type=int, default=128, help="of the calibration samples")
    parser.add_argument("--judged", type=int, default=256, help="of the evaluation samples")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--nncf", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    return parser.parse_args()


def _makers(options: argparse.Namespace, calibration: Samples, work: Path) -> dict[str, Make]:
    makers: dict[str, Make] = {label: _ours(options, settings) for label, settings in OURS.items()}
    prepared = work / "prepared.onnx"
    if not prepared.exists():
        quant_pre_process(str(options.model), str(prepared), skip_symbolic_shape=True)
    makers["`quantize_dynamic`"] = lambda path: quantize_dynamic(
        str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8
    )
    makers["`quantize_static`"] = _static(prepared, calibration, None)
    makers["`quantize_static`, MatMul and Gemm"] = _static(
        prepared, calibration, ["MatMul", "Gemm"]
    )
    makers["`MatMulNBits`, 4 bits, blocks of 32"] = lambda path: _nbits(options.model, path)
    if options.nncf is not None:
        makers["NNCF, SmoothQuant"] = lambda path: _nncf(options, calibration, work, path)
    return makers


def _ours(options: argparse.Namespace, settings: dict[str, Any]) -> Make:
    def make(path: Path) -> None:
        quantize(options.model, options.calib, output=path, samples=options.samples, **settings)

    return make


def _static(prepared: Path, calibration: Samples, ops: list[str] | None) -> Make:
    def make(path: Path) -> None:
        quantize_static(
            str(prepared),
            str(path),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=ops,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    return make


class _Reader(CalibrationDataReader):
    """Calibration samples, one at a time, in the form that quantize_static reads."""

    def __init__(self, samples: Samples) -> None:
        self._batches: Iterator[Feeds] = samples.batches(1)

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


def _nbits(model: Path, path: Path) -> None:
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(model), bits=4, block_size=32, is_symmetric=True
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def _nncf(options: argparse.Namespace, calibration: Samples, work: Path, path: Path) -> None:
    """In an environment of its own, which reads the samples as files."""
    folder = work / "samples"
    folder.mkdir(exist_ok=True)
    for number, feeds in enumerate(calibration.batches(1)):
        np.savez(folder / f"{number:05}.npz", **feeds)
    script = Path(__file__).parent / "peers" / "nncf_transformer.py"
    command = [options.nncf, script, options.model, folder, path]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def _made(make: Make, path: Path) -> str:
    """Make the file, unless it is there; CPU-seconds, which are kept beside it, or the failure."""
    kept = path.with_suffix(".json")
    if not path.exists():
        start = _cpu_seconds()
        try:
            make(path)
        except Exception as error:  # a peer's failure is a figure, too
            return f"failed: {str(error).splitlines()[0][:80]}"
        kept.write_text(json.dumps(_cpu_seconds() - start))
    return f"{json.loads(kept.read_text()):.0f}"


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _print(files: dict[str, Path], costs: dict[str, str], evaluation: Samples, rounds: int) -> None:
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{evaluation.count} evaluation samples\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---" + "|--:" * (len(COLUMNS) - 1) + "|")
    plain = load(files["float"])
    medians = _speedups(files, evaluation, rounds)
    for label, cost in costs.items():
        if label not in files:
            print(f"| {label} | | | | {cost} |")
            continue
        path = files[label]
        sqnr = output_sqnr(plain, load(path), evaluation, None) if label != "float" else None
        told = "" if sqnr is None else f"{sqnr:.1f}"
        size = path.stat().st_size / 1e6
        print(f"| {label} | {told} | {size:.1f} | {medians[label]:.2f} | {cost} |", flush=True)


def _speedups(files: dict[str, Path], evaluation: Samples, rounds: int) -> dict[str, float]:
    """Median of the float model's time over that of each file, the files taking turns."""
    feeds = next(evaluation.batches(1))
    sessions = [open_session(path, threads=1) for path in files.values()]
    for session in sessions:
        session.run(None, feeds)
    times = np.array([[_seconds(session, feeds) for session in sessions] for _ in range(rounds)])
    return dict(zip(files, np.median(times[:, :1] / times, axis=0), strict=True))


def _seconds(session: Any, feeds: Feeds) -> float:
    start = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
