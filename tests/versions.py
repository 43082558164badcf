"""What the oldest releases that the package allows lack."""

from __future__ import annotations

import onnxruntime as ort
import pytest

RUNTIME = tuple(map(int, ort.__version__.split(".")[:2]))
"""Major and minor number of ONNX Runtime."""

needs_runtime_1_24 = pytest.mark.skipif(
    RUNTIME < (1, 24), reason="ONNX Runtime 1.23 does not fuse or load this, or does it otherwise"
)
