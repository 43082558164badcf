"""What was tried: rounding variants on the layer objective, and distortions of the allocator.

    python tools/experiments.py rounding   MODEL.onnx --calib CALIB [--preprocess P] [--bits 4,2]
    python tools/experiments.py allocation MODEL.onnx --calib CALIB [--preprocess P] [--bits 4,3]

Prints Markdown tables. Only calibration samples are used, so that nothing is chosen on test data.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from onnx_attnround import QuantConfig, allocate, quantize, rounding
from onnx_attnround.pipeline import QuantizeResult
from onnx_attnround.preprocess import load_preprocess
from onnx_attnround.rounding import Objective, attention_codes, descend, refit_scale

Pair = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Run the experiment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["rounding", "allocation"])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--preprocess")
    parser.add_argument("--bits", default="4,2")
    options = parser.parse_args()
    for bits in map(int, options.bits.split(",")):
        {"rounding": compare_rounding, "allocation": compare_allocation}[options.experiment](
            options, bits
        )


def _run(options: argparse.Namespace, **settings: Any) -> QuantizeResult:
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    return quantize(
        options.model, options.calib, QuantConfig.parse(settings), preprocess=preprocess
    )


def compare_rounding(options: argparse.Namespace, bits: int) -> None:
    """Mean over the layers of the error beyond the least-squares optimum, against nearest, in dB.

    Every variant sees the same problems: those that the default method meets on its walk.
    """
    gains, seconds = defaultdict(list), defaultdict(float)

    def recorder(
        problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
    ) -> Pair:
        optimum = _optimum(problem)
        nearest = (problem.loss(problem.nearest(scale), scale) - optimum).sum()
        for label, variant in _variants(problem, scale, steps):
            start = time.process_time()
            codes, final = variant()
            seconds[label] += time.process_time() - start
            excess = (problem.loss(codes, final) - optimum).sum()
            gains[label].append(10 * float(torch.log10(excess / nearest)))
        return rounding.round_attention(problem, scale, steps, generator)

    rounding.ROUNDERS["recorder"] = recorder
    settings = QuantConfig(weight_bits=bits).model_copy(update={"method": "recorder"})
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    quantize(options.model, options.calib, settings, preprocess=preprocess)
    print(f"\n| {bits} bits | dB against nearest | CPU s, all layers |\n|---|---|---|")
    for label, values in gains.items():
        print(f"| {label} | {np.mean(values):.2f} | {seconds[label]:.2f} |")


def _optimum(problem: Objective) -> torch.Tensor:
    """The loss of the best real-valued weight, ``[g, o]``."""
    best = torch.linalg.solve(problem.gram, problem.linear.transpose(1, 2)).transpose(1, 2)
    return problem.constant - (best * problem.linear).sum(-1)


def _variants(
    problem: Objective, scale: torch.Tensor, steps: int
) -> Iterator[tuple[str, Callable[[], Pair]]]:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def learned(count: int) -> torch.Tensor:
        return attention_codes(problem, scale, count, generator())

    nearest = problem.nearest(scale)
    yield "nearest", lambda: (nearest, scale)
    yield (
        f"AdaRound, {10 * steps} steps",
        lambda: rounding.round_adaround(problem, scale, steps, generator()),
    )
    yield "greedy descent from nearest", lambda: (descend(problem, nearest, scale), scale)
    yield f"Attention Round, {steps} steps", lambda: (learned(steps), scale)
    for count in (steps // 2, steps, 2 * steps):
        yield (
            f"Attention Round, {count} steps, then greedy descent",
            lambda count=count: (descend(problem, learned(count), scale), scale),
        )
    for times in (1, 3):
        yield (
            f"… and {times} refits of the scales",
            lambda times=times: _refitted(problem, scale, learned(steps), times),
        )
    for draws in (5, 20):
        yield (
            f"… and {draws} draws around it (20: the default)",
            lambda draws=draws: _resampled(problem, scale, steps, draws),
        )


def _refitted(problem: Objective, scale: torch.Tensor, codes: torch.Tensor, times: int) -> Pair:
    codes = descend(problem, codes, scale)
    for _ in range(times):
        scale = refit_scale(problem, codes, scale)
        codes = descend(problem, codes, scale)
    return codes, scale


def _resampled(problem: Objective, scale: torch.Tensor, steps: int, draws: int) -> Pair:
    usual, rounding.RESAMPLES = rounding.RESAMPLES, draws
    solved = rounding.round_attention(problem, scale, steps, torch.Generator().manual_seed(0))
    rounding.RESAMPLES = usual
    return solved


def compare_allocation(options: argparse.Namespace, bits: int) -> None:
    """Output SQNR and agreement at the same mean bits: uniform, and by coding length."""
    print(f"\n| mean of {bits} bits | SQNR dB | agreement | bits of the layers |")
    print("|---|---|---|---|")
    _print_allocation("uniform", _run(options, weight_bits=bits))
    usual = allocate.coding_length
    for share in (1, 0.25, 4.0**-2, 4.0**-3, 4.0**-4):
        factor = share / allocate.DISTORTION
        allocate.coding_length = lambda rows, distortion, f=factor: usual(rows, distortion * f)
        _print_allocation(
            f"coding length, distortion {share:.4g}", _run(options, mean_bits=float(bits))
        )
    allocate.coding_length = usual


def _print_allocation(label: str, result: QuantizeResult) -> None:
    if result.verification is None:
        raise SystemExit("nothing was verified: give calibration samples")
    output = result.verification.outputs[0]
    bits = "".join(map(str, result.allocation.bits.values()))
    print(f"| {label} | {output.sqnr_db:.2f} | {output.agreement:.4f} | {bits} |", flush=True)


if __name__ == "__main__":
    main()
