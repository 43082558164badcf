"""The oldest ONNX Runtime that loads a file, by what the file contains.

From loading probe files in the releases 1.17.3, 1.18.1, 1.20.1, 1.21.1, 1.22.1,
1.23.2, 1.24.4, 1.25.1 and 1.26.0 on x86-64 (docs/targets.md); what 1.17 loads may
load in older ones too.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_attnround.check.view import View

_BY_OPSET = {20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}
_BY_IR = {9: "1.17", 10: "1.18", 11: "1.23", 13: "1.24"}
_BY_CODES = {"INT4": "1.20", "UINT4": "1.20", "INT2": "1.24", "UINT2": "1.24"}
_BY_CAST = {"INT4": "1.23.2", "UINT4": "1.23.2", "INT2": "1.24.4", "UINT2": "1.24.4"}


def oldest_onnxruntime(view: View) -> str | None:
    """The oldest release tried that loads a file of this kind, ``None`` for newer kinds."""
    releases = list(_needed(view))
    if None in releases:
        return None
    return max((r for r in releases if r is not None), key=_order)


def _needed(view: View) -> Iterator[str | None]:
    for table, version in ((_BY_OPSET, view.opset), (_BY_IR, view.model.ir_version)):
        yield next((release for limit, release in table.items() if version <= limit), None)
    for link in view.links:
        yield _BY_CODES.get(link.codes.name, "1.17")
        if link.stored is not None and link.stored != link.codes:
            yield _BY_CAST.get(link.stored.name, "1.17")


def _order(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))
