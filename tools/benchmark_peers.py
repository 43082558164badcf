"""Other quantisers and this one on the same model and samples: cost, quality, what the file is.

    python tools/benchmark_peers.py MODEL.onnx --calib CALIB --eval EVAL.npz [--preprocess cifar10]
        [--bits 8,4,3,2] [--act-bits 8] [--only ours,quark:adaround] [--envs FOLDER] [--work FOLDER]

Each peer runs in a virtual environment of its own, made once under ``--envs``. Every run is a
process on one thread, as far as the peer lets itself be told; its cost is what it and its children
used, imports included, and the peak that of the largest process. Every layer has the stated bits,
first and last included. Prints a Markdown table; the figures are kept in ``results.json`` under
``--work``, where a later run replaces the rows that it measures and leaves the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.quality import compare, inspect, run_file

from onnx_attnround.errors import AttnRoundError
from onnx_attnround.graph import input_specs, load
from onnx_attnround.report.document import versions as installed
from onnx_attnround.samples import Samples, open_samples, read_labels
from onnx_attnround.samples.preprocess import load_preprocess

SCRIPTS = Path(__file__).parent / "peers"
CALIBRATION_SAMPLES = 1024
TORCH = "torch==2.13.0"
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
COLUMNS = (
    "setting", "tool", "top-1", "agrees with float", "SQNR dB", "CPU s", "peak MB", "kB",
    "layers in integer", "bits of the weights", "remarks",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Requirements are installed one after the other; the script is ``run_<name>.py``."""

    requirements: tuple[str, ...]
    methods: tuple[str, ...]


PEERS = {
    "ours": Peer((), ("layer", "block")),
    "ort": Peer(("onnxruntime==1.31.1 onnx==1.23.2 sympy==1.14.0",), ("static",)),
    "aimet": Peer((TORCH, f"{TORCH} aimet-onnx==2.42.0"), ("adaround",)),
    "esp_ppq": Peer((TORCH, f"{TORCH} esp-ppq==1.3.12"), ("lsq", "adaround")),
    "quark": Peer(
        (TORCH, f"{TORCH} amd-quark==0.13 onnxruntime==1.31.1"), ("adaround", "adaquant")
    ),
    "nncf": Peer((TORCH, f"{TORCH} nncf==3.4.0 onnx==1.23.2 onnxruntime==1.31.1"), ("ptq",)),
    "modelopt": Peer((TORCH, f"{TORCH} nvidia-modelopt[onnx]==0.47.0"), ("entropy", "max")),
}


def main() -> None:
    """Measure what the command line asks for, merge it into the figures at hand, print all."""
    options = _options()
    work = options.work / options.model.stem
    work.mkdir(parents=True, exist_ok=True)
    results = Results(work / "results.json")
    data = _prepare(options, work)
    for name, method in options.only:
        python = _environment(name, options.envs) if name != "ours" else Path(sys.executable)
        for bits in options.bits:
            job = _job(options, data, work, (name, method, bits))
            results.add(_measure(job, python, data))
    print(results.table())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=lambda text: Path(text).resolve())
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--eval", required=True, type=Path, help="an .npz with labels")
    parser.add_argument("--preprocess")
    parser.add_argument("--bits", default="8,4,3,2", type=_integers)
    parser.add_argument("--act-bits", default=8, type=int)
    parser.add_argument(
        "--only", default=",".join(PEERS), type=_methods, help="PEER or PEER:METHOD, with commas"
    )
    parser.add_argument("--envs", default="build/peer-envs", type=Path)
    parser.add_argument("--work", default="build/peers", type=lambda text: Path(text).resolve())
    parser.add_argument("--timeout", default=3600, type=int, help="seconds for one run")
    return parser.parse_args()


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _methods(text: str) -> list[tuple[str, str]]:
    """The methods of the peers that ``--only`` names."""
    known = [(name, method) for name, peer in PEERS.items() for method in peer.methods]
    wanted = text.split(",")
    if unknown := set(wanted) - set(PEERS) - {":".join(pair) for pair in known}:
        raise argparse.ArgumentTypeError(f"unknown: {','.join(unknown)}; there are {known}")
    return [pair for pair in known if pair[0] in wanted or ":".join(pair) in wanted]


