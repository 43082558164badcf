"""The samples that come with a model: for calibration, for evaluation, and their labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError
from onnx_attnround.plan.bits import measures
from onnx_attnround.records import Array
from onnx_attnround.samples import Samples, keys_of, open_samples
from onnx_attnround.samples.holdout import hold_out
from onnx_attnround.samples.preprocess import Preprocess, Transform
from onnx_attnround.verify import Basis

LEAST_BESIDE = 16
"""The fewest samples beside a model that are used unasked: a zoo puts one there, too few."""

_T = TypeVar("_T")


def open_calibration(
    source: Path | None,
    calibration: object,
    model: ir.Model,
    preprocess: Preprocess | str | Transform | None,
    config: QuantConfig,
    notes: list[str],
) -> Samples | None:
    """The samples given, or those beside the model at ``source``; ``None`` with a note."""
    specs = graph.input_specs(model)
    samples = None
    if calibration is not None:
        samples = open_samples(calibration, specs, limit=config.samples, preprocess=preprocess)
    elif source is not None and any(source.parent.glob("test_data_set_*")):
        samples = open_samples(source.parent, specs, limit=config.samples, preprocess=preprocess)
        found = f"the test_data_set_* beside '{source.name}'"
        if samples.count >= LEAST_BESIDE:
            notes.append(f"calibrating with {found}")
        else:
            notes.append(f"not calibrating with {found}: {samples.count} samples are too few")
            samples = None
    if samples is None:
        notes.append(
            "no calibration samples: weights are rounded to nearest, activations stay float; "
            "give `calibration` for learned rounding and integer activations"
        )
        return None
    return samples


def open_evaluation(
    evaluation: object,
    model: ir.Model,
    preprocess: Preprocess | str | Transform | None,
    notes: list[str],
) -> tuple[Samples | None, Array | None]:
    """The samples to verify on and their labels, where there are any; a note of arrays unread."""
    if evaluation is None:
        return None, None
    specs = graph.input_specs(model)
    samples = open_samples(evaluation, specs, preprocess=preprocess)
    labels = samples.labels()
    read = {"images", *(spec.name for spec in specs)}
    if labels is None and (unread := [f"'{k}'" for k in keys_of(evaluation) if k not in read]):
        what = "evaluation" if isinstance(evaluation, Mapping) else f"'{evaluation}'"
        notes.append(f"no top-1: {what} has no 'labels'; not read: {', '.join(unread)}")
    return samples, labels


def comparable(measured: _T | None) -> _T:
    """What several models are compared by; raises ``CalibrationError`` if there are no samples."""
    if measured is None:
        raise CalibrationError(
            "several mean bits are compared, but there are no samples to compare them on: give "
            "`calibration` or `evaluation`"
        )
    return measured


def keep_apart(
    samples: Samples | None, evaluation: Samples | None, config: QuantConfig, notes: list[str]
) -> tuple[Samples | None, Samples | None, Basis]:
    """The samples to fit to, those to measure on if they are others, and what these are.

    Without ``evaluation``, some of ``samples`` are kept apart for it: see :func:`hold_out`.
    """
    if evaluation is not None:
        if samples is not None and config.holdout:
            notes.append("option `holdout` has no effect: there are samples to verify on")
        return samples, evaluation, "evaluation"
    if samples is None:
        return None, None, "evaluation"
    fitted, apart = hold_out(samples, config.holdout)
    if apart is None and config.holdout != 0:
        notes.append(
            f"{samples.count} calibration samples are too few to keep some apart: figures are "
            "measured on what ranges and weights were fitted to, and flatter; give some hundred"
        )
    return fitted, apart, "calibration" if apart is None else "held out"


def check_samples(config: QuantConfig, samples: Samples | None, held_out: Samples | None) -> None:
    """Raise ``CalibrationError`` if a gate or the allocator wants samples that are not there."""
    gated = config.strict or config.min_sqnr is not None or config.max_drop is not None
    if gated and samples is None and held_out is None:
        raise CalibrationError(
            "a gate is set, but there are no samples to judge it on: give `calibration` or "
            "`evaluation`"
        )
    if samples is None and measures(config):
        raise CalibrationError(
            f"allocator '{config.allocator}' measures the layers, but there are no calibration "
            "samples: give `calibration`, or choose `allocator` coding-length"
        )
