"""One job of a sweep, as the program of a process of its own.

It reads the job as a line of JSON, and ends when its input does: whoever started it is
gone then. It prints the outcome as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_attnround.errors import AttnRoundError, GateError
from onnx_attnround.pipeline import quantize
from onnx_attnround.report.result import QuantizeResult
from onnx_attnround.samples.preprocess import load_preprocess
from onnx_attnround.sweep.jobs import WORK, Job


def main() -> None:
    """Do the job on standard input."""
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome = perform(Job(**given["job"]), given["threads"])
    sys.stdout.write(f"{json.dumps(outcome)}\n")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def perform(job: Job, threads: int) -> dict[str, Any]:
    """Quantise, write model and page; ``status``, ``message`` and ``figures`` of it.

    ``threads`` are used where the settings of the job name no other number.
    """
    try:
        result = quantize(
            job.model,
            job.calib,
            {"threads": threads, **job.settings, "work_dir": Path(job.folder) / WORK},
            output=job.file(".onnx"),
            evaluation=job.eval,
            preprocess=None if job.preprocess is None else load_preprocess(job.preprocess),
        )
    except GateError as error:
        missed = error.result
        figures = _reported(job, missed) if isinstance(missed, QuantizeResult) else {}
        return _outcome("gate missed", str(error), figures)
    except AttnRoundError as error:
        return _outcome("failed", str(error), {})
    return _outcome("done", "", _reported(job, result))


def _outcome(status: str, message: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": status, "message": " ".join(message.split()), "figures": dict(figures)}


def _reported(job: Job, result: QuantizeResult) -> dict[str, Any]:
    """The figures of a result, whose page is written."""
    result.write_report(job.file(".html"))
    found = result.verification
    if found is None:
        return {}
    at_home = result.plan.target.runtime == "onnxruntime"
    worst, accuracy = found.worst_output, found.accuracy
    agreements = [each.agreement for each in found.outputs if each.agreement is not None]
    return {
        "float_bytes": found.float_bytes,
        "bytes": found.quantised_bytes,
        "sqnr_db": None if worst is None or worst.sqnr_db is None else float(worst.sqnr_db),
        "agreement": min(agreements) if agreements else None,
        "float_top1": None if accuracy is None else accuracy.float_top1,
        "top1": None if accuracy is None else accuracy.quantised_top1,
        "speedup": found.latency.speedup if at_home else None,
        "integer_share": result.checked.fusion.integer_share,
        "basis": found.basis,
    }


if __name__ == "__main__":
    main()
