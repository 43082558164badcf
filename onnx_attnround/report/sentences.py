"""What a run found, in sentences that every form of the report shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from onnx_attnround.check import Checked, Fusion
from onnx_attnround.records import BitAllocation, QuantPlan
from onnx_attnround.report.result import Point, QuantizeResult
from onnx_attnround.verify import Advice, PairComparison

FEW = 5
"""Names that are listed before the rest is counted."""


def title(result: QuantizeResult) -> str:
    """What the model of a run is called."""
    if result.source is not None:
        return result.source.name
    return result.model.graph.name or "model in memory"


def parting_lines(found: PairComparison) -> Iterable[str]:
    """Where the two models part first, what is wrong there, and what helps; then where else."""
    first = found.first
    if first is None:
        yield "no layer stands out: what one adds beyond the mean of all is explained by its width"
        return
    yield f"the two part first at '{first.node}': {first.parts}"
    yield f"what helps there: {first.mend}"
    yield from further_line(found)


def further_line(found: PairComparison) -> Iterable[str]:
    """Where the two models part behind the first place, if they do."""
    more = [layer.node for layer in found.layers if layer.parts and layer is not found.first]
    if more:
        yield f"further on they part at {named(more)}"


def advice_line(advice: Advice) -> str:
    """What the block of settings that follows is."""
    return (
        f"these cost the outputs most, {advice.share:.0%} of the error of all that was tried; as "
        "lines of a config, each with the SQNR that is left when it alone is rounded:"
    )


def bits_line(result: QuantizeResult) -> str:
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


def mean_bits(plan: QuantPlan, allocation: BitAllocation) -> str:
    """The mean, or why there is none."""
    if len(allocation.bits) < len(plan.layers):
        return "known after a run, which measures the layers"
    return "none" if math.isnan(allocation.mean_bits) else f"{allocation.mean_bits:.2f}"


def fusion_lines(fusion: Fusion, skipped: Mapping[str, str]) -> Iterable[str]:
    """How many layers run in integer, and a line for each reason why others do not."""
    yield from integer_lines(fusion)
    for why, nodes in in_float(fusion, skipped).items():
        yield f"in float, {why}: {named(nodes)}"


def integer_lines(fusion: Fusion) -> Iterable[str]:
    """How many layers run in integer, or have weights alone that are quantised."""
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


def in_float(fusion: Fusion, skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """The layers that run in float by the reason why.

    So does what was ``skipped``, which need not count among the layers, for the reason of the plan.
    """
    reasons: dict[str, list[str]] = {}
    for node, why in {**fusion.fallen, **skipped}.items():
        reasons.setdefault(why, []).append(node)
    return reasons


def finding_lines(checked: Checked) -> Iterable[str]:
    """The first rules that a file breaks, and how many more."""
    for found in checked.findings[:FEW]:
        yield f"check: {found.node}: {found.why} [{found.rule}]"
    if (more := len(checked.findings) - FEW) > 0:
        yield f"check: {more} more, all in the report"


def exactness_line(checked: Checked) -> Iterable[str]:
    """That sums in integer are exact, if they are."""
    if checked.fits_int16:
        yield "sums in integer are exact on CPUs with and without VNNI"


def release_line(checked: Checked) -> Iterable[str]:
    """The oldest ONNX Runtime for the file, if it is known."""
    if checked.oldest_onnxruntime is not None:
        yield f"loads in ONNX Runtime {checked.oldest_onnxruntime} or newer"


def notes_of_all(points: Sequence[Point]) -> Iterable[tuple[str, str]]:
    """The notes of all points, each once; where not all have it, with the mean bits in words."""
    holders: dict[str, list[str]] = {}
    for point in points:
        for note in point.result.notes:
            holders.setdefault(note, []).append(f"{point.config.mean_bits:g}")
    for note, means in holders.items():
        some = f" (mean bits {', '.join(means)})" if len(means) < len(points) else ""
        yield note, some


def named(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more} more" if more > 0 else "")
