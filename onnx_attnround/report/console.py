"""The record of a run as tables and lines, for people at a console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from onnx_attnround.check import Checked
from onnx_attnround.records import BitAllocation, QuantPlan
from onnx_attnround.report import tables
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.result import Compared, Point, QuantizeResult
from onnx_attnround.report.sentences import (
    advice_line,
    bits_line,
    exactness_line,
    finding_lines,
    fusion_lines,
    mean_bits,
    named,
    notes_of_all,
    parting_lines,
    release_line,
)
from onnx_attnround.verify import Verification


def console(result: QuantizeResult, *, output: Path | None, verbose: bool) -> RenderableType:
    """What the command line prints: the comparison, notes, and where the output is.

    ``verbose`` adds a table of the layers.
    """
    parts: list[RenderableType] = []
    if verbose:
        parts.append(tables.layers(result))
    if result.search is not None:
        parts.append(tables.trials(result.search))
    if result.verification is not None:
        elsewhere = result.plan.target.name != "ort"
        parts.append(tables.comparison(result.verification, elsewhere=elsewhere))
    parts += fusion_lines(result.checked.fusion, result.plan.skipped)
    parts += finding_lines(result.checked)
    parts += exactness_line(result.checked)
    if result.plan.target.runtime == "onnxruntime":
        parts += release_line(result.checked)
    if result.verification is not None and result.verification.not_compared:
        parts.append(f"not compared with float: {named(result.verification.not_compared)}")
    if result.plan.layers:
        parts.append(bits_line(result))
    parts += [f"note: {note}" for note in result.notes]
    parts += _warnings(result.verification)
    if result.advice is not None:
        parts += [advice_line(result.advice), "", result.advice.block]
    if output is not None:
        parts.append(f"wrote {output}")
    return Group(*parts)


def check_console(checked: Checked) -> RenderableType:
    """What check prints: the findings, what runs in integer, and whether it is sound."""
    parts: list[RenderableType] = [tables.findings(checked)] if checked.findings else []
    if checked.refused and not checked.ran:
        parts.append(f"no layer runs: target '{checked.target}' refuses the file")
    else:
        parts += fusion_lines(checked.fusion, {})
        parts += exactness_line(checked)
        parts += release_line(checked)
    if not checked.refused and not checked.ran:
        parts.append("not run: the runtime is not here, or shapes are unknown (give `calibration`)")
    if not checked.findings:
        parts.append(f"no rule of target '{checked.target}' is broken")
    return Group(*parts)


def compared_console(compared: Compared, *, verbose: bool) -> RenderableType:
    """What ``compare`` prints: outputs, size and speed, and where the two models part."""
    found = compared.found
    parts: list[RenderableType] = [tables.layer_pairs(found)] if verbose and found.layers else []
    parts.append(tables.comparison(found.verification, elsewhere=False))
    if found.layers:
        parts += parting_lines(found)
    if found.alone:
        parts.append(f"layers without a partner in the other model: {named(found.alone)}")
    parts += [f"note: {note}" for note in compared.notes]
    parts += _warnings(found.verification)
    return Group(*parts)


def points_table(points: Sequence[Point], *, verbose: bool) -> RenderableType:
    """What the command line prints of a trade-off: a row for each point, ``*`` on the front.

    ``verbose`` puts what a run of its own would print before it.
    """
    runs = [
        console(point.result, output=point.output, verbose=True) for point in points if verbose
    ]
    warnings = [
        Text(f"{point.config.mean_bits:g} mean bits: ") + warning
        for point in points
        for warning in _warnings(point.verification)
    ]
    notes = [f"note{some}: {note}" for note, some in notes_of_all(points)]
    return Group(*runs, tables.points(points), *notes, *warnings)


def plan_tables(plan: QuantPlan, allocation: BitAllocation) -> RenderableType:
    """What plan prints: the layers with their bits, and what stays float and why."""
    weights = sum(layer.parameters for layer in plan.layers)
    summary = (
        f"layers: {len(plan.layers)}, weights: {weights:,}, "
        f"mean bits (first, last and layer_bits left out): {mean_bits(plan, allocation)}, "
        f"nodes left in float: {len(plan.skipped)}"
    )
    if plan.dynamic:
        count = sum(layer.x in plan.dynamic for layer in plan.layers)
        summary += f", layers whose input has a range in each run: {count}"
    notes = [(plan.skipped, "stays in float"), (plan.unblocked, "no blocks of scales")]
    reasons = [Rows((what, "because"), list(why.items())) for why, what in notes if why]
    return Group(tables.plan(plan, allocation), *reasons, summary)


def _warnings(verification: Verification | None) -> list[Text]:
    """What nobody should miss: outputs that are of no use."""
    phrases = [] if verification is None else verification.collapsed
    return [Text(f"warning: {phrase}", style="bold red") for phrase in phrases]
