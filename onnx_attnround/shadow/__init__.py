"""The shadow graph: an ONNX block as a differentiable torch callable.

``build.py`` cuts the block out of the graph and evaluates it, ``table.py`` is
the op table, and each other file holds the ops of one kind.
"""

from __future__ import annotations

from onnx_attnround.shadow.build import Shadow, build_shadow, unsupported

__all__ = ["Shadow", "build_shadow", "unsupported"]