# --- what all runs share -------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Prepared samples in files for the peers; inputs, labels and float outputs to judge by."""

    input: str
    calibration: Path
    evaluation: Path
    samples: np.ndarray
    labels: np.ndarray
    expected: np.ndarray


def _prepare(options: argparse.Namespace, work: Path) -> Data:
    try:
        preprocess = load_preprocess(options.preprocess) if options.preprocess else None
        (spec,) = inputs = input_specs(load(options.model))
        calibration = open_samples(
            options.calib, inputs, limit=CALIBRATION_SAMPLES, preprocess=preprocess
        )
        evaluation = open_samples(options.eval, inputs, preprocess=preprocess)
        labels = read_labels(options.eval)[: evaluation.count]
    except (AttnRoundError, ValueError) as error:
        raise SystemExit(f"cannot use these files (models have one input here): {error}") from error
    arrays = {name: _joined(source, spec.name) for name, source in
              (("calibration", calibration), ("evaluation", evaluation))}  # fmt: skip
    for name, array in arrays.items():
        np.savez(work / f"{name}.npz", **{spec.name: array})
    return Data(
        input=spec.name,
        calibration=work / "calibration.npz",
        evaluation=work / "evaluation.npz",
        samples=arrays["evaluation"],
        labels=labels,
        expected=run_file(options.model, arrays["evaluation"]),
    )


def _joined(samples: Samples, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(batch[name]) for batch in samples.batches(250)])


def _environment(name: str, envs: Path) -> Path:
    """The Python of a peer's environment, made if it is not there yet or was made otherwise."""
    folder = (envs / name).absolute()
    python, marker = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PEERS[name].requirements)
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for requirements in PEERS[name].requirements:
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", *requirements.split()], check=True
        )
    marker.write_text(wanted, encoding="utf-8")
    return python


# --- one run -------------------------------------------------------------------------------------


def _job(
    options: argparse.Namespace, data: Data, work: Path, what: tuple[str, str, int]
) -> dict[str, Any]:
    name, method, bits = what
    folder = work / f"{name}-{method}-W{bits}A{options.act_bits}"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    return {
        "peer": name,
        "timeout": options.timeout,
        "script": {
            "model": str(options.model),
            "input": data.input,
            "calibration": str(data.calibration),
            "evaluation": str(data.evaluation),
            "method": method,
            "weight_bits": bits,
            "act_bits": options.act_bits,
            "folder": str(folder),
        },
    }


def _measure(job: dict[str, Any], python: Path, data: Data) -> dict[str, Any]:
    """Run a job in a process of its own and judge what it left."""
    told = job["script"]
    folder = Path(told["folder"])
    (folder / "job.json").write_text(json.dumps(told), encoding="utf-8")
    row = {
        "setting": f"W{told['weight_bits']}A{told['act_bits']}",
        "peer": job["peer"],
        "method": told["method"],
    }
    requirements = PEERS[job["peer"]].requirements
    versions = requirements[-1] if requirements else str(installed())
    print(" ".join(row.values()), file=sys.stderr, flush=True)
    command = _our_command(told) if job["peer"] == "ours" else [
        str(python), str(SCRIPTS / f"run_{job['peer']}.py"), "job.json"
    ]  # fmt: skip
    cost, failure = _run(command, folder, job["timeout"])
    row["versions"] = versions
    if failure:
        return {**row, "cannot": failure}
    result = _result(folder)
    cost["cpu_s"] -= result.pop("simulation_seconds", 0.0)
    if "cannot" in result:
        return {**row, **result}
    return {**row, **cost, **result, **_judge(folder, data)}


def _our_command(told: dict[str, Any]) -> list[str]:
    bits = str(told["weight_bits"])
    return [
        sys.executable, "-m", "onnx_attnround", told["model"], "model.onnx", "--quiet",
        "--calib", told["calibration"], "--weight-bits", bits, "--first-last-bits", bits,
        "--act-bits", str(told["act_bits"]), "--threads", "1",
        "--reconstruct", told["method"],
    ]  # fmt: skip


