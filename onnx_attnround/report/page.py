"""The report as one page of HTML, which loads nothing from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from onnx_attnround.check import Checked, Fusion
from onnx_attnround.config import QuantConfig
from onnx_attnround.qdq.arithmetic import range_of
from onnx_attnround.records import LayerPlan, QuantParams
from onnx_attnround.report import tables
from onnx_attnround.report.charts import (
    Chart,
    Histogram,
    Series,
    along,
    code_histogram,
    histogram,
    scatter,
)
from onnx_attnround.report.document import versions
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.result import Compared, Point, QuantizeResult
from onnx_attnround.report.sentences import (
    advice_line,
    bits_line,
    exactness_line,
    in_float,
    integer_lines,
    notes_of_all,
    release_line,
    title,
)
from onnx_attnround.report.summary import (
    Verdict,
    basis,
    lead,
    measured_tiles,
    tiles,
    verdict,
    verdict_of_all,
    verdict_of_pair,
)
from onnx_attnround.verify import PairComparison, Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A row of the table of layers, as text and drawings."""

    node: str
    op: str
    shape: str
    bits: str
    nearest: str
    learned: str
    moved: str
    sqnr: str
    runs: str
    codes: Histogram | None
    input: Histogram | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Activation:
    """A row of the table of activations."""

    tensor: str
    bits: int
    range: str
    observed: str
    values: Histogram | None


def run_page(result: QuantizeResult, command: str | None = None) -> str:
    """All that is known of a run, what matters first; with the ``command`` that made it."""
    found, plan = result.verification, result.plan
    return render(
        "run.html",
        title=title(result),
        eyebrow=[f"for {plan.target.name}", f"{len(plan.layers)} layers"],
        verdict=verdict(result),
        lead=lead(found),
        tiles=tiles(result),
        basis=basis(found),
        notes=result.notes,
        advice=result.advice,
        search=result.search and tables.trials(result.search),
        advice_line=result.advice and advice_line(result.advice),
        outputs=found and tables.outputs(found),
        not_compared=[] if found is None else found.not_compared,
        **_layers_told(result),
        **_activations_told(result),
        **_running(
            result.checked, plan.skipped, onnxruntime=plan.target.runtime == "onnxruntime"
        ),
        kernels=_kernels(found),
        command=command,
        settings=_settings(result.config),
        seconds=_seconds(result.seconds),
    )


def points_page(points: Sequence[Point], command: str | None = None) -> str:
    """Several files of one model: what each costs and keeps, and the bits of their layers."""
    first = points[0].result
    layers = first.plan.layers
    return render(
        "points.html",
        title=title(first),
        target=first.plan.target.name,
        lead=_span(points),
        verdict=verdict_of_all([(_mean(point), point.result) for point in points]),
        quality=_quality(points)[0],
        front=_front(points),
        table=tables.points(points),
        basis=basis(points[0].verification),
        points=points,
        notes=[f"{note}{some}" for note, some in notes_of_all(points)],
        means=[_mean(point) for point in points],
        layers={
            layer.node: [point.result.allocation.bits[layer.node] for point in points]
            for layer in layers
        },
        command=command,
        settings=_settings(first.config.model_copy(update={"mean_bits": None})),
    )


def check_page(checked: Checked, command: str | None = None) -> str:
    """What a check found."""
    refused = checked.refused
    word = "Refused" if refused else "No rule is broken" if not checked.findings else "Taken"
    return render(
        "check.html",
        title="Check of a file",
        target=checked.target,
        verdict=Verdict(
            tone="bad" if refused else "good",
            word=word,
            reasons=[checked.verdict] if refused else [],
        ),
        **_running(checked, {}, onnxruntime=True),
        command=command,
    )


def compared_page(compared: Compared, command: str | None = None) -> str:
    """A quantised file beside its float model: where they part first, and all layers."""
    found = compared.found
    return render(
        "compared.html",
        title=compared.names[1],
        other=compared.names[0],
        verdict=verdict_of_pair(found),
        lead=lead(found.verification),
        tiles=measured_tiles(found.verification),
        basis=basis(found.verification),
        notes=compared.notes,
        outputs=tables.outputs(found.verification),
        kernels=_kernels(found.verification),
        errors=_pair_chart(found),
        layers=[{"layer": each, **tables.pair_figures(each)} for each in found.layers],
        first=found.first,
        alone=found.alone,
        command=command,
        seconds=_seconds(compared.seconds),
    )


