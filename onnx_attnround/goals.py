"""What a file is asked to reach: a bound on one of its figures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from onnx_attnround.errors import ConfigError

Kind = Literal["drop", "agreement", "sqnr", "metric"]

FORMS = "drop=0.5, agreement=99, sqnr=30, metric=module:function or metric=module:function>=0.9"

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FIGURE = re.compile(rf"(drop|agreement|sqnr)=({_NUMBER})")
_METRIC = re.compile(rf"metric=([\w.]+:\w+)(?:>=({_NUMBER}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on a figure that is measured on samples to which nothing was fitted.

    ``drop``: at most ``bound`` points of top-1 lost. ``agreement``: at least ``bound``
    per cent of the classes as in the float model. ``sqnr``: at least ``bound`` dB at the
    worst output. ``metric``: ``function``, as ``module:name``, of the outputs and labels gives
    at least ``bound``; without one, at most a hundredth less than for the float model.
    """

    kind: Kind
    bound: float | None
    function: str | None = None

    @classmethod
    def parse(cls, text: str) -> Goal:
        """The goal that a text such as ``drop=0.5`` names; raises ``ConfigError``."""
        plain = "".join(text.split())
        if (found := _METRIC.fullmatch(plain)) is not None:
            bound = None if found[2] is None else float(found[2])
            return cls(kind="metric", bound=bound, function=found[1])
        if (found := _FIGURE.fullmatch(plain)) is None:
            raise ConfigError(f"expected a goal such as {FORMS}")
        kind, bound = found[1], float(found[2])
        if kind == "drop":
            return cls(kind="drop", bound=_between(kind, bound, 0, 100))
        if kind == "agreement":
            return cls(kind="agreement", bound=_between(kind, bound, 0, 100))
        return cls(kind="sqnr", bound=_between(kind, bound, -math.inf, math.inf))

    def __str__(self) -> str:
        if self.kind == "metric":
            return f"metric={self.function}" + ("" if self.bound is None else f">={self.bound:g}")
        return f"{self.kind}={self.bound:g}"


def _between(kind: str, bound: float, least: float, most: float) -> float:
    if not least <= bound <= most or not math.isfinite(bound):
        raise ConfigError(f"a goal of {kind} lies between {least:g} and {most:g}")
    return bound
