"""The GPU against the CPU, and how long a ResNet-18 takes there: the larger part of gpu_check.sh.

    python tools/gpu_check.py --out FOLDER [--dry-run]

Prints a line for each comparison, the seconds of each stage and the functions that take them;
FOLDER gets ``functions.txt``, ``kernels.txt`` and ``stages.json``. The exit code is 1 if the GPU
rounds worse than the CPU does, 2 if there is none.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import torch

from onnx_attnround import ConfigError, QuantizeResult, quantize
from onnx_attnround.runtime.device import open_device

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE_DB = 0.5
"""Sums in another order break ties another way, and later layers answer to that."""
GOAL_SECONDS = 20
IMAGES = 1024


def main() -> int:
    """Run the comparisons and the measurement; the exit code."""
    options = _options()
    print(f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}), ONNX Runtime "
          f"{onnxruntime.__version__} with {', '.join(onnxruntime.get_available_providers())}, "
          f"{os.cpu_count()} cores")  # fmt: skip
    device = "cpu" if options.dry_run else "cuda"
    try:
        open_device(device)
    except ConfigError as error:
        print(f"no GPU to check: {error}")
        return 2
    if device == "cuda":
        print(torch.cuda.get_device_name(0))
    made = options.out / "resnet18"
    images = 8 if options.dry_run else IMAGES
    making = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "build_resnet18.py", made, "--images", str(images)]
    )  # takes some ten seconds, beside the comparisons
    samples = 32 if options.dry_run else 256
    agree = [_compare(*network, device, samples) for network in networks(options.dry_run)]
    if making.wait():
        print("the ResNet-18 could not be made")
        return 1
    timed = made / "resnet18.onnx", made / "calib.npy"
    if options.dry_run:
        timed = networks(options.dry_run)[0][:2]
    _measure(*timed, device, options.out)
    _profile(*timed, device, options.out, 32 if options.dry_run else IMAGES // 8)
    return 0 if all(agree) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def networks(dry_run: bool) -> list[tuple[Path, Path, str | None]]:
    """Models, their samples and how these are preprocessed."""
    if "ATTNROUND_DATA" in os.environ and not dry_run:
        data = Path(os.environ["ATTNROUND_DATA"])
        samples = data / "cifar10" / "calib.npz"
        names = "resnet20_cifar", "mobilenetv2_cifar"
        return [(data / f"{name}.onnx", samples, "cifar10") for name in names]
    models = ROOT / "models"
    names = "digits_resnet", "digits_mobilenet"
    return [(models / f"{name}.onnx", models / "digits_calib.npz", None) for name in names]


def _compare(
    model: Path, samples: Path, preprocess: str | None, device: str, count: int
) -> bool:
    """Whether 4-bit weights from ``device`` are as good as the CPU's, on held-out samples."""
    found = {}
    for where in ("cpu", device):
        begin = time.perf_counter()
        result = quantize(
            model, samples, weight_bits=4, samples=count, device=where, preprocess=preprocess
        )
        found[where] = _sqnr(result), time.perf_counter() - begin
    (near, cpu_s), (far, far_s) = found["cpu"], found[device]
    good = far >= near - TOLERANCE_DB
    print(f"{'ok' if good else 'WORSE'}: {model.stem}, W4A8, {count} samples: CPU {near:.2f} dB in "
          f"{cpu_s:.1f} s, {device} {far:.2f} dB in {far_s:.1f} s")  # fmt: skip
    return good


def _sqnr(result: QuantizeResult) -> float:
    assert result.verification is not None
    return float(result.verification.outputs[0].sqnr_db)


def _measure(model: Path, samples: Path, device: str, out: Path) -> None:
    """Seconds of each stage with all images."""
    begin = time.perf_counter()
    result = quantize(model, samples, weight_bits=4, samples=IMAGES, device=device)
    total = time.perf_counter() - begin
    stages = {stage: round(seconds, 2) for stage, seconds in result.seconds.items()}
    (out / "stages.json").write_text(json.dumps({"total": round(total, 2), **stages}, indent=1))
    told = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items())
    print(f"{model.stem}, W4A8, up to {IMAGES} images on {device}: {total:.1f} s (goal of a "
          f"ResNet-18 on a GPU: {GOAL_SECONDS} s), {_sqnr(result):.2f} dB; {told}")  # fmt: skip
    if device == "cuda":
        print(f"peak of PyTorch's memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def _profile(model: Path, samples: Path, device: str, out: Path, count: int) -> None:
    """The functions and kernels that take most time, in a second run with fewer images."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    functions = cProfile.Profile()
    with torch.profiler.profile(activities=activities) as kernels:
        functions.runcall(
            quantize, model, samples, weight_bits=4, samples=count, device=device
        )
    by = f"self_{device}_time_total"
    (out / "kernels.txt").write_text(kernels.key_averages().table(sort_by=by, row_limit=25))
    with (out / "functions.txt").open("w") as file:
        pstats.Stats(functions, stream=file).sort_stats("tottime").print_stats(40)
    print(f"most time with {count} images, by function and by operator of PyTorch:")
    for path in ("functions.txt", "kernels.txt"):
        lines = [line for line in (out / path).read_text().splitlines() if line.strip()]
        print("\n".join(line[:110] for line in lines[:16]))


if __name__ == "__main__":
    sys.exit(main())
