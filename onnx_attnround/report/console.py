"""The record of a run as tables and lines, for people at a console."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from onnx_attnround.check import Checked, Fusion
from onnx_attnround.records import BitAllocation, LayerPlan, QuantPlan
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.result import Point, QuantizeResult
from onnx_attnround.verify import (
    Accuracy,
    Basis,
    Latency,
    OutputComparison,
    Verification,
    slice_name,
)

_BASES: Mapping[Basis, str] = {
    "evaluation": "samples",
    "held out": "held-out samples",
    "calibration": "samples it was fitted to",
}
TOLD_FROZEN = 0.01  # share from which on they are told on the console
_FEW = 5  # names that are listed before the rest is counted


def console(result: QuantizeResult, *, output: Path | None, verbose: bool) -> RenderableType:
    """What the command line prints: the comparison, notes, and where the output is.

    ``verbose`` adds a table of the layers.
    """
    parts: list[RenderableType] = []
    if verbose:
        parts.append(_layer_table(result))
    if result.verification is not None:
        elsewhere = result.plan.target.name != "ort"
        parts.append(_comparison(result.verification, elsewhere=elsewhere))
    parts += _fusion_lines(result.checked.fusion, result.plan.skipped)
    parts += _finding_lines(result.checked)
    parts += _exactness_line(result.checked)
    if result.plan.target.runtime == "onnxruntime":
        parts += _release_line(result.checked)
    if result.verification is not None and result.verification.not_compared:
        parts.append(f"not compared with float: {_named(result.verification.not_compared)}")
    if result.plan.layers:
        parts.append(_bits(result))
    parts += [f"note: {note}" for note in result.notes]
    parts += _warnings(result.verification)
    if output is not None:
        parts.append(f"wrote {output}")
    return Group(*parts)


def check_console(checked: Checked) -> RenderableType:
    """What ``--check`` prints: the findings, what runs in integer, and whether it is sound."""
    rows = [
        (found.node, "refused" if found.refused else "note", found.rule, found.why)
        for found in checked.findings
    ]
    parts: list[RenderableType] = [Rows(("node", "", "rule", "because"), rows)] if rows else []
    if checked.refused and not checked.ran:
        parts.append(f"no layer runs: target '{checked.target}' refuses the file")
    else:
        parts += _fusion_lines(checked.fusion, {})
        parts += _exactness_line(checked)
        parts += _release_line(checked)
    if not checked.refused and not checked.ran:
        parts.append("not run: the runtime is not here, or shapes are unknown (give `calibration`)")
    if not checked.findings:
        parts.append(f"no rule of target '{checked.target}' is broken")
    return Group(*parts)


def points_table(points: Sequence[Point], *, verbose: bool) -> RenderableType:
    """What the command line prints of a trade-off: a row for each point, ``*`` on the front.

    ``verbose`` puts what a run of its own would print before it.
    """
    headers = "mean bits", "bytes", "SQNR", "agreement", "top-1", "speed"
    found = points[0].verification
    top1 = "" if found.accuracy is None else f"{found.accuracy.float_top1:.2%}"
    plain = ["float", f"{found.float_bytes:,}", "", "", top1, "", "", ""]
    table = Rows(
        (*(f">{name}" for name in headers), "front", "file"),
        [plain, *(_point_cells(point) for point in points)],
    )
    runs = [
        console(point.result, output=point.output, verbose=True) for point in points if verbose
    ]
    warnings = [
        Text(f"{point.config.mean_bits:g} mean bits: ") + warning
        for point in points
        for warning in _warnings(point.verification)
    ]
    return Group(*runs, table, *_notes_of_all(points), *warnings)


def _notes_of_all(points: Sequence[Point]) -> Iterable[str]:
    """The notes of all points, each once, with the mean bits where not all have it."""
    holders: dict[str, list[str]] = {}
    for point in points:
        for note in point.result.notes:
            holders.setdefault(note, []).append(f"{point.config.mean_bits:g}")
    for note, means in holders.items():
        some = f" (mean bits {', '.join(means)})" if len(means) < len(points) else ""
        yield f"note{some}: {note}"


def _point_cells(point: Point) -> list[str]:
    found = point.verification
    worst, accuracy = found.worst_output, found.accuracy
    agreements = [output.agreement for output in found.outputs if output.agreement is not None]
    return [
        f"{point.config.mean_bits:g}",
        f"{point.size:,}",
        "" if worst is None else f"{worst.sqnr_db:.2f} dB",
        f"{min(agreements):.2%}" if agreements else "",
        "" if accuracy is None else f"{accuracy.quantised_top1:.2%}",
        f"{found.latency.speedup:.2f}x",
        "*" if point.on_front else "",
        "gate missed" if point.missed else str(point.output or ""),
    ]


def plan_tables(plan: QuantPlan, allocation: BitAllocation) -> RenderableType:
    """What ``--dry-run`` prints: the layers with their bits, and what stays float and why."""
    layers = Rows(
        ("layer", "op", ">shape", ">weights", ">MACs", ">bits"),
        [_plan_cells(layer, allocation) for layer in plan.layers],
    )
    weights = sum(layer.parameters for layer in plan.layers)
    summary = (
        f"layers: {len(plan.layers)}, weights: {weights:,}, "
        f"mean bits (first, last and layer_bits left out): {_mean_bits(plan, allocation)}, "
        f"nodes left in float: {len(plan.skipped)}"
    )
    notes = [(plan.skipped, "stays in float"), (plan.unblocked, "no blocks of scales")]
    tables = [Rows((what, "because"), list(why.items())) for why, what in notes if why]
    return Group(layers, *tables, summary)


def _mean_bits(plan: QuantPlan, allocation: BitAllocation) -> str:
    """The mean, or why there is none."""
    if len(allocation.bits) < len(plan.layers):
        return "known after a run, which measures the layers"
    return "none" if math.isnan(allocation.mean_bits) else f"{allocation.mean_bits:.2f}"


def _bits(result: QuantizeResult) -> str:
    """The bits of all layers in one line; those of scales too where blocks have their own."""
    layers, mean = result.plan.layers, result.bits_per_weight
    bits = Counter(result.allocation.bits[layer.node] for layer in layers)
    counts = ", ".join(f"{count} at {b}" for b, count in sorted(bits.items()))
    roundings = result.roundings.values()
    if any(rounding.spec.block_size for rounding in roundings):
        weights = sum(layer.parameters for layer in layers)
        scales = 32 * sum(rounding.scale.size for rounding in roundings) / weights
        counts = f"{counts}; {mean + scales:.2f} bits with the scales"
    return f"{mean:.2f} bits per weight; layers by bits: {counts}"


def _plan_cells(layer: LayerPlan, allocation: BitAllocation) -> list[str]:
    return [
        layer.node,
        layer.op_type,
        "x".join(map(str, layer.weight_shape)),
        f"{layer.parameters:,}",
        "?" if layer.macs is None else f"{layer.macs:,}",
        _bits_of(layer, allocation),
    ]


def _bits_of(layer: LayerPlan, allocation: BitAllocation) -> str:
    """The bits, and the range of the codes where it is less than they allow."""
    bits = allocation.bits.get(layer.node)
    if bits is None:
        return "-"
    spec = layer.spec_of(bits)
    return str(bits) if spec.qmax == (1 << (bits - 1)) - 1 else f"{bits} (±{spec.qmax})"


def _layer_table(result: QuantizeResult) -> Rows:
    numbers = ("shape", "weights", "MACs", "bits", "nearest", "learned", "moved", "SQNR")
    return Rows(
        ("layer", "op", *(f">{name}" for name in numbers)),
        [_layer_cells(result, layer) for layer in result.plan.layers],
    )


def _layer_cells(result: QuantizeResult, layer: LayerPlan) -> list[str]:
    found = result.roundings.get(layer.node)
    sqnr = result.verification and result.verification.layer_sqnr.get(layer.node)
    return [
        *_plan_cells(layer, result.allocation),
        "" if found is None else f"{found.mse_nearest:.2e}",
        "" if found is None else f"{found.mse_final:.2e}",
        "" if found is None else f"{found.changed:.1%}",
        "" if sqnr is None else f"{sqnr:.1f} dB",
    ]


def _comparison(verification: Verification, *, elsewhere: bool) -> Rows:
    rows = [] if verification.accuracy is None else [_accuracy_cells(verification.accuracy)]
    for output in verification.outputs:
        told = f"{verification.samples} {_BASES[verification.basis]}"
        rows += _output_cells(output, told)
    rows.append([
        "size",
        _size(verification.float_bytes),
        _size(verification.quantised_bytes),
        _times(verification.float_bytes / verification.quantised_bytes),
    ])  # fmt: skip
    where = " in ONNX Runtime here" if elsewhere else ""
    rows.append(_latency_cells(verification.latency, where))
    return Rows(("", ">float", ">quantised", ">change"), rows)


def _accuracy_cells(accuracy: Accuracy) -> list[str]:
    return [
        f"top-1 ({accuracy.samples} samples)",
        f"{accuracy.float_top1:.2%}",
        f"{accuracy.quantised_top1:.2%}",
        f"{0.0 - accuracy.drop_points:+.2f} points",
    ]


def _output_cells(output: OutputComparison, samples: str) -> Iterable[list[str]]:
    if output.agreement is not None:
        kind = "values equal" if output.sqnr_db is None else "top-1 agrees"
        yield [f"{output.name}: {kind}", "", "", f"{output.agreement:.2%}"]
    if output.sqnr_db is not None:
        yield [f"{output.name}: SQNR ({samples})", "", "", _decibels(output.sqnr_db)]
    if (worst := output.worst_slice) is not None and math.isfinite(worst.sqnr_db):
        row = f"{output.name}: SQNR of {slice_name(worst)}, the worst"
        yield [row, "", "", _decibels(worst.sqnr_db)]
    if (lost := output.lost_extreme) is not None:
        ends = f"{lost.expected:.3g}", f"{lost.got:.3g}", f"{lost.kept:.0%} kept"
        yield [f"{output.name}: extreme of {slice_name(lost)}", *ends]
    if output.frozen is not None and output.frozen >= TOLD_FROZEN:
        row = f"{output.name}: elements that no longer vary"
        yield [row, "", "", f"{output.frozen:.0%}"]
    yield [f"{output.name}: largest error", "", "", f"{output.max_abs_error:.3g}"]


def _decibels(sqnr: float) -> str:
    return f"{sqnr:.2f} dB" if math.isfinite(sqnr) else "exact"


def _warnings(verification: Verification | None) -> list[Text]:
    """What nobody should miss: outputs that are of no use."""
    phrases = [] if verification is None else verification.collapsed
    return [Text(f"warning: {phrase}", style="bold red") for phrase in phrases]


def _latency_cells(latency: Latency, where: str) -> list[str]:
    low, high = latency.spread
    return [
        f"latency{where} (batch {latency.batch}, 1 thread)",
        f"{latency.float_ms:.2f} ms",
        f"{latency.quantised_ms:.2f} ms",
        f"{latency.speedup:.2f}x as fast ({low:.2f} to {high:.2f})",
    ]


def _size(count: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _times(shrunk: float) -> str:
    """By how much a file of a ``shrunk``-th of the bytes is smaller, or larger."""
    return f"{shrunk:.2f}x smaller" if shrunk >= 1 else f"{1 / shrunk:.2f}x larger"


def _fusion_lines(fusion: Fusion, skipped: Mapping[str, str]) -> Iterable[str]:
    """How many layers run in integer, and a line for each reason why others do not.

    So does what was ``skipped``, which need not count among the layers, for the reason of the plan.
    """
    total = len(fusion.macs)
    where = "in" if fusion.measured else "by the rules of"
    if fusion.weight_only:
        kernels = Counter(fusion.weight_only.values()).most_common()
        told = ", ".join(f"{count} by {kernel}" for kernel, count in kernels)
        yield (
            f"{len(fusion.weight_only)} of {total} layers have low-bit weights and float inputs "
            f"{where} {fusion.runtime}: {told}"
        )
    if fusion.integer or fusion.fallen:
        known = fusion.integer_share is not None
        share = f", {fusion.integer_share:.1%} of their MACs" if known else ""
        done = len(fusion.integer)
        yield f"{done} of {total} layers run in integer {where} {fusion.runtime}{share}"
    reasons: dict[str, list[str]] = {}
    for node, why in {**fusion.fallen, **skipped}.items():
        reasons.setdefault(why, []).append(node)
    for why, nodes in reasons.items():
        yield f"in float, {why}: {_named(tuple(nodes))}"


def _finding_lines(checked: Checked) -> Iterable[str]:
    for found in checked.findings[:_FEW]:
        yield f"check: {found.node}: {found.why} [{found.rule}]"
    if (more := len(checked.findings) - _FEW) > 0:
        yield f"check: {more} more, all in the report"


def _exactness_line(checked: Checked) -> Iterable[str]:
    if checked.fits_int16:
        yield "sums in integer are exact on CPUs with and without VNNI"


def _release_line(checked: Checked) -> Iterable[str]:
    if checked.oldest_onnxruntime is not None:
        yield f"loads in ONNX Runtime {checked.oldest_onnxruntime} or newer"


def _named(names: tuple[str, ...]) -> str:
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")
