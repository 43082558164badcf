"""What 8-bit weights lose to int16 sums: a limit on every code, or on any two of a row together.

    python tools/pair_codes.py MODEL.onnx...

Prints, for each model, by how many dB the squared error of its weights, rounded to nearest at the
best of 40 scales a row, is below that of codes within -64 to 64: where any two codes of one sign
may add up to 128, and where all codes are allowed. Means over the layers; depthwise ones have no
limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.ops import is_depthwise, weight_matrix
from onnx_attnround.pipeline import make_plan
from onnx_attnround.records import Array
from onnx_attnround.simplify import simplify

LIMIT = 64  # of each code; of two codes of one sign 128
FACTORS = np.linspace(0.5, 1.15, 40)  # of the scale that just holds a row


def main() -> None:
    """Print a line for each model."""
    print("| model | layers | pairs within 128 | all codes |\n|---|---|---|---|")
    for path in sys.argv[1:]:
        gains = [_gains(rows) for rows in _matrices(path)]
        pairs, full = np.mean(gains, axis=0)
        print(f"| {path} | {len(gains)} | {pairs:.2f} dB | {full:.2f} dB |")


def _matrices(path: str) -> list[Array]:
    """The weights of each layer whose products are added in pairs, ``[outputs, inputs]``."""
    model, _ = simplify(graph.load(Path(path)))
    plan, _ = make_plan(path, QuantConfig())
    return [
        weight_matrix(layer, graph.tensor_value(model, layer.weight))[0].astype(np.float64)
        for layer in plan.layers
        if not is_depthwise(layer.op_type, layer.attributes, layer.weight_shape)
    ]


def _gains(rows: Array) -> tuple[float, float]:
    each, pairs, full = (
        _error(rows, _held(rows, kind), clip)
        for kind, clip in (("each", _within(LIMIT)), ("pairs", _pairwise), ("full", _within(127)))
    )
    return 10 * np.log10(each / pairs), 10 * np.log10(each / full)


def _held(rows: Array, kind: str) -> Array:
    """The scale of each row that just holds it."""
    up, down = (np.maximum(np.sort(side, axis=1)[:, -2:], 0) for side in (rows, -rows))
    peak = np.maximum(up[:, -1], down[:, -1])
    if kind != "pairs":
        return peak / (LIMIT if kind == "each" else 127)
    return np.maximum(np.maximum(up.sum(1), down.sum(1)) / (2 * LIMIT), peak / 127)


def _error(rows: Array, held: Array, clip: Callable[[Array], Array]) -> float:
    """The least squared error of each row over its scales, summed."""
    held = np.where(held > 0, held, 1.0)
    scales = [(held * factor)[:, None] for factor in FACTORS]
    errors = [np.square(scale * clip(np.rint(rows / scale)) - rows).sum(1) for scale in scales]
    return max(float(np.min(errors, axis=0).sum()), 1e-30)


def _within(limit: int) -> Callable[[Array], Array]:
    return lambda codes: np.clip(codes, -limit, limit)


def _pairwise(codes: Array) -> Array:
    """Codes of which no two of one sign add up to more than 128: the largest gives way first."""
    for sign in (1, -1):
        signed = sign * np.clip(codes, -127, 127)
        second = np.clip(np.sort(signed, axis=1)[:, -2:-1], 0, LIMIT)
        top = signed == signed.max(1, keepdims=True)
        first = top & (np.cumsum(top, axis=1) == 1)
        codes = sign * np.minimum(signed, np.where(first, 2 * LIMIT - second, LIMIT))
    return codes


if __name__ == "__main__":
    main()
