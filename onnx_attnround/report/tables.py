"""The figures of a run as tables of text, which every form of the report shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from onnx_attnround.check import Checked
from onnx_attnround.records import BitAllocation, LayerPlan, QuantPlan
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.result import GoalSearch, Point, QuantizeResult, Trial
from onnx_attnround.verify import (
    Accuracy,
    Basis,
    KernelTime,
    Latency,
    LayerPair,
    OutputComparison,
    PairComparison,
    Verification,
    slice_name,
)

BASES: Mapping[Basis, str] = {
    "evaluation": "samples",
    "held out": "held-out samples",
    "calibration": "samples it was fitted to",
}
KERNELS = 10
"""The kinds of nodes whose time is told, those that take most."""

TOLD_FROZEN = 0.01
"""The share of values that no longer move from which on they are told."""


def comparison(verification: Verification, *, elsewhere: bool) -> Rows:
    """Float against quantised: top-1, outputs, size, speed here, though it is for ``elsewhere``."""
    rows = [] if verification.accuracy is None else [_accuracy_cells(verification.accuracy)]
    for output in verification.outputs:
        told = f"{verification.samples} {BASES[verification.basis]}"
        rows += _output_cells(output, told)
    rows.append([
        "size",
        size(verification.float_bytes),
        size(verification.quantised_bytes),
        times(verification.float_bytes / verification.quantised_bytes),
    ])  # fmt: skip
    where = " in ONNX Runtime here" if elsewhere else ""
    rows.append(_latency_cells(verification.latency, where))
    return Rows(("", ">float", ">quantised", ">change"), rows)


def outputs(verification: Verification) -> Rows:
    """A row for each output: what is left of it in all, and of the worst slice of each axis."""
    headers = "output", ">SQNR", ">worst slice", ">agrees", ">correlation", ">largest error", ""
    return Rows(headers, [_summary_cells(output) for output in verification.outputs])


def layers(result: QuantizeResult) -> Rows:
    """A row for each layer: how it was rounded, and what that did to its output."""
    numbers = ("shape", "weights", "MACs", "bits", "nearest", "learned", "moved", "SQNR")
    return Rows(
        ("layer", "op", *(f">{name}" for name in numbers)),
        [_layer_cells(result, layer) for layer in result.plan.layers],
    )


def layer_pairs(found: PairComparison) -> Rows:
    """A row for each layer that a file and its float model both have."""
    numbers = ("bits", "SQNR", "inherited", "own", "expected", "input")
    return Rows(
        ("layer", *(f">{name}" for name in numbers), ""),
        [_pair_cells(layer, layer is found.first) for layer in found.layers],
    )


def plan(plan: QuantPlan, allocation: BitAllocation) -> Rows:
    """A row for each layer, with its bits."""
    return Rows(
        ("layer", "op", ">shape", ">weights", ">MACs", ">bits"),
        [_plan_cells(layer, allocation) for layer in plan.layers],
    )


def findings(checked: Checked) -> Rows:
    """A row for each rule that a file breaks."""
    return Rows(
        ("node", "", "rule", "because"),
        [
            (found.node, "refused" if found.refused else "note", found.rule, found.why)
            for found in checked.findings
        ],
    )


def points(found: Sequence[Point]) -> Rows:
    """A row for the float model and for each point of a trade-off, ``*`` on the front."""
    headers = "mean bits", "bytes", "SQNR", "agreement", "top-1", "speed"
    first = found[0].verification
    top1 = "" if first.accuracy is None else f"{first.accuracy.float_top1:.2%}"
    plain = ["float", f"{first.float_bytes:,}", "", "", top1, "", "", ""]
    return Rows(
        (*(f">{name}" for name in headers), "front", "file"),
        [plain, *(_point_cells(point) for point in found)],
    )


def trials(search: GoalSearch) -> Rows:
    """A row for each file that was made on the way to a goal, ``*`` by the one that was kept."""
    return Rows(
        (">activations", ">mean bits", ">bytes", ">speed", search.goal, "", "kept"),
        [
            (
                _activations_told(trial),
                f"{trial.mean_bits:.2f}",
                f"{trial.size:,}",
                f"{trial.speedup:.2f}x",
                trial.told,
                "reached" if trial.reached else "missed",
                "*" if trial.kept else "",
            )
            for trial in search.trials
        ],
    )


def kernels(found: Verification) -> Rows:
    """A row for each kind of node that takes most of the time, in one run of each model."""
    first, rest = found.kernels[:KERNELS], found.kernels[KERNELS:]
    rows = [(each.op_type, each.float_ms, each.quantised_ms) for each in first]
    if rest:
        rows.append((f"{len(rest)} other{'s' if len(rest) > 1 else ''}", *_sums(rest)))
    rows.append(("all", *_sums(found.kernels)))
    return Rows(
        ("kind of node", ">float ms", ">quantised ms"),
        [(name, *("" if not ms else f"{ms:.3g}" for ms in times)) for name, *times in rows],
    )


def _sums(times: Sequence[KernelTime]) -> tuple[float, float]:
    return sum(each.float_ms for each in times), sum(each.quantised_ms for each in times)


def _activations_told(trial: Trial) -> str:
    if trial.act_bits == 32:
        return "float"
    apart = f", {trial.in_float} float" if trial.in_float else ""
    return f"{trial.act_bits} bits{apart}"


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
        told = decibels(output.sqnr_db, output.sqnr_error_db)
        yield [f"{output.name}: SQNR ({samples})", "", "", told]
    if (worst := output.worst_slice) is not None and math.isfinite(worst.sqnr_db):
        row = f"{output.name}: SQNR of {slice_name(worst)}, the worst"
        yield [row, "", "", decibels(worst.sqnr_db)]
    if (lost := output.lost_extreme) is not None:
        ends = f"{lost.expected:.3g}", f"{lost.got:.3g}", f"{lost.kept:.0%} kept"
        yield [f"{output.name}: extreme of {slice_name(lost)}", *ends]
    if output.frozen is not None and output.frozen >= TOLD_FROZEN:
        row = f"{output.name}: elements that no longer vary"
        yield [row, "", "", f"{output.frozen:.0%}"]
    yield [f"{output.name}: largest error", "", "", f"{output.max_abs_error:.3g}"]


def _latency_cells(latency: Latency, where: str) -> list[str]:
    low, high = latency.spread
    return [
        f"latency{where} (batch {latency.batch}, 1 thread)",
        f"{latency.float_ms:.2f} ms",
        f"{latency.quantised_ms:.2f} ms",
        f"{latency.speedup:.2f}x as fast ({low:.2f} to {high:.2f})",
    ]


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


def _pair_cells(layer: LayerPair, first: bool) -> list[str]:
    return [
        layer.node,
        "" if layer.bits is None else str(layer.bits),
        *pair_figures(layer).values(),
        "parts here first" if first else "parts" if layer.parts else "",
    ]


def pair_figures(layer: LayerPair) -> dict[str, str]:
    """The figures of a layer that two models have, as text."""
    added = {"own": layer.own_db, "expected": layer.expected_db}
    kept = {"sqnr": layer.sqnr_db, "inherited": layer.inherited_db, "input": layer.input_db}
    told = {
        name: "" if value is None else "none" if value == math.inf else short_decibels(value)
        for name, value in added.items()
    } | {name: "" if value is None else short_decibels(value) for name, value in kept.items()}
    return {name: told[name] for name in ("sqnr", "inherited", "own", "expected", "input")}


def _summary_cells(output: OutputComparison) -> list[str]:
    worst, lost = output.worst_slice, output.lost_extreme
    remarks = []
    if lost is not None:
        remarks.append(f"extreme of {slice_name(lost)} {lost.expected:.3g}, got {lost.got:.3g}")
    if output.frozen is not None and output.frozen >= TOLD_FROZEN:
        remarks.append(f"{output.frozen:.0%} of its elements no longer vary")
    finite = worst is not None and math.isfinite(worst.sqnr_db)
    return [
        output.name,
        "" if output.sqnr_db is None else decibels(output.sqnr_db),
        f"{worst.sqnr_db:.2f} dB, {slice_name(worst)}" if worst is not None and finite else "",
        "" if output.agreement is None else f"{output.agreement:.2%}",
        "" if output.correlation is None else f"{output.correlation:.4f}",
        f"{output.max_abs_error:.3g}",
        "; ".join(remarks),
    ]


def decibels(sqnr: float, error: float | None = None) -> str:
    """An SQNR for people, with its standard ``error``."""
    uncertain = "" if error is None else f" ± {error:.2f}"
    return f"{sqnr:.2f}{uncertain} dB" if math.isfinite(sqnr) else "exact"


def short_decibels(sqnr: float) -> str:
    """An SQNR in a row of many."""
    return f"{sqnr:.1f} dB" if math.isfinite(sqnr) else "exact" if sqnr > 0 else "nothing left"


def size(count: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def times(shrunk: float) -> str:
    """By how much a file of a ``shrunk``-th of the bytes is smaller, or larger."""
    return f"{shrunk:.2f}x smaller" if shrunk >= 1 else f"{1 / shrunk:.2f}x larger"
