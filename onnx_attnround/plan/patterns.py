"""Names and globs in settings: which nodes and tensors each stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import onnx_ir as ir

from onnx_attnround.config import QuantConfig

T = TypeVar("T")


def chosen(patterns: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """For each of ``names`` that a pattern fits, the first that does.

    A pattern that is one of the names means that one alone, also where it is a glob too
    (``blocks[0]/conv``), and goes before all globs.
    """
    listed = list(patterns)
    exact = {pattern: pattern for pattern in listed if pattern in names}
    found: dict[str, str] = {}
    for glob in (pattern for pattern in listed if pattern not in exact):
        for name in names:
            if fnmatchcase(name, glob):
                found.setdefault(name, glob)
    return found | exact


def values_for(settings: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """For each of ``names`` that a key of ``settings`` fits, its value; as :func:`chosen`."""
    return {name: settings[pattern] for name, pattern in chosen(settings, names).items()}


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The nodes that ``include`` and ``exclude`` name; ``included`` is ``None`` for all."""

    included: frozenset[str] | None
    excluded: frozenset[str]

    @classmethod
    def of(cls, model: ir.Model, config: QuantConfig) -> NodeChoice:
        """The nodes of ``model`` that the patterns of ``config`` choose."""
        names = node_names(model)
        included = frozenset(chosen(config.include, names)) if config.include else None
        return cls(included, frozenset(chosen(config.exclude, names)))

    def refusal(self, name: str) -> str | None:
        """The reason why the node of that name is left out, if it is."""
        if self.included is not None and name not in self.included:
            return "not matched by include"
        return "matched by exclude" if name in self.excluded else None


def node_names(model: ir.Model) -> frozenset[str]:
    """The names of all nodes, those in subgraphs too."""
    return frozenset(node.name or "" for node in model.graph.all_nodes())


def tensor_names(model: ir.Model) -> frozenset[str]:
    """The names of the activations of the main graph: its inputs, and what its nodes make."""
    made = (value for node in model.graph for value in node.outputs)
    return frozenset(value.name or "" for value in (*model.graph.inputs, *made))
