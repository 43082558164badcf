"""Runs the jobs of a sweep that have no result yet, a process each, through joblib."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib

from onnx_attnround.errors import ConfigError
from onnx_attnround.graph import check_output, write_atomic
from onnx_attnround.report.swept import Swept
from onnx_attnround.sweep.jobs import WORK, Job

BACKENDS = ("loky", "ray", "dask")
"""Where jobs run: processes of this machine, or the workers of a cluster."""

FINAL = ("done", "gate missed")  # what a later sweep leaves as it is; the rest it tries again


def sweep(
    folder: Path,
    jobs: Sequence[Job],
    *,
    backend: str = "loky",
    workers: int | None = None,
    cluster: str | None = None,
    on_done: Callable[[Swept], None] = lambda swept: None,
) -> tuple[Swept, ...]:
    """The results of all jobs, in their order: kept ones, and those of the jobs that are run.

    A job has its files in ``folder``, which all workers see. One that fails, whatever ends its
    process, is told in its result, and tried again by the next sweep; so are those that a
    kill cut off, from where they were. ``workers`` jobs run at a time, by default one for
    each two cores; ``cluster`` is the address of a cluster that runs already.

    Raises ``ConfigError`` for a backend that there is not, ``OutputError`` for the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder / "sweep.json")
    kept = {job.name: found for job in jobs if (found := _kept(job)) is not None}
    left = [job for job in jobs if job.name not in kept]
    count = workers or max((os.cpu_count() or 1) // 2, 1)
    made = {}
    if left:
        threads = max((os.cpu_count() or 1) // count, 1)
        for found in _run(left, threads, (backend, count, cluster)):
            made[found.name] = found
            on_done(found)
    if len(kept) + len(made) == len(jobs) and all(f.status != "failed" for f in made.values()):
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return tuple(kept.get(job.name) or made[job.name] for job in jobs)


def _kept(job: Job) -> Swept | None:
    """The result of an earlier sweep, if it is final and that of the very same job."""
    try:
        record = json.loads(job.file(".json").read_text(encoding="utf-8"))
        found = Swept(**record["swept"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or of something else
        return None
    same = record.get("fingerprint") == job.fingerprint() and found.status in FINAL
    there = found.status != "done" or job.file(".onnx").is_file()
    return found if same and there else None


def _run(
    jobs: Sequence[Job], threads: int, where: tuple[str, int, str | None]
) -> Iterator[Swept]:
    """The results of ``jobs`` as they come."""
    with _workers(*where):
        active, _ = joblib.parallel.get_active_backend()
        streams = getattr(active, "supports_return_generator", False)
        parallel = joblib.Parallel(return_as="generator_unordered" if streams else "list")
        yield from parallel(joblib.delayed(perform_apart)(job, threads) for job in jobs)


@contextmanager
def _workers(backend: str, count: int, cluster: str | None) -> Iterator[None]:
    """The workers that joblib hands jobs to, while this is open."""
    if backend == "loky":
        with joblib.parallel_config("loky", n_jobs=count):
            yield
    elif backend == "ray":
        with _ray(count, cluster), joblib.parallel_config("ray", n_jobs=count):
            yield
    elif backend == "dask":
        with _dask(count, cluster), joblib.parallel_config("dask", n_jobs=count):
            yield
    else:
        raise ConfigError(f"unknown backend '{backend}': expected one of {', '.join(BACKENDS)}")


@contextmanager
def _ray(count: int, cluster: str | None) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ConfigError(_missing("ray", error)) from error
    given = {"num_cpus": count} if cluster is None else {"address": cluster}
    ray.init(**given, log_to_driver=False, include_dashboard=None)
    try:
        register_ray()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(count: int, cluster: str | None) -> Iterator[None]:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ConfigError(_missing("dask", error)) from error
    local = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
    with Client(cluster) if cluster is not None else Client(**local):
        yield


def _missing(backend: str, error: ImportError) -> str:
    return (
        f"backend '{backend}' is not installed ({error}): pip install 'onnx-attnround[{backend}]'"
    )


def perform_apart(job: Job, threads: int) -> Swept:
    """Do ``job`` in a process of its own, and keep its result; what ends that ends no other job."""
    start = time.perf_counter()
    outcome = _outcome(job, threads)
    swept = Swept(
        name=job.name,
        model=job.model,
        target=job.target,
        preset=job.preset,
        seconds=time.perf_counter() - start,
        **outcome,
    )
    record = {"fingerprint": job.fingerprint(), "swept": asdict(swept)}
    write_atomic(job.file(".json"), json.dumps(record, indent=2).encode())
    return swept


def _outcome(job: Job, threads: int) -> Mapping[str, Any]:
    given = json.dumps({"job": asdict(job), "threads": threads})
    with job.file(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "onnx_attnround.sweep.one"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        try:
            if process.stdin is None or process.stdout is None:
                raise OSError("the process has no pipes")
            with suppress(BrokenPipeError):  # of a process that is gone, as its code will tell
                process.stdin.write(f"{given}\n")
                process.stdin.flush()  # it stays open: its end tells the process that we are gone
            lines = process.stdout.read().splitlines()
            code = process.wait()
        finally:
            process.kill()
    if code == 0 and lines:
        job.file(".log").unlink(missing_ok=True)
        outcome: Mapping[str, Any] = json.loads(lines[-1])
        return outcome
    told = f"its process ended by signal {-code}" if code < 0 else f"its process ended with {code}"
    return {"status": "failed", "message": f"{told}, see {job.file('.log').name}", "figures": {}}
