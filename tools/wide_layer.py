"""What it costs to round a layer on few patches of its input, and what a ridge makes up for.

    ATTNROUND_DATA=... python tools/wide_layer.py --patches 1536,512 --ridge 0.0001,0.03,0.1

A convolution of 2,304 inputs with random weights, behind two others, on CIFAR-10 images; 3 bits.
The error is that of the output on other images, relative to its variance.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from onnx_attnround.records import LayerPlan, QuantSpec
from onnx_attnround.rounding import moments
from onnx_attnround.rounding import objective as objectives
from onnx_attnround.rounding.methods import solve

OUTPUTS, INPUTS, TRAIN = 32, 256, 768
LAYER = LayerPlan(
    node="conv",
    op_type="Conv",
    x="x",
    y="y",
    weight="w",
    bias=None,
    weight_shape=(OUTPUTS, INPUTS, 3, 3),
    weight_spec=QuantSpec(bits=3, signed=True, symmetric=True, axis=0),
    attributes={"pads": [1] * 4},
)


def features(generator: torch.Generator) -> np.ndarray:
    """What two random convolutions make of the images."""
    path = Path(os.environ["ATTNROUND_DATA"]) / "cifar10" / "calib.npz"
    with np.load(path) as archive:
        images = next(archive[name] for name in archive.files if archive[name].ndim == 4)
    x = torch.from_numpy(images.astype(np.float32))
    x = x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    x = (x - x.mean()) / x.std()
    for channels in (64, INPUTS):
        weight = torch.randn(channels, x.shape[1], 3, 3, generator=generator)
        weight *= (2 / (9 * x.shape[1])) ** 0.5
        x = torch.relu(torch.nn.functional.conv2d(x, weight, stride=2, padding=1))
    return x.numpy()


def collect(weight: torch.Tensor, x: np.ndarray, v: np.ndarray) -> moments.Moments:
    """The moments of float inputs ``x`` and quantised ones ``v``."""
    parts = [slice(start, start + 32) for start in range(0, len(x), 32)]
    batches = [(torch.from_numpy(x[part]), torch.from_numpy(v[part])) for part in parts]
    return moments.collect(LAYER, weight, batches, len(x), None, centred=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", default="1536,512", help="0 for the Gram matrix of all")
    parser.add_argument("--ridge", default="0.0001,0.03,0.1")
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = features(generator)
    depth = 9 * INPUTS
    weight = torch.randn(1, OUTPUTS, depth, generator=generator) * (2 / depth) ** 0.5
    noise = np.random.default_rng(0).normal(size=x[:TRAIN].shape).astype(np.float32)
    v = x[:TRAIN] + noise * 0.02 * x[:TRAIN].std()
    unseen = collect(weight, x[TRAIN:], x[TRAIN:])
    floor = torch.full(weight.shape[:2], 1e-30)
    print("| patches | ridge | error, other images | s to collect | s to round |")
    print("|---|---|---|---|---|")
    for patches in map(int, given.patches.split(",")):
        moments.WIDE, moments.WIDE_PATCHES = (0, patches) if patches else (10**9, 0)
        start = time.process_time()
        seen = collect(weight, x[:TRAIN], v)
        collected = time.process_time()
        for ridge in map(float, given.ridge.split(",")):
            before = time.process_time()
            objectives.RIDGE = ridge
            problem = objectives.objective(weight, seen, LAYER.weight_spec, scale_floor=floor)
            solution = solve(problem, "attention", steps=50, seed=0)
            rounded = time.process_time() - before
            delta = solution.codes * solution.scale - weight
            error = (unseen.gram.times(delta) * delta).sum() / unseen.signal.sum()
            print(
                f"| {patches or 'all'} | {ridge:g} | {10 * np.log10(float(error)):.2f} dB "
                f"| {collected - start:.1f} | {rounded:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
