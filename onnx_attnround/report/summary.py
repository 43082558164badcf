"""What a reader sees first: a verdict, a sentence, and the figures that matter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx_attnround.report.result import QuantizeResult
from onnx_attnround.report.sentences import further_line, parting_lines
from onnx_attnround.report.tables import decibels, size, times
from onnx_attnround.verify import (
    Accuracy,
    Latency,
    OutputComparison,
    PairComparison,
    Verification,
    gates,
    slice_name,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether what was asked for was reached; ``tone`` is ``good``, ``bad`` or empty."""

    tone: str
    word: str
    detail: str = ""
    reasons: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One of two figures to be compared, and its share of the larger one in percent."""

    label: str
    share: float
    told: str
    new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure in large, with what it is of."""

    label: str
    figure: str
    unit: str = ""
    detail: str = ""
    bars: Sequence[Bar] = ()


def verdict(result: QuantizeResult) -> Verdict:
    """What is to be said of gates and goal, and of outputs that are of no use."""
    found, search = result.verification, result.search
    if found is None:
        return Verdict(tone="", word="Not measured", detail="there were no samples")
    judged = gates(found, result.config)
    missed = [gate.missed for gate in judged if gate.missed]
    collapsed = [phrase for phrase in found.collapsed if not any(phrase in m for m in missed)]
    goal = [] if search is None or search.missed is None else [search.missed]
    if missed or goal:
        word = "Gate missed" if missed else "Goal not reached"
        return Verdict(tone="bad", word=word, reasons=[*missed, *goal, *collapsed])
    if collapsed:
        return Verdict(tone="bad", word="Of no use as it is", reasons=collapsed)
    if not judged and search is None:
        return Verdict(tone="", word="No gate set", detail="no output has collapsed")
    several = f"All {len(judged)} gates met" if len(judged) > 1 else "Gate met"
    demands = [gate.demand for gate in judged]
    if search is not None:
        several = f"Goal reached, {several.lower()}" if judged else "Goal reached"
        demands.insert(0, search.goal)
    return Verdict(tone="good", word=several, detail="; ".join(demands))


def verdict_of_all(results: Sequence[tuple[str, QuantizeResult]]) -> Verdict:
    """One for several files, each with its mean bits."""
    judged = [(mean, verdict(result)) for mean, result in results]
    bad = [(mean, one) for mean, one in judged if one.tone == "bad"]
    if bad:
        reasons = [f"{mean} mean bits: {'; '.join(one.reasons)}" for mean, one in bad]
        word = f"{len(bad)} of {len(judged)} miss a gate or are of no use"
        return Verdict(tone="bad", word=word, reasons=reasons)
    first = judged[0][1]
    return Verdict(tone=first.tone, word=first.word, detail=first.detail)


def verdict_of_pair(found: PairComparison) -> Verdict:
    """Whether a file parts from its float model somewhere."""
    collapsed = found.verification.collapsed
    if not found.layers:
        return Verdict(
            tone="bad" if collapsed else "",
            word="No layer found in both",
            reasons=collapsed,
        )
    if (first := found.first) is None:
        word = "Of no use as it is" if collapsed else "They do not part"
        (detail,) = parting_lines(found)
        tone = "bad" if collapsed else "good"
        return Verdict(tone=tone, word=word, detail=detail, reasons=collapsed)
    told = [first.parts or "", f"what helps: {first.mend}", *further_line(found), *collapsed]
    word = f"They part at {first.node}"
    return Verdict(tone="bad" if collapsed else "", word=word, reasons=told)


def lead(found: Verification | None) -> str:
    """Size, speed and quality in a sentence."""
    if found is None:
        return ""
    smaller = times(found.float_bytes / found.quantised_bytes)
    return f"{_upper(smaller)}, {_speed(found.latency)}; {_quality(found)}."


def basis(found: Verification | None) -> str:
    """What the figures are measured on, and what that means for them."""
    if found is None:
        return ""
    return {
        "evaluation": f"Quality is measured on the {found.samples:,} samples given for it.",
        "held out": f"Quality is measured on {found.samples:,} samples kept apart; nothing was "
        "fitted to them.",
        "calibration": f"Quality is measured on {found.samples:,} samples that ranges and weights "
        "were fitted to, which flatters: other samples come out worse.",
    }[found.basis]


def tiles(result: QuantizeResult) -> tuple[Tile, ...]:
    """Size, speed, quality, bits, and what runs in integer."""
    found = result.verification
    measured = () if found is None else measured_tiles(found)
    return (*measured, *_layer_tiles(result))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _speed(latency: Latency) -> str:
    low, high = latency.spread
    if low <= 1 <= high:
        return "as fast as before"
    return f"{latency.speedup:.2f}x as fast"


