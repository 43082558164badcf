"""What a run hands over: the model, what was measured of it, and how it shows itself."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_attnround.calibrate import Calibration
from onnx_attnround.check import Checked
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import save
from onnx_attnround.records import BitAllocation, BlockRounding, LayerRounding, QuantPlan
from onnx_attnround.verify import Advice, PairComparison, Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One of the files that were made on the way to a goal, and what was measured of it.

    ``mean_bits`` is the mean over all weights, ``size`` is in bytes, ``told`` the figure of the
    goal in words. ``in_float`` counts activations that stay float where others are rounded.
    The file that was written is the one ``kept``.
    """

    act_bits: int
    in_float: int = 0
    mean_bits: float
    size: int
    speedup: float
    told: str
    reached: bool
    kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalSearch:
    """How a goal was looked for; ``missed`` says by how much no file reached it."""

    goal: str
    trials: tuple[Trial, ...]
    missed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QuantizeResult:
    """What a run made and measured.

    ``ranges`` are those of the activations, as written. ``roundings`` are keyed by node name;
    ``blocks`` is empty without block reconstruction. ``fitted`` counts the samples that
    something was fitted to.
    ``source`` is the file of the float model, ``None`` for one in memory. ``search`` tells
    how the goal ``until`` was looked for; ``config`` is then the one that makes this very file.
    ``advice`` tells what would help where a gate was missed or an output has collapsed.
    """

    model: ir.Model
    config: QuantConfig
    plan: QuantPlan
    fitted: int
    ranges: Calibration
    allocation: BitAllocation
    roundings: Mapping[str, LayerRounding]
    blocks: tuple[BlockRounding, ...]
    checked: Checked
    verification: Verification | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    source: Path | None = None
    search: GoalSearch | None = None
    advice: Advice | None = None

    @property
    def bits_per_weight(self) -> float:
        """The mean over all weights of all layers; NaN where there are none."""
        weights = sum(layer.parameters for layer in self.plan.layers)
        bits = sum(self.allocation.bits[la.node] * la.parameters for la in self.plan.layers)
        return bits / weights if weights else math.nan

    def save(self, path: Path | str) -> None:
        """Write the model to ``path``, complete or not at all; raises ``OutputError``."""
        save(self.model, Path(path), source=self.source)

    def summary(self, *, verbose: bool = False, width: int = 100) -> str:
        """The lines that the command line prints, ``width`` columns wide.

        ``verbose`` adds a table of the layers.
        """
        from onnx_attnround.report.console import console
        from onnx_attnround.report.layout import plain_text

        return plain_text(console(self, output=None, verbose=verbose), width)

    def write_report(self, path: Path | str) -> None:
        """Write the report in the form that the name asks for: .json, .html, .md or .xml.

        It is written complete or not at all. Raises ``ConfigError`` for another ending and
        ``OutputError`` where it cannot be written.
        """
        from onnx_attnround.report.forms import write_report

        write_report(Path(path), self)

    def _repr_html_(self) -> str:
        """The summary, as notebooks show it."""
        return f"<pre>{html.escape(self.summary())}</pre>"

    def __repr__(self) -> str:
        fusion, found = self.checked.fusion, self.verification
        parts = [
            f"{len(self.plan.layers)} layers at {self.bits_per_weight:.2f} bits per weight",
            f"{len(fusion.integer)} of {len(fusion.macs)} in integer",
        ]
        if found is not None:
            parts.append(f"{found.quantised_bytes:,} bytes of {found.float_bytes:,}")
            if (worst := found.worst_output) is not None:
                parts.append(f"SQNR {worst.sqnr_db:.2f} dB")
        return f"<QuantizeResult: {', '.join(parts)}>"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Compared:
    """A quantised file of any make beside its float model; ``names`` are those of the two."""

    names: tuple[str, str]
    found: PairComparison
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    def summary(self, *, verbose: bool = False, width: int = 100) -> str:
        """The lines that the command line prints; ``verbose`` adds a table of the layers."""
        from onnx_attnround.report.console import compared_console
        from onnx_attnround.report.layout import plain_text

        return plain_text(compared_console(self, verbose=verbose), width)

    def write_report(self, path: Path | str) -> None:
        """Write the report in the form that the name asks for, as that of a run."""
        from onnx_attnround.report.forms import write_report

        write_report(Path(path), self)

    def __repr__(self) -> str:
        first = self.found.first
        parts = "do not part" if first is None else f"part at {first.node}"
        return f"<Compared: {' and '.join(self.names)} {parts}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One of several models that a trade-off compares.

    ``output`` is its file, ``None`` if none was asked for or a gate was missed;
    ``missed`` names such gates. ``verification`` is that of the result.
    ``on_front`` says that no other point is as small and as accurate, and better
    in one of the two.
    """

    result: QuantizeResult
    verification: Verification
    output: Path | None
    missed: str
    on_front: bool = False

    @property
    def config(self) -> QuantConfig:
        """The settings of its run."""
        return self.result.config

    @property
    def size(self) -> int:
        """Bytes of the model as a file."""
        return self.verification.quantised_bytes

    @property
    def quality(self) -> float:
        """Top-1 where there were labels, else SQNR of the worst output, else agreement."""
        if self.verification.accuracy is not None:
            return self.verification.accuracy.quantised_top1
        worst = self.verification.worst_output
        if worst is not None and worst.sqnr_db is not None:
            return worst.sqnr_db
        return min((output.agreement or 0.0 for output in self.verification.outputs), default=0.0)
