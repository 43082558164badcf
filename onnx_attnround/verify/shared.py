"""The quantised model on what the float model chooses and draws.

Where a TopK or a NonMaxSuppression picks rows, the quantised model picks others, or another
number of them, and where numbers are drawn, it draws others: row by row such outputs do not
compare. They do once the quantised model is given what the float model has chosen and drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import (
    draws,
    is_discrete,
    parted_choices,
    reads_of,
    take_choices,
    with_outputs,
)
from onnx_attnround.records import Array
from onnx_attnround.verify.runs import Feed, Models, Outputs, Runs, open_pair, run_both

Pair = Callable[[Feed], tuple[Outputs, Outputs]]
"""From a feed to the outputs of both models by name."""

# Operators whose output has no fixed number of rows; and those that put rows where integers say.
_PICKING = frozenset({"NonMaxSuppression", "NonZero", "Range"})
_MOVING = frozenset(
    {"Compress", "Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements",
     "ScatterND", "Slice"}
)  # fmt: skip
_CONTROL = frozenset({"If", "Loop", "Scan"})


@dataclass(slots=True, kw_only=True)
class Comparison:
    """How both models are run on a feed, and the outputs of which something has to be said.

    Those ``on_shared_choices`` are what the quantised model makes of the choices and draws of the
    float model, those ``apart`` are left out, and become more where shapes turn out to
    differ: each with the node that makes them so. All others are what the quantised
    model makes by itself.
    """

    runs: Runs
    follow: Pair | None
    suspect: str | None
    on_shared_choices: Mapping[str, str]
    apart: dict[str, str]

    def run(self, feed: Feed) -> tuple[Outputs, Outputs]:
        """The outputs of both models that can be compared; errors as :func:`run_both`."""
        expected, got = run_both(self.runs, feed)
        if self.follow is not None:
            got = {**got, **self.follow(feed)[1]}
        if self.suspect is not None:
            other = {name for name in expected if not _same_shape(expected[name], got.get(name))}
            self.apart.update(dict.fromkeys(other - self.apart.keys(), self.suspect))
        first, second = (
            {name: value for name, value in each.items() if name not in self.apart}
            for each in (expected, got)
        )
        return first, second

    def notes(self) -> list[str]:
        """A note for each node that makes outputs not comparable row by row."""
        shared = "compared on what the float model chooses and draws"
        return [
            f"not comparable row by row: {', '.join(names)}, since {label} may choose or draw "
            f"otherwise in the quantised model; {what}"
            for outputs, what in ((self.on_shared_choices, shared), (self.apart, "not compared"))
            for label, names in _by_label(outputs).items()
        ]


def open_comparison(models: Models, threads: int | None) -> Comparison:
    """The comparison of the outputs of both models; errors as :func:`open_pair`."""
    names = parted_choices(*models)
    shared, apart = _parted(models, names)
    return Comparison(
        runs=open_pair(models, threads),
        follow=open_shared(models, list(shared), threads) if shared else None,
        suspect=next((_label(n) for n in models[1].graph if n.name in names), None),
        on_shared_choices=shared,
        apart=apart,
    )


def _by_label(outputs: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, label in outputs.items():
        names.setdefault(label, []).append(f"'{name}'")
    return names


def open_shared(models: Models, names: Sequence[str], threads: int | None) -> Pair:
    """A function that runs both models up to the values ``names``, on the float model's choices.

    Those that still have other shapes are left out, if there was anything to choose.
    """
    copy = models[1].clone()
    taken = take_choices(copy, models[0], parted_choices(*models))
    lent = list(dict.fromkeys((*names, *taken.values())))
    runs = open_pair((with_outputs(models[0], lent), with_outputs(copy, names)), threads)
    dtypes = {value.name: value.dtype for value in copy.graph.inputs}

    def run(feed: Feed) -> tuple[Outputs, Outputs]:
        expected = runs[0](feed)
        given = {name: _as(dtypes[name], expected[source]) for name, source in taken.items()}
        got = runs[1]({**feed, **given})
        found = {name: got[name] for name in names}
        if taken:
            found = {n: v for n, v in found.items() if _same_shape(expected[n], v)}
        return {name: expected[name] for name in found}, found

    return run


def _as(dtype: ir.DataType | None, value: Array) -> Array:
    """The value in the type of the input that it is for: half precision may have been widened."""
    return value if dtype is None or value.dtype.kind != "f" else value.astype(dtype.numpy())


def _same_shape(one: Any, other: Any) -> bool:
    return not isinstance(one, np.ndarray) or one.shape == np.shape(other)


def _label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def _parted(models: Models, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The outputs whose rows both models choose or draw apart, by whether that can be shared."""
    rows = _Rows(names)
    for node in models[1].graph:
        rows.follow(node)
    found = {v.name or "": rows.moved[v] for v in models[1].graph.outputs if v in rows.moved}
    apart = {name: label for name, label in found.items() if label in rows.closed}
    return {name: label for name, label in found.items() if name not in apart}, apart


class _Rows:
    """Follows choices through a graph: what is ``picked`` by them, and what is ``moved`` with it.

    Both by the node that chooses. Of ``closed`` nodes only the outputs as a whole are known.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self.picked: dict[ir.Value, str] = {}
        self.moved: dict[ir.Value, str] = {}
        self.closed: set[str] = set()

    def follow(self, node: ir.Node) -> None:
        """Go on from the inputs of a node to its outputs."""
        picked, moved = self._first(self.picked, node), self._first(self.moved, node)
        if node.name in self._names:
            picked = _label(node)
            if node.op_type in _CONTROL or node.op_type in ("Dropout", "Unique"):
                self.closed.add(picked)
            if picked in self.closed or node.op_type in _PICKING or draws(node):
                moved = picked
        elif picked and (node.op_type in _CONTROL or self._is_index(node)):
            moved = moved or picked
        for value in node.outputs:
            if moved:
                self.moved[value] = moved
            if picked and is_discrete(value):
                self.picked[value] = picked

    def _first(self, known: Mapping[ir.Value, str], node: ir.Node) -> str | None:
        labels = [known[value] for value in reads_of(node) if value in known]
        return next((label for label in labels if label in self.closed), next(iter(labels), None))

    def _is_index(self, node: ir.Node) -> bool:
        return node.op_type in _MOVING and any(v in self.picked for v in node.inputs[1:])
