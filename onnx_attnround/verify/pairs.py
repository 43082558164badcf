"""Which layer of a quantised file is which of the float model, by name, by weights, by order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_attnround.records import Array
from onnx_attnround.verify.results import Matched
from onnx_attnround.verify.sites import Site

LEAST_LIKENESS = 0.5
"""Mean cosine of the rows of two weights from which on they are taken for one."""

_ENDINGS = ("_quantized/as_float", "_QuantizeLinear_Input", "/as_float", "_quantized", "_quant")
"""What converters add to names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A layer of the float model, the same one of the quantised file, and how that was found."""

    float: Site
    quantised: Site
    matched: Matched


def match(floats: Sequence[Site], quantised: Sequence[Site]) -> tuple[Pair, ...]:
    """The layers that are the same, in the order of the quantised file.

    Names are kept by most converters, and rows of a weight keep their directions where a
    normalization is folded into them. What is left over is paired in its order, if there are as
    many of one shape on both sides.
    """
    rest = _Rest(list(floats), list(quantised))
    pairs = [*rest.by_name(), *rest.by_weights(), *rest.by_order()]
    place = {site.node: index for index, site in enumerate(quantised)}
    return tuple(sorted(pairs, key=lambda pair: place[pair.quantised.node]))


class _Rest:
    """The layers that have no partner yet."""

    def __init__(self, floats: list[Site], quantised: list[Site]) -> None:
        self.floats, self.quantised = floats, quantised

    def by_name(self) -> list[Pair]:
        """Those that share the name of the node, or of what it makes."""
        found = []
        for site in list(self.quantised):
            names = {_plain(site.node), *map(_plain, site.ys)}
            for other in self.floats:
                if names & {other.node, *other.ys} and _fits(other, site):
                    found.append(self._pair(other, site, "name"))
                    break
        return found

    def by_weights(self) -> list[Pair]:
        """Those whose weights are most alike, the most alike first."""
        likeness = sorted(
            (
                (-_likeness(one.weight, other.weight), i, j)
                for i, one in enumerate(self.floats)
                for j, other in enumerate(self.quantised)
                if one.weight is not None and other.weight is not None
                if one.weight.shape == other.weight.shape
            ),
        )
        floats, quantised = list(self.floats), list(self.quantised)
        return [
            self._pair(floats[i], quantised[j], "weights")
            for less, i, j in likeness
            if -less >= LEAST_LIKENESS
            if floats[i] in self.floats and quantised[j] in self.quantised
        ]

    def by_order(self) -> list[Pair]:
        """Those of one shape, if both sides have as many."""
        found = []
        for shape in {_shape(site) for site in self.quantised}:
            ones = [site for site in self.floats if _shape(site) == shape]
            others = [site for site in self.quantised if _shape(site) == shape]
            if len(ones) == len(others):
                found += [self._pair(*each, "order") for each in zip(ones, others, strict=True)]
        return found

    def _pair(self, one: Site, other: Site, matched: Matched) -> Pair:
        self.floats = [site for site in self.floats if site is not one]
        self.quantised = [site for site in self.quantised if site is not other]
        return Pair(float=one, quantised=other, matched=matched)


def _plain(name: str) -> str:
    """A name without what a converter has added to it."""
    return next((name.removesuffix(each) for each in _ENDINGS if name.endswith(each)), name)


def _fits(one: Site, other: Site) -> bool:
    return one.weight is None or other.weight is None or one.weight.shape == other.weight.shape


def _shape(site: Site) -> tuple[str, tuple[int, ...]]:
    return ("", ()) if site.weight is None else (site.op, site.weight.shape)


def _likeness(one: Array | None, other: Array | None) -> float:
    """The mean over rows of the magnitude of their cosine."""
    if one is None or other is None:
        return 0.0
    products = np.abs(np.einsum("od,od->o", one, other))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean(products / np.maximum(lengths, np.finfo(np.float32).tiny)))
