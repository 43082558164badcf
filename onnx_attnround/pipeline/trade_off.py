"""One model at several mean bits: what each costs in size, and what it keeps of accuracy.

Model and samples are read, activations calibrated and layers measured once; only
what depends on the bits of the layers is done for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.errors import ConfigError, GateError
from onnx_attnround.graph import check_output
from onnx_attnround.pipeline import finish, load, prepare
from onnx_attnround.pipeline.log import logged
from onnx_attnround.pipeline.open_inputs import comparable
from onnx_attnround.pipeline.open_model import ModelSource, source_of
from onnx_attnround.pipeline.prepared import Prepared
from onnx_attnround.records import OnEvent
from onnx_attnround.report.result import Point, QuantizeResult
from onnx_attnround.samples.preprocess import Preprocess, Transform
from onnx_attnround.verify import REMEDY, missed_gates


def trade_off(
    model: ModelSource,
    calibration: object = None,
    config: QuantConfig | Mapping[str, Any] | None = None,
    *,
    mean_bits: Sequence[float],
    output: Path | str | None = None,
    evaluation: object = None,
    preprocess: Preprocess | str | Transform | None = None,
    on_event: OnEvent = lambda event: None,
    **settings: Any,
) -> tuple[Point, ...]:
    """Do what ``quantize`` does for each of ``mean_bits``, sharing what they have in common.

    Each point has a file of its own (:func:`point_path`), which appears complete or
    not at all. Raises what ``quantize`` raises, and ``CalibrationError`` if there
    are no samples to compare the points on. A point that misses a gate leaves no
    file, the others are made all the same; then ``GateError`` names the gates, with
    all points as its ``result``.
    """
    configs = with_means(QuantConfig.of(config, **settings), mean_bits)
    source = source_of(model)
    outputs = [None if output is None else point_path(output, each) for each in configs]
    for path in filter(None, outputs):
        check_output(path, source)
    shared = Run(configs[0], logged(on_event))
    given = load(shared, model, calibration, evaluation, preprocess)
    comparable(given.judged_on)
    shared, prepared = prepare(shared, given)
    points = [
        _point(_with_mean(shared, each.mean_bits), prepared, path)
        for each, path in zip(configs, outputs, strict=True)
    ]
    points = [replace(point, on_front=_on_front(point, points)) for point in points]
    _check_gates(points)
    shared.checkpoint.remove()
    return tuple(points)


def point_path(output: Path | str, config: QuantConfig) -> Path:
    """The file of one point: with mean bits of 3.5, ``out.onnx`` becomes ``out.w3.5.onnx``."""
    path = Path(output)
    return path.with_name(f"{path.stem}.w{config.mean_bits:g}{path.suffix}")


def with_means(config: QuantConfig, mean_bits: Sequence[float]) -> list[QuantConfig]:
    """The config with each of the means; raises ``ConfigError`` for one out of range or repeated.

    Two that would have the same file name count as the same.
    """
    if isinstance(mean_bits, str) or not isinstance(mean_bits, Iterable):
        raise ConfigError(f"option `mean_bits`: got {mean_bits!r}, expected a list of numbers")
    configs = [QuantConfig.of(config, mean_bits=mean) for mean in mean_bits]
    names = [f"{each.mean_bits:g}" for each in configs]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ConfigError(f"option `mean_bits`: {name} is given twice: give each mean once")
    if not names:
        raise ConfigError("option `mean_bits`: got no value, expected at least one")
    return configs


def _with_mean(shared: Run, mean_bits: float | None) -> Run:
    config = shared.config.model_copy(update={"mean_bits": mean_bits})
    return shared.part(config, f"w{mean_bits:g}")


def _point(run: Run, prepared: Prepared, output: Path | None) -> Point:
    try:
        result = finish(run, prepared, output)
    except GateError as error:
        if not isinstance(error.result, QuantizeResult):
            raise
        result, output = error.result, None
    verification = comparable(result.verification)
    return Point(
        result=result,
        verification=verification,
        output=output,
        missed=missed_gates(verification, run.config),
    )


def _on_front(point: Point, points: Sequence[Point]) -> bool:
    """Whether no other point is as good in both size and quality, and better in one."""
    mine = (-point.size, point.quality)
    others = [(-other.size, other.quality) for other in points]
    return not any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others)


def _check_gates(points: Sequence[Point]) -> None:
    missed = "; ".join(
        f"with mean bits {point.config.mean_bits:g}, {point.missed}"
        for point in points
        if point.missed
    )
    if missed:
        error = GateError(f"gate missed: {missed}; {REMEDY}")
        error.result = tuple(points)
        raise error
