"""``python -m onnx_attnround``, and what is installed as ``onnx-attnround``."""

from __future__ import annotations

import sys

from onnx_attnround.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