def _pair_chart(found: PairComparison) -> Chart | None:
    """The error at each layer, and what it adds by itself."""
    if not found.layers:
        return None
    series = [
        Series(
            label="in the file", style="line", values=[_finite(la.sqnr_db) for la in found.layers]
        ),
        Series(
            label="explained by its width",
            style="ring",
            values=[_finite(la.expected_db) for la in found.layers],
        ),
        Series(label="its own", style="dot", values=[_finite(la.own_db) for la in found.layers]),
    ]
    drawn = [each for each in series if any(value is not None for value in each.values)]
    return along([la.node for la in found.layers], drawn, "dB") if drawn else None


def _mean(point: Point) -> str:
    return f"{point.config.mean_bits:g}"


def _span(points: Sequence[Point]) -> str:
    sizes = sorted(point.size for point in points)
    before = points[0].verification.float_bytes
    ends = f"{before / sizes[-1]:.2f}x to {before / sizes[0]:.2f}x smaller"
    best = sum(point.on_front for point in points)
    told = "one of them is" if best == 1 else f"{best} of them are"
    return f"{len(points)} files, {ends}; {told} best for the size."


def _quality(points: Sequence[Point]) -> tuple[str, str, list[float | None]]:
    """What the points are compared by, its unit, and its values."""
    found = points[0].verification
    values = [_finite(point.quality) for point in points]
    if found.accuracy is not None:
        return "top-1", "%", [None if v is None else 100 * v for v in values]
    if found.worst_output is not None:
        return "signal over error", "dB", values
    return "agreement", "%", [None if v is None else 100 * v for v in values]


def _front(points: Sequence[Point]) -> Chart:
    ordered = sorted(points, key=lambda point: point.size)
    name, unit, values = _quality(ordered)
    best = [
        value if point.on_front else None for point, value in zip(ordered, values, strict=True)
    ]
    series = [
        Series(label="best for the size", style="line", values=best),
        Series(label=name, style="dot", values=values),
    ]
    told = [f"{_mean(point)} mean bits, {tables.size(point.size)}" for point in ordered]
    return scatter([point.size / 1000 for point in ordered], series, told, ("kB", unit))


def render(template: str, **view: Any) -> str:
    """The page of a template in the folder ``templates``."""
    return _templates().get_template(template).render(versions=versions(), **view)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnx_attnround.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["told"] = _typeset
    environment.filters["prose"] = _prose
    return environment


def _typeset(text: str) -> str:
    """``text`` with the signs that print has for a minus and for times."""
    plain = re.sub(r"(?<![\w.-])-(?=[\d.])", "−", text)
    return re.sub(r"(?<=\d)x(?=[\d\s,]|$)", "×", plain)


def _prose(text: str) -> Markup:
    """A sentence, typeset, with settings in the type of code, and a capital."""
    plain = str(escape(_typeset(text[:1].upper() + text[1:])))
    return Markup(re.sub(r"`(\w+)`", r"<code>\1</code>", plain))


def _layers_told(result: QuantizeResult) -> dict[str, Any]:
    """The layers as charts along the network, and as rows."""
    layers, found = result.plan.layers, result.verification
    return {
        "learned": any(rounding.mse_final for rounding in result.roundings.values()),
        "measured": found is not None and bool(found.layer_sqnr),
        "inputs": any(stats.hist is not None for stats in result.ranges.stats.values()),
        "errors": _error_chart(result),
        "coding": bool(result.allocation.coding_length),
        "widths": _bit_chart(result),
        "bits": bits_line(result) if layers else "",
        "layers": [_layer(result, layer) for layer in layers],
    }


def _error_chart(result: QuantizeResult) -> Chart | None:
    layers, roundings = result.plan.layers, result.roundings
    known = [roundings.get(layer.node) for layer in layers]
    sqnr = {} if result.verification is None else result.verification.layer_sqnr
    series = [
        Series(
            label="in the file", style="line", values=[_finite(sqnr.get(la.node)) for la in layers]
        ),
        Series(
            label="rounded to nearest",
            style="ring",
            values=[None if each is None else _over(each.mse_nearest) for each in known],
        ),
        Series(
            label="learned",
            style="dot",
            values=[None if each is None else _over(each.mse_final) for each in known],
        ),
    ]
    drawn = [each for each in series if any(value is not None for value in each.values)]
    return along([la.node for la in layers], drawn, "dB") if drawn else None


