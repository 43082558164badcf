"""What the driver hands to a peer's script, and what the script hands back.

Runs in every peer's environment, so it needs numpy and the standard library alone. A script is

    job = Job.from_command_line()
    ... quantise job.model, write job.output ...
    job.finish()

or ``job.simulate(run)`` before ``finish`` where the peer has no file to write, and
``job.cannot(reason)`` for a setting that the peer does not offer.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

BATCH = 32
EVALUATION_BATCH = 250


@dataclass(kw_only=True)
class Job:
    """One model, one setting; ``folder`` is this job's own."""

    model: str
    input: str
    calibration: str
    evaluation: str
    method: str
    weight_bits: int
    act_bits: int
    folder: str
    remarks: list[str] = field(default_factory=list)
    simulation_seconds: float = 0.0

    @classmethod
    def from_command_line(cls) -> Job:
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    @property
    def output(self) -> str:
        """Where the quantised model belongs."""
        return str(Path(self.folder) / "model.onnx")

    def batches(self, size: int = BATCH) -> list[dict[str, np.ndarray]]:
        """The calibration samples, as feeds for ONNX Runtime."""
        return [{self.input: batch} for batch in _split(self.calibration, size)]

    def simulate(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        """Write the outputs of the peer's own simulation; its time is not the peer's cost."""
        start = _cpu_seconds()
        outputs = [run(batch) for batch in _split(self.evaluation, EVALUATION_BATCH)]
        np.save(Path(self.folder) / "simulated.npy", np.concatenate(outputs))
        self.simulation_seconds += _cpu_seconds() - start

    def finish(self, **extra: Any) -> None:
        result = {"remarks": self.remarks, "simulation_seconds": self.simulation_seconds, **extra}
        (Path(self.folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")

    def cannot(self, reason: str) -> NoReturn:
        """The peer does not offer this setting."""
        self.finish(cannot=reason)
        raise SystemExit(0)


class Reader:
    """Calibration feeds for all that takes the CalibrationDataReader of ONNX Runtime."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)

    def rewind(self) -> None:
        self._feeds = iter(self._job.batches())

    def __len__(self) -> int:
        return len(self._job.batches())


def _split(path: str, size: int) -> Iterator[np.ndarray]:
    with np.load(path) as arrays:
        (samples,) = arrays.values()
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