def _quality(found: Verification) -> str:
    if (accuracy := found.accuracy) is not None:
        return f"top-1 is {accuracy.quantised_top1:.2%}, {_change(accuracy)}"
    agreements = [output.agreement for output in found.outputs if output.agreement is not None]
    worst = found.worst_output
    if agreements:
        return f"{min(agreements):.2%} of the samples get the class that the float model gives"
    if worst is None or worst.sqnr_db is None:
        return "no output is a float tensor"
    if math.isinf(worst.sqnr_db):
        return "the outputs are the same"
    return f"the outputs keep {worst.sqnr_db:.1f} dB of signal over error"


def _change(accuracy: Accuracy) -> str:
    points = -accuracy.drop_points
    return f"{points:+.2f} points" if points else "no change"


def measured_tiles(found: Verification) -> Iterator[Tile]:
    """Size, speed and quality."""
    yield _size_tile(found)
    yield _speed_tile(found.latency)
    if found.accuracy is not None:
        accuracy = found.accuracy
        yield Tile(
            label="Top-1",
            figure=f"{accuracy.quantised_top1:.2%}",
            detail=f"{_change(accuracy)} from {accuracy.float_top1:.2%} of the float model, on "
            f"{accuracy.samples:,} samples",
        )
    agreeing = [output for output in found.outputs if output.agreement is not None]
    if agreeing and found.accuracy is None:
        worst = min(agreeing, key=lambda output: output.agreement or 0.0)
        yield Tile(
            label="Agreement with float",
            figure=f"{worst.agreement:.2%}",
            detail=f"'{worst.name}' of {worst.judged:,} {_of(worst)}",
        )
    if found.worst_output is not None:
        yield _signal_tile(found.worst_output, len(found.outputs))


def _of(output: OutputComparison) -> str:
    return "values are equal" if output.sqnr_db is None else "samples has the same largest value"


def _size_tile(found: Verification) -> Tile:
    before, after = found.float_bytes, found.quantised_bytes
    number, unit = size(after).split()
    return Tile(
        label="File",
        figure=number,
        unit=unit,
        detail=times(before / after),
        bars=_bars((before, after), (size(before), size(after))),
    )


def _speed_tile(latency: Latency) -> Tile:
    low, high = latency.spread
    both = latency.float_ms, latency.quantised_ms
    return Tile(
        label=f"Speed at batch {latency.batch}, one thread",
        figure=f"{latency.speedup:.2f}",
        unit="times as fast",
        detail=f"{low:.2f} to {high:.2f} in half of {latency.pairs} pairs of runs",
        bars=_bars(both, tuple(f"{ms:.2f} ms" for ms in both)),
    )


def _bars(both: tuple[float, float], told: Sequence[str]) -> tuple[Bar, ...]:
    most = max(both) or 1.0
    labels = ("float", False), ("new", True)
    return tuple(
        Bar(label=label, share=round(100 * value / most, 1), told=text, new=new)
        for (label, new), value, text in zip(labels, both, told, strict=True)
    )


def _signal_tile(worst: OutputComparison, outputs: int) -> Tile:
    number, _, unit = decibels(worst.sqnr_db or 0.0).partition(" ")
    told = [f"'{worst.name}'" + (f", the worst of {outputs}" if outputs > 1 else "")]
    if (part := worst.worst_slice) is not None and math.isfinite(part.sqnr_db):
        told.append(f"worst slice {part.sqnr_db:.1f} dB ({slice_name(part)})")
    return Tile(label="Signal over error", figure=number, unit=unit, detail="; ".join(told))


def _layer_tiles(result: QuantizeResult) -> Iterator[Tile]:
    layers, fusion = result.plan.layers, result.checked.fusion
    if layers:
        counts = Counter(result.allocation.bits[layer.node] for layer in layers)
        told = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
        yield Tile(
            label="Bits a weight",
            figure=f"{result.bits_per_weight:.2f}",
            detail=f"layers: {told}" if len(counts) > 1 else f"{len(layers)} layers",
        )
    if fusion.integer or fusion.fallen:
        share, total = fusion.integer_share, len(fusion.macs)
        runs = f"{len(fusion.integer)} of {total} layers in {fusion.runtime}"
        yield Tile(
            label="Computed in integer" if fusion.measured else "In integer by the rules",
            figure=f"{len(fusion.integer)} of {total}" if share is None else f"{share:.1%}",
            unit="layers" if share is None else "of MACs",
            detail=runs if share is not None else fusion.runtime,
        )
