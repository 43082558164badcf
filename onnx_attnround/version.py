"""The versions of the package and of the libraries that it runs on."""

from __future__ import annotations

from importlib import metadata


def version(distribution: str = "onnx-attnround") -> str:
    """The installed version; ``unknown`` of a package that runs from its sources alone."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