def _run(command: Sequence[str], folder: Path, timeout: int) -> tuple[dict[str, float], str]:
    """What the process and its children cost, and the last line it said if it failed."""
    environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    start = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        # Not process.wait(): only wait4 tells what this child used.
        usage = _waited(process, start + timeout)
    cost = {
        "wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,  # of the largest process
    }
    if process.returncode == 0:
        return cost, ""
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return cost, f"failed: {lines[-1] if lines else process.returncode}"


def _waited(process: subprocess.Popen[bytes], deadline: float) -> Any:
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        if time.perf_counter() > deadline:
            process.kill()
        time.sleep(0.05)


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"remarks": []}


def _judge(folder: Path, data: Data) -> dict[str, Any]:
    """Quality of the file if there is one that runs, and of the peer's own simulation."""
    exported, simulated = folder / "model.onnx", folder / "simulated.npy"
    told: dict[str, Any] = {}
    if simulated.is_file():
        told["simulated"] = compare(np.load(simulated), data.expected, data.labels)
    if exported.is_file():
        try:
            outputs = run_file(exported, data.samples)
            told |= {**inspect(exported), **compare(outputs, data.expected, data.labels)}
        except AttnRoundError as error:
            told["refused"] = f"its file does not run: {error}"
    return told


# --- all rows ------------------------------------------------------------------------------------


class Results:
    """The rows in a JSON file, one for each setting, peer and method."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self._rows = {_key(row): row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        self._rows[_key(row)] = {**row, "date": time.strftime("%Y-%m-%d")}
        rows = [self._rows[key] for key in sorted(self._rows, key=_order)]
        self._path.write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def table(self) -> str:
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---" + "|--:" * 8 + "|---|"]
        rows = (self._rows[key] for key in sorted(self._rows, key=_order))
        return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["setting"], row["peer"], row["method"]


def _order(key: tuple[str, str, str]) -> tuple[Any, ...]:
    setting, peer, method = key
    weight, act = map(int, setting[1:].split("A"))
    return -act, -weight, list(PEERS).index(peer), method


def cells(row: dict[str, Any]) -> Iterator[str]:
    """The cells of a row; what was not measured stays empty."""
    quality = row if "top1" in row else row.get("simulated", {})

    def shown(source: dict[str, Any], name: str, form: Callable[[Any], str]) -> str:
        return form(source[name]) if name in source else ""

    yield row["setting"]
    yield f"{row['peer']} {row['method']}"
    yield shown(quality, "top1", "{:.4f}".format)
    yield shown(quality, "agreement", "{:.4f}".format)
    yield shown(quality, "sqnr_db", "{:.1f}".format)
    yield shown(row, "cpu_s", "{:.0f}".format)
    yield shown(row, "peak_mb", "{:.0f}".format)
    yield shown(row, "bytes", lambda size: f"{size / 1000:.0f}")
    yield shown(row, "integer_layers", lambda count: f"{count}/{row['layers']}")
    yield shown(row, "layers_by_bits", bits_told)
    yield "; ".join(_remarks(row)).replace("|", "/")


def _remarks(row: dict[str, Any]) -> Iterator[str]:
    if "cannot" in row:
        yield f"cannot: {row['cannot']}"
    if "simulated" in row:
        yield f"simulated {row['simulated']['top1']:.4f}" if "top1" in row else "simulated only"
    if "refused" in row:
        yield row["refused"]
    yield from row.get("remarks", [])


def bits_told(layers_by_bits: dict[str, int]) -> str:
    """The widest and the narrowest layer; more than 8 bits are float."""
    widths = sorted(int(width) for width in layers_by_bits)
    told = ["float" if width > 8 else str(width) for width in (widths[0], widths[-1])]
    return told[0] if told[0] == told[1] else f"{told[0]} to {told[1]}"


if __name__ == "__main__":
    main()
