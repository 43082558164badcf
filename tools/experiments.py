"""What was tried: rounding variants on the layer objective, and ways to choose the bits.

    python tools/experiments.py rounding   MODEL.onnx --calib CALIB [--preprocess P] [--bits 4,2]
    python tools/experiments.py allocation MODEL.onnx --calib CALIB [--preprocess P] [--bits 4,3]

Prints Markdown tables. Only calibration samples are used, so that nothing is chosen on test data.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from onnx_attnround import QuantConfig, graph, quantize
from onnx_attnround.context import Run
from onnx_attnround.pipeline import finish, prepare
from onnx_attnround.pipeline.prepared import Loaded, Prepared
from onnx_attnround.plan import bits as allocation
from onnx_attnround.reconstruct import sensitivity
from onnx_attnround.records import LayerErrors, LayerPlan
from onnx_attnround.report.result import QuantizeResult
from onnx_attnround.rounding import methods
from onnx_attnround.rounding.methods import attention_codes, descend
from onnx_attnround.rounding.objective import Objective, refit_scale
from onnx_attnround.samples import open_samples
from onnx_attnround.samples.preprocess import load_preprocess

Pair = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Run the experiment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["rounding", "allocation"])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--preprocess")
    parser.add_argument("--bits", default="4,2")
    parser.add_argument("--choices", default="2,3,4,5,6,8", help="widths of allocation")
    parser.add_argument("--seeds", default="0,1", help="of allocation: samples held back, rounding")
    options = parser.parse_args()
    for bits in map(float, options.bits.split(",")):
        {"rounding": compare_rounding, "allocation": compare_allocation}[options.experiment](
            options, bits
        )


def compare_rounding(options: argparse.Namespace, bits: float) -> None:
    """Mean over the layers of the error beyond the least-squares optimum, against nearest, in dB.

    Every variant sees the same problems: those that the default method meets on its walk.
    """
    gains, seconds = defaultdict(list), defaultdict(float)

    def recorder(
        problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
    ) -> Pair:
        optimum = problem.least_loss()
        nearest = (problem.loss(problem.nearest(scale), scale) - optimum).sum()
        for label, variant in _variants(problem, scale, steps):
            start = time.process_time()
            codes, final = variant()
            seconds[label] += time.process_time() - start
            excess = (problem.loss(codes, final) - optimum).sum()
            gains[label].append(10 * float(torch.log10(excess / nearest)))
        return methods.round_attention(problem, scale, steps, generator)

    methods.ROUNDERS["recorder"] = recorder
    settings = QuantConfig(weight_bits=int(bits)).model_copy(update={"method": "recorder"})
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    quantize(options.model, options.calib, settings, preprocess=preprocess)
    print(f"\n| {bits:g} bits | dB against nearest | CPU s, all layers |\n|---|---|---|")
    for label, values in gains.items():
        print(f"| {label} | {np.mean(values):.2f} | {seconds[label]:.2f} |")


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
        lambda: methods.round_adaround(problem, scale, steps, generator()),
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
    usual, methods.RESAMPLES = methods.RESAMPLES, draws
    solved = methods.round_attention(problem, scale, steps, torch.Generator().manual_seed(0))
    methods.RESAMPLES = usual
    return solved


def compare_allocation(options: argparse.Namespace, bits: float) -> None:
    """Output SQNR and agreement at the same mean bits, on samples held back from calibration."""
    rows: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    bounds: list[float] = []
    for seed in map(int, options.seeds.split(",")):
        usual = QuantConfig.parse({
            "mean_bits": bits,
            "bit_choices": options.choices.split(","),
            "allocator": "gram",
            "seed": seed,
        })
        _, prepared = prepare(Run(usual), _held_out(options, seed))
        bounds.append(_most_to_gain(prepared, usual))
        for label, config, errors in _allocations(usual, prepared):
            run = Run(config)
            rows[label].append(_figures(finish(run, replace(prepared, errors=errors), None)))
    print(f"\nMost that real-valued bits could gain over uniform ones: {np.mean(bounds):.1f} dB")
    print(f"\n| mean of {bits:g} bits | SQNR dB | agreement | bytes | bits of the layers |")
    print("|---|---|---|---|---|")
    for label, found in rows.items():
        sqnr, agreement, size = np.mean([row[:3] for row in found], axis=0)
        cells = label, f"{sqnr:.2f}", f"{agreement:.4f}", f"{size:.0f}", found[0][3]
        print("| " + " | ".join(cells) + " |", flush=True)


def _held_out(options: argparse.Namespace, seed: int) -> Loaded:
    """The model, three quarters of the samples to calibrate with, and the rest to judge on."""
    original = graph.load(Path(options.model))
    specs = graph.input_specs(original)
    preprocess = load_preprocess(options.preprocess) if options.preprocess else None
    batches = list(open_samples(options.calib, specs, preprocess=preprocess).batches(64))
    feeds = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    count = len(next(iter(feeds.values())))
    order = np.random.default_rng(seed).permutation(count)
    parts = np.split(order, [count * 3 // 4])
    samples, evaluation = (
        open_samples({name: values[part] for name, values in feeds.items()}, specs)
        for part in parts
    )
    return Loaded(
        source=None, original=original, samples=samples, evaluation=evaluation, labels=None
    )


def _allocations(
    usual: QuantConfig, prepared: Prepared
) -> Iterator[tuple[str, QuantConfig, LayerErrors | None]]:
    """Label, config and errors of each way to choose the bits."""

    def by(allocator: str) -> QuantConfig:
        return usual.model_copy(update={"allocator": allocator})

    if usual.mean_bits in usual.bit_choices:
        width = {"mean_bits": None, "weight_bits": int(usual.mean_bits)}
        yield "uniform", usual.model_copy(update=width), None
    yield "coding length (the default)", by("coding-length"), None
    allocation.ALLOCATORS.update({"clusters": _by_clusters, "size": _by_size})
    share, allocation.DISTORTION = allocation.DISTORTION, 4.0**-2
    yield "… with a distortion of 4⁻²", by("coding-length"), None
    allocation.DISTORTION = share
    yield "coding length in clusters", by("clusters"), None
    yield "size of the layer alone", by("size"), None
    yield "Gram error of the layer alone", usual, _without_reach(prepared, usual)
    yield "Gram error that reaches the outputs (gram)", usual, prepared.errors


def _most_to_gain(prepared: Prepared, config: QuantConfig) -> float:
    """In dB: the mean of the layers' errors per weight over their geometric mean.

    The least sum of errors under a budget of bits that may be any real numbers, where
    a bit quarters a layer's error: each layer's error is then in proportion to its size.
    """
    free = [layer for layer in prepared.plan.layers if not layer.first_or_last]
    sizes = np.array([layer.parameters for layer in free])
    width = min(config.bit_choices, key=lambda choice: abs(choice - 4))
    errors = np.array([(prepared.errors or {})[layer.node][width] for layer in free])
    shares = sizes / sizes.sum()
    gain = np.log10(errors.sum() / sizes.sum()) - shares @ np.log10(errors / sizes)
    return float(10 * gain)


def _without_reach(prepared: Prepared, config: QuantConfig) -> LayerErrors | None:
    """Errors of the layers' own outputs, as if all reached the model's alike."""
    reach, probe = sensitivity._Probe.error, sensitivity._Probe
    probe.error = lambda self, layer, rounding: rounding.mse_final  # type: ignore[method-assign]
    samples = prepared.given.samples
    if samples is None:
        raise SystemExit("no samples: nothing to measure")
    errors = sensitivity.layer_errors(
        prepared.simplified, prepared.plan, samples, Run(config)
    )
    probe.error = reach  # type: ignore[method-assign]
    return errors


def _by_size(
    layers: Sequence[LayerPlan], lengths: Mapping[str, float], errors: object, config: QuantConfig
) -> list[int]:
    """As if all layers were alike but for their size: the least sum of errors under a budget."""
    sizes = [layer.parameters for layer in layers]
    rates = [-0.5 * float(np.log2(size)) for size in sizes]
    return allocation.under_budget(rates, sizes, config.bit_choices, config.mean_bits or 0.0)


def _by_clusters(
    layers: Sequence[LayerPlan], lengths: Mapping[str, float], errors: object, config: QuantConfig
) -> list[int]:
    """Rates in up to three clusters, each with one width: those that use most of the budget."""
    count = min(3, len(config.bit_choices))
    rates = np.array([[lengths[layer.node]] for layer in layers])
    sizes = np.array([layer.parameters for layer in layers])
    found = KMeans(n_clusters=count, n_init=10, random_state=0).fit(rates)
    rank = found.cluster_centers_[:, 0].argsort().argsort()[found.labels_]
    widths = [np.array(chosen)[rank] for chosen in combinations(config.bit_choices, count)]
    within = [w for w in widths if w @ sizes <= (config.mean_bits or 0.0) * sizes.sum()]
    if not within:
        raise SystemExit("no widths of the clusters are within the budget")
    return [int(w) for w in max(within, key=lambda w: (w @ sizes, w.min()))]


def _figures(result: QuantizeResult) -> tuple[float, float, float, str]:
    if result.verification is None:
        raise SystemExit("nothing was verified: give calibration samples")
    (output, *_) = result.verification.outputs
    bits = "".join(map(str, result.allocation.bits.values()))
    return output.sqnr_db or 0.0, output.agreement or 0.0, result.verification.quantised_bytes, bits


if __name__ == "__main__":
    main()