def _bit_chart(result: QuantizeResult) -> Chart | None:
    """Bits and coding length; nothing where all layers have the same bits."""
    layers, allocation = result.plan.layers, result.allocation
    bits = [allocation.bits[layer.node] for layer in layers]
    if len(set(bits)) < 2:
        return None
    series = [Series(label="bits a weight", style="bar", values=bits)]
    if lengths := allocation.coding_length:
        told = [lengths.get(layer.node) for layer in layers]
        series.append(Series(label="coding length", style="dot", values=told))
    return along([layer.node for layer in layers], series, "bits")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _over(error: float) -> float | None:
    """Signal over error in dB, of a squared error relative to the signal."""
    return -10 * math.log10(error) if 0 < error < math.inf else None


def _decibels(error: float) -> str:
    over = _over(error)
    return "" if over is None else f"{over:.1f}"


def _layer(result: QuantizeResult, layer: LayerPlan) -> _Layer:
    rounding, found = result.roundings.get(layer.node), result.verification
    sqnr = None if found is None else _finite(found.layer_sqnr.get(layer.node))
    codes = None
    if rounding is not None:
        codes = code_histogram(rounding.codes, rounding.spec.qmin, rounding.spec.qmax)
    return _Layer(
        node=layer.node,
        op=layer.op_type,
        shape="×".join(map(str, layer.weight_shape)),
        bits=str(result.allocation.bits[layer.node]),
        nearest="" if rounding is None else _decibels(rounding.mse_nearest),
        learned="" if rounding is None else _decibels(rounding.mse_final),
        moved="" if rounding is None else f"{rounding.changed:.1%}",
        sqnr="" if sqnr is None else f"{sqnr:.1f} dB",
        runs=_runs(result.checked.fusion, layer.node),
        codes=codes,
        input=_values(result, layer.x),
    )


def _runs(fusion: Fusion, node: str) -> str:
    if node in fusion.integer:
        return "integer"
    return fusion.weight_only.get(node, "float" if node in fusion.fallen else "")


def _values(result: QuantizeResult, tensor: str) -> Histogram | None:
    """What a tensor holds, or that whose range it shares, with what its codes can hold."""
    params = result.ranges.params.get(tensor)
    while tensor in result.plan.same_range:
        tensor = result.plan.same_range[tensor]
    stats = result.ranges.stats.get(tensor)
    if params is None or stats is None or stats.hist is None or stats.edges is None:
        return None
    return histogram(stats.hist, stats.edges, range_of(params))


def _activations_told(result: QuantizeResult) -> dict[str, Any]:
    """Tensors with a range of their own, and how many share one."""
    own = {
        tensor: params
        for tensor, params in result.ranges.params.items()
        if tensor not in result.plan.same_range
    }
    sharing = len(result.ranges.params) - len(own)
    several = "tensor shares" if sharing == 1 else "tensors share"
    return {
        "activations": [_activation(result, *each) for each in own.items()],
        "sharing": f"{sharing} more {several} the range of one of these." if sharing else "",
    }


def _activation(result: QuantizeResult, tensor: str, params: QuantParams) -> _Activation:
    stats = result.ranges.stats.get(tensor)
    low, high = range_of(params)
    return _Activation(
        tensor=tensor,
        bits=params.spec.bits,
        range="that of each run" if params.spec.dynamic else f"{low:.3g} to {high:.3g}",
        observed="" if stats is None else f"{stats.lo:.3g} to {stats.hi:.3g}",
        values=_values(result, tensor),
    )


def _running(
    checked: Checked, skipped: Mapping[str, str], *, onnxruntime: bool
) -> dict[str, Any]:
    """What runs in integer, what does not and why, and the rules that the file breaks."""
    share = checked.fusion.integer_share
    lines = [*integer_lines(checked.fusion), *exactness_line(checked)]
    if onnxruntime:
        lines += release_line(checked)
    return {
        "integer": None if share is None else round(100 * share, 1),
        "runs": lines,
        "reasons": in_float(checked.fusion, skipped),
        "findings": tables.findings(checked) if checked.findings else None,
    }


def _kernels(found: Verification | None) -> Rows | None:
    return tables.kernels(found) if found is not None and found.kernels else None


def _settings(config: QuantConfig) -> str:
    """The settings that are not the usual ones."""
    usual = QuantConfig().model_dump(mode="json")
    own = config.model_dump(mode="json")
    told = [f"{key} {value}" for key, value in own.items() if value != usual[key]]
    return f"Settings: {', '.join(told)}; all others as usual." if told else "The usual settings."


def _seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {each:.1f} s" for stage, each in seconds.items())
