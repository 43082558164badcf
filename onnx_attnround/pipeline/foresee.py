"""What a run would say and refuse at its start, for a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.graph import check_output
from onnx_attnround.pipeline import load, path_of, planned
from onnx_attnround.pipeline.open_inputs import comparable
from onnx_attnround.pipeline.open_model import ModelSource, source_of
from onnx_attnround.samples.preprocess import Preprocess, Transform


def foresee(
    model: ModelSource,
    calibration: object = None,
    config: QuantConfig | Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[Path | str] = (),
    evaluation: object = None,
    preprocess: Preprocess | str | Transform | None = None,
    compared: bool = False,
) -> list[str]:
    """The notes that ``quantize`` begins with; raises what it refuses before anything slow.

    It takes what that takes, with the ``outputs`` of several models if those are to be
    ``compared``; it writes nothing.
    """
    config = QuantConfig.of(config).model_copy(update={"work_dir": None})  # load would make it
    run = Run(config)
    for output in outputs:
        check_output(path_of(output), source_of(model))
    given = load(run, model, calibration, evaluation, preprocess)
    if compared:
        comparable(given.judged_on)
    planned(run, given)
    return run.notes
