"""One record of a run, as JSON and as tables for the console."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort
from rich.console import Group, RenderableType
from rich.table import Table

from onnx_attnround.check import Checked, Fusion
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import write_atomic
from onnx_attnround.records import BitAllocation, LayerPlan, QuantPlan
from onnx_attnround.verify import Latency, OutputComparison, Verification

if TYPE_CHECKING:
    from onnx_attnround.pareto import Point
    from onnx_attnround.pipeline import QuantizeResult

SCHEMA = 1
"""Raised when a key of the report changes its meaning or vanishes."""

_FEW = 5  # names that are listed before the rest is counted


def report_dict(result: QuantizeResult, config: QuantConfig) -> dict[str, Any]:
    """All that is known of a run, ready for JSON.

    A figure that does not exist is ``None``, and so is one that is not finite:
    an SQNR without any error, for one. Shares lie between 0 and 1, SQNR is in
    dB, sizes in bytes, ``seconds`` per stage.
    """
    report = {
        "schema": SCHEMA,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
        "target": result.plan.target.name,
        "mean_bits": result.allocation.mean_bits,
        "layers": [_layer(result, layer) for layer in result.plan.layers],
        "blocks": [asdict(block) for block in result.blocks],
        "check": _checked(result.checked),
        "skipped": dict(result.plan.skipped),
        "verification": None if result.verification is None else _verified(result.verification),
        "seconds": dict(result.seconds),
        "notes": list(result.notes),
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def write_json(path: Path, result: QuantizeResult, config: QuantConfig) -> None:
    """Write the report to ``path``, complete or not at all; raises ``OutputError``."""
    _write(path, report_dict(result, config))


def _write(path: Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def points_dict(points: Sequence[Point]) -> dict[str, Any]:
    """The points of a trade-off, each with its file, size in bytes, and the report of its run."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "points": [
            {
                "mean_bits": point.config.mean_bits,
                "file": None if point.output is None else str(point.output),
                "bytes": point.size,
                "on_front": point.on_front,
                "gates_missed": point.missed or None,
                "report": report_dict(point.result, point.config),
            }
            for point in points
        ],
    }


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write :func:`points_dict` to ``path``, as :func:`write_json` does."""
    _write(path, points_dict(points))


def versions() -> dict[str, str]:
    """Versions of the package and of the libraries that decide its results."""
    return {
        "onnx_attnround": _version("onnx-attnround"),
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "torch": _version("torch"),
    }


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
    if result.plan.target.runtime == "onnxruntime":
        parts += _release_line(result.checked)
    if result.verification is not None and result.verification.not_compared:
        parts.append(f"not compared with float: {_named(result.verification.not_compared)}")
    if result.plan.layers:
        parts.append(_bits(result))
    parts += [f"note: {note}" for note in result.notes]
    if output is not None:
        parts.append(f"wrote {output}")
    return Group(*parts)


def check_console(checked: Checked) -> RenderableType:
    """What ``--check`` prints: the findings, what runs in integer, and whether it is sound."""
    table = _table("", "node", "rule", "because")
    for found in checked.findings:
        table.add_row("refused" if found.refused else "note", found.node, found.rule, found.why)
    parts: list[RenderableType] = [table] if checked.findings else []
    if checked.loads:
        parts += _fusion_lines(checked.fusion, {})
    parts += _release_line(checked)
    if checked.loads and not checked.ran:
        parts.append("not run: the runtime is not here, or shapes are unknown (give --calib)")
    if not checked.findings:
        parts.append(f"no rule of target '{checked.target}' is broken")
    return Group(*parts)


def write_check(path: Path, checked: Checked) -> None:
    """Write what a check found to ``path``, complete or not at all; raises ``OutputError``."""
    report = {"schema": SCHEMA, "versions": versions(), "check": _checked(checked)}
    _write(path, _finite(report))


def points_table(points: Sequence[Point], *, verbose: bool) -> RenderableType:
    """What the command line prints of a trade-off: a row for each point, ``*`` on the front.

    ``verbose`` puts what a run of its own would print before it.
    """
    headers = "mean bits", "bytes", "SQNR", "agreement", "top-1", "speed"
    table = _table(*(f">{name}" for name in headers), "front", "file")
    found = points[0].verification
    top1 = "" if found.accuracy is None else f"{found.accuracy.float_top1:.2%}"
    table.add_row("float", f"{found.float_bytes:,}", "", "", top1, "", "", "")
    for point in points:
        table.add_row(*_point_cells(point))
    runs = [
        console(point.result, output=point.output, verbose=True) for point in points if verbose
    ]
    return Group(*runs, table, *(f"note: {note}" for note in points[0].result.notes))


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
    layers = _table("layer", "op", *(f">{name}" for name in ("shape", "weights", "MACs", "bits")))
    for layer in plan.layers:
        layers.add_row(*_plan_cells(layer, allocation))
    weights = sum(layer.parameters for layer in plan.layers)
    summary = (
        f"layers: {len(plan.layers)}, weights: {weights:,}, "
        f"mean bits (first, last and layer_bits left out): {_mean_bits(plan, allocation)}, "
        f"nodes left in float: {len(plan.skipped)}"
    )
    notes = [(plan.skipped, "stays in float"), (plan.unblocked, "no blocks of scales")]
    tables = [_reasons(reasons, what) for reasons, what in notes if reasons]
    return Group(layers, *tables, summary)


def _reasons(reasons: Mapping[str, str], what: str) -> Table:
    table = _table(what, "because")
    for node, reason in reasons.items():
        table.add_row(node, reason)
    return table


def _mean_bits(plan: QuantPlan, allocation: BitAllocation) -> str:
    """The mean, or why there is none."""
    if len(allocation.bits) < len(plan.layers):
        return "known after a run, which measures the layers"
    return "none" if math.isnan(allocation.mean_bits) else f"{allocation.mean_bits:.2f}"


def _version(distribution: str) -> str:
    """``unknown`` where the package runs from its sources, without being installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _layer(result: QuantizeResult, layer: LayerPlan) -> dict[str, Any]:
    rounding = result.roundings.get(layer.node)
    checked, fusion = result.verification, result.checked.fusion
    return {
        "node": layer.node,
        "op": layer.op_type,
        "weight": layer.weight,
        "shape": list(layer.weight_shape),
        "parameters": layer.parameters,
        "macs": layer.macs,
        "bits": result.allocation.bits.get(layer.node),
        "coding_length": result.allocation.coding_length.get(layer.node),
        "mse_nearest": None if rounding is None else rounding.mse_nearest,
        "mse_final": None if rounding is None else rounding.mse_final,
        "changed": None if rounding is None else rounding.changed,
        "sqnr_db": None if checked is None else checked.layer_sqnr.get(layer.node),
        "block_size": None if rounding is None else rounding.spec.block_size,
        "runs_in_integer": layer.node in fusion.integer,
        "weight_only_kernel": fusion.weight_only.get(layer.node),
        "in_float_because": fusion.fallen.get(layer.node),
    }


