"""How a user's choices are read and judged: TOML files, and a mistake told in one sentence."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnx_attnround.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number, neither infinite nor NaN."""

_NEAR = 0.55
"""The least likeness to a key, of 1 for the same: "evaluation" is to be near "eval"."""


class Settings(BaseModel):
    """A frozen record of choices; a mistake is a ``ConfigError`` of one line, however it is made.

    ``noun`` is what messages call one of the keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    noun: ClassVar[str] = "option"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            fields = type(self).model_fields
            unions = [key for key, field in fields.items() if _is_union(field.annotation)]
            raise ConfigError(first_mistake(error, self.noun, fields, unions)) from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file; raises ``ConfigError`` that calls it ``what``."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {what} '{path}': {error}") from error


def first_mistake(
    error: ValidationError, noun: str, known: Iterable[str], unions: Collection[str] = ()
) -> str:
    """What pydantic found first, as a sentence about one of the ``known`` keys.

    ``unions`` are keys that take several types, whose names pydantic adds to the place.
    """
    first = error.errors()[0]
    key, *within = first["loc"] or ("",)
    quote = "`" if noun == "option" else "'"  # what has backticks is an option elsewhere
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown(noun, str(key), known, quote)
    if first["type"] == "missing":
        return f"{noun} {quote}{key}{quote} is missing"
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if not key:
        return message
    place = "" if key in unions else "".join(map(_place, within))
    return f"{noun} {quote}{key}{quote}{place}: {message}, got {first['input']!r}"


def unknown(noun: str, key: str, known: Iterable[str], quote: str = "`") -> str:
    """A sentence on a key that there is not: which one it resembles, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(key.replace("-", "_"), known, 1, _NEAR)
    meant = f"did you mean {quote}{near[0]}{quote}? " if near else ""
    return f"unknown {noun} {quote}{key}{quote}: {meant}expected one of {', '.join(known)}"


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _place(within: int | str) -> str:
    return f", item {within + 1}" if isinstance(within, int) else f", '{within}'"
