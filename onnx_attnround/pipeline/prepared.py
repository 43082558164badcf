"""The records that the stages of a run hand on: what was opened, and what is ready to round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_attnround.calibrate import Calibration
from onnx_attnround.records import Array, LayerErrors, QuantPlan
from onnx_attnround.samples import Samples
from onnx_attnround.verify import Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model, from ``source`` if that is a file, and the samples that came with it.

    ``samples`` are fitted to, ``evaluation`` measured on, and so are the former without it.
    """

    source: Path | None
    original: ir.Model
    samples: Samples | None
    evaluation: Samples | None
    labels: Array | None
    basis: Basis = "evaluation"

    @property
    def judged_on(self) -> Samples | None:
        """Samples that figures are measured on; what they are is told by ``basis``."""
        return self.evaluation or self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that does not depend on the bits of the layers.

    ``errors`` are those that the allocator goes by, if it goes by any. ``floats`` are the
    activations that were found to be better left in float.
    """

    given: Loaded
    simplified: ir.Model
    plan: QuantPlan
    ranges: Calibration
    errors: LayerErrors | None
    floats: tuple[str, ...] = ()