def _verified(verification: Verification) -> dict[str, Any]:
    """The fields, with what follows from them; what is told per layer is left out."""
    fields = asdict(verification)
    del fields["layer_sqnr"]
    fields["outputs"] = [
        {**asdict(output), "agreement": output.agreement} for output in verification.outputs
    ]
    if (accuracy := verification.accuracy) is not None:
        fields["accuracy"] |= {
            "float_top1": accuracy.float_top1,
            "quantised_top1": accuracy.quantised_top1,
            "drop_points": accuracy.drop_points,
        }
    return fields


def _checked(checked: Checked) -> dict[str, Any]:
    """The fields, with the share of multiply-accumulates in integer."""
    return {**asdict(checked), "integer_share": checked.fusion.integer_share}


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _bits(result: QuantizeResult) -> str:
    """The bits of all layers in one line; those of scales too where blocks have their own."""
    layers = result.plan.layers
    bits = [result.allocation.bits[layer.node] for layer in layers]
    sizes = [layer.parameters for layer in layers]
    mean = sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)
    counts = ", ".join(f"{count} at {b}" for b, count in sorted(Counter(bits).items()))
    roundings = result.roundings.values()
    if any(rounding.spec.block_size for rounding in roundings):
        scales = 32 * sum(rounding.scale.size for rounding in roundings) / sum(sizes)
        counts = f"{counts}; {mean + scales:.2f} bits with the scales"
    return f"{mean:.2f} bits per weight; layers by bits: {counts}"


