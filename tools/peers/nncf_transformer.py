"""NNCF on a transformer: post-training quantisation with its SmoothQuant; for tools/encoders.py.

python nncf_transformer.py MODEL.onnx SAMPLES OUT.onnx, where SAMPLES is a folder of .npz files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import onnx


def main() -> None:
    model, samples, output = sys.argv[1:]
    feeds = [dict(np.load(path)) for path in sorted(Path(samples).iterdir())]
    quantised = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    onnx.save(quantised, output)


if __name__ == "__main__":
    main()
