"""What every converted file must have in common with its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_attnround import QuantConfig, QuantizeResult, graph, quantize
from onnx_attnround.records import InputSpec

Feeds = dict[str, np.ndarray]


def random_samples(specs: Sequence[InputSpec], count: int = 4, free: int = 2) -> list[Feeds]:
    """Noise for each input; integers are 0 or 1, free dimensions ``free``."""
    rng = np.random.default_rng(0)

    def noise(spec: InputSpec) -> np.ndarray:
        shape = [size or free for size in spec.shape]
        values = rng.normal(size=shape) if spec.dtype.kind == "f" else rng.integers(0, 2, shape)
        return np.asarray(values).astype(spec.dtype)

    return [{spec.name: noise(spec) for spec in specs} for _ in range(count)]


def ends(model: ir.Model) -> list[tuple[str | None, object, str]]:
    """Names, types and dimensions of what the model is fed and gives."""
    given = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return [(v.name, v.dtype, str(v.shape)) for v in (*given, *model.graph.outputs)]


def convert(
    model: onnx.ModelProto | Path,
    folder: Path,
    samples: Sequence[Mapping[str, np.ndarray]] | None = None,
    *,
    sqnr: float = 25.0,
    **options: Any,
) -> QuantizeResult:
    """Quantise with few samples and check all that holds for any model.

    The file is valid and loads, ends keep names, types and dimensions, no layer is lost
    silently, and float outputs reach ``sqnr`` dB.
    """
    source, target = folder / "source.onnx", folder / "target.onnx"
    if isinstance(model, Path):
        source = model
    else:
        onnx.save(model, source)
    original = graph.load(source)
    feeds = samples or random_samples(graph.input_specs(original))
    config = QuantConfig.parse({"threads": 1, **options})
    result = quantize(source, list(feeds), config, output=target)
    onnx.checker.check_model(str(target), full_check=True)
    assert ends(graph.load(target)) == ends(original)
    assert result.verification is not None
    for output in result.verification.outputs:
        assert output.sqnr_db is None or output.sqnr_db >= sqnr, output
    return result


def layers(result: QuantizeResult) -> list[str]:
    """The op types of the layers that were quantised."""
    return [layer.op_type for layer in result.plan.layers]