def _table(*headers: str) -> Table:
    """A plain table; columns whose header starts with ``>`` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in headers:
        right = header.startswith(">")
        table.add_column(
            header.removeprefix(">"), justify="right" if right else "left", overflow="fold"
        )
    return table


def _plan_cells(layer: LayerPlan, allocation: BitAllocation) -> list[str]:
    return [
        layer.node,
        layer.op_type,
        "x".join(map(str, layer.weight_shape)),
        f"{layer.parameters:,}",
        "?" if layer.macs is None else f"{layer.macs:,}",
        str(allocation.bits.get(layer.node, "-")),
    ]


def _layer_table(result: QuantizeResult) -> Table:
    numbers = ("shape", "weights", "MACs", "bits", "error nearest", "error final", "moved", "SQNR")
    table = _table("layer", "op", *(f">{name}" for name in numbers))
    for layer in result.plan.layers:
        found = result.roundings.get(layer.node)
        sqnr = result.verification and result.verification.layer_sqnr.get(layer.node)
        table.add_row(
            *_plan_cells(layer, result.allocation),
            *(("", "", "") if found is None else (
                f"{found.mse_nearest:.2e}", f"{found.mse_final:.2e}", f"{found.changed:.1%}"
            )),
            "" if sqnr is None else f"{sqnr:.1f} dB",
        )  # fmt: skip
    return table


def _comparison(verification: Verification, *, elsewhere: bool) -> Table:
    table = _table("", ">float", ">quantised", ">change")
    if (accuracy := verification.accuracy) is not None:
        table.add_row(
            f"top-1 ({accuracy.samples} samples)",
            f"{accuracy.float_top1:.2%}",
            f"{accuracy.quantised_top1:.2%}",
            f"{0.0 - accuracy.drop_points:+.2f} points",
        )
    for output in verification.outputs:
        kind = "samples" if verification.held_out else "calibration samples"
        _add_output(table, output, f"{verification.samples} {kind}")
    table.add_row(
        "size",
        _size(verification.float_bytes),
        _size(verification.quantised_bytes),
        _times(verification.float_bytes / verification.quantised_bytes),
    )
    _add_latency(table, verification.latency, " in ONNX Runtime here" if elsewhere else "")
    return table


def _add_output(table: Table, output: OutputComparison, samples: str) -> None:
    if output.agreement is not None:
        kind = "values equal" if output.sqnr_db is None else "top-1 agrees"
        table.add_row(f"{output.name}: {kind}", "", "", f"{output.agreement:.2%}")
    if output.sqnr_db is not None:
        sqnr = f"{output.sqnr_db:.2f} dB" if math.isfinite(output.sqnr_db) else "exact"
        table.add_row(f"{output.name}: SQNR ({samples})", "", "", sqnr)
    table.add_row(f"{output.name}: largest error", "", "", f"{output.max_abs_error:.3g}")


def _add_latency(table: Table, latency: Latency, where: str) -> None:
    low, high = latency.spread
    table.add_row(
        f"latency{where} (batch {latency.batch}, 1 thread)",
        f"{latency.float_ms:.2f} ms",
        f"{latency.quantised_ms:.2f} ms",
        f"{latency.speedup:.2f}x as fast ({low:.2f} to {high:.2f})",
    )


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


def _release_line(checked: Checked) -> Iterable[str]:
    if checked.oldest_onnxruntime is not None:
        yield f"loads in ONNX Runtime {checked.oldest_onnxruntime} or newer"


def _named(names: tuple[str, ...]) -> str:
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")
