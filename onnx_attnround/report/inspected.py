"""What a model holds and what targets make of it, as a record, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType

from onnx_attnround.report.document import SCHEMA, versions
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.tables import size

_FEW = 8
"""The operators that are listed; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The constants of one type: how many there are, their elements, and bytes."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a target makes of a model.

    Of a float one it would quantise ``layers`` with ``weights`` elements, and ``activations``;
    ``left`` maps reasons to the number of nodes that stay float. Of a quantised one ``left``
    maps the rules that it breaks to the number of places. ``refused`` says why nothing is
    taken, empty if it is not so.
    """

    target: str
    layers: int
    weights: int
    activations: int
    left: Mapping[str, int]
    refused: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a model holds.

    ``opsets`` are versions by domain ("" is ONNX's own), ``ends`` the types and shapes of inputs
    and outputs by name, ``ops`` counts operators in all graphs, ``stored`` constants by type,
    and ``weights`` those that layers multiply, as stored, by type. ``quantised`` says whether
    there are Q or DQ nodes; ``oldest_onnxruntime`` is the oldest release known to load the file.
    """

    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    ops: Mapping[str, int]
    stored: Mapping[str, Stored]
    weights: Mapping[str, int]
    quantised: bool
    oldest_onnxruntime: str | None
    taken: tuple[Taken, ...]


def inspection_console(inspected: Inspection, *, verbose: bool) -> RenderableType:
    """What the command prints: what is stored and taken; ``verbose`` lists all reasons."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {at}" for domain, at in inspected.opsets.items())
    oldest = inspected.oldest_onnxruntime
    ends = [(name, "in", told) for name, told in inspected.inputs.items()]
    ends += [(name, "out", told) for name, told in inspected.outputs.items()]
    parts: list[RenderableType] = [
        f"{'quantised' if inspected.quantised else 'float'} model, opset {opsets}, IR version "
        f"{inspected.ir_version}{f', made by {inspected.producer}' * bool(inspected.producer)}",
        f"loads in ONNX Runtime {oldest} or newer" if oldest else "of an opset that is not known",
        f"operators: {_ops(inspected, verbose=verbose)}",
        Rows(("end", "", "type and shape"), ends),
        _stored(inspected),
        _taken(inspected),
    ]
    return Group(*parts, *_reasons(inspected, verbose=verbose))


def inspection_dict(inspected: Inspection) -> dict[str, Any]:
    """The fields, as JSON has them."""
    return {"schema": SCHEMA, "versions": versions(), "model": asdict(inspected)}


def _ops(inspected: Inspection, *, verbose: bool) -> str:
    counts = [f"{count} {op}" for op, count in inspected.ops.items()]
    shown = counts if verbose else counts[:_FEW]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more else "")


def _stored(inspected: Inspection) -> Rows:
    headers = "constants", ">tensors", ">elements", ">bytes", ">of these weights of layers"
    return Rows(
        headers,
        [
            (kind, f"{each.tensors:,}", f"{each.elements:,}", size(each.bytes),
             f"{inspected.weights.get(kind, 0):,}")
            for kind, each in inspected.stored.items()
        ],
    )  # fmt: skip


def _taken(inspected: Inspection) -> Rows:
    verb = "quantised" if inspected.quantised else "would quantise"
    headers = "target", f">layers {verb}", ">weights", ">activations", "refused"
    return Rows(
        headers,
        [
            (each.target, f"{each.layers:,}", f"{each.weights:,}", f"{each.activations:,}",
             each.refused or "no")
            for each in inspected.taken
        ],
    )  # fmt: skip


def _reasons(inspected: Inspection, *, verbose: bool) -> list[RenderableType]:
    """What stays in float, or which rules are broken; of several targets only if ``verbose``."""
    several = len(inspected.taken) > 1
    if several and not verbose:
        return []
    rows = [
        (each.target, f"{count:,}", why)
        for each in inspected.taken
        for why, count in each.left.items()
    ]
    what = "rule that is broken" if inspected.quantised else "in float because"
    return [Rows(("target", ">nodes", what), rows)] if rows else []
