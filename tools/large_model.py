"""Build a model of gigabytes, convert it in a process of its own, and tell what that took.

    python tools/large_model.py --folder /tmp/large --layers 38 --width 4096 -- --act-bits 32

A stack of MatMul and Relu with random weights, which are written one by one. What stands
behind ``--`` goes to the command line of onnx_attnround; ``{folder}/samples.npz`` holds 16
samples. Peak memory is that of the child (``ru_maxrss``), imports and mapped files included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx


def build(folder: Path, layers: int, width: int) -> Path:
    """The model, its weights in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    graph = onnx.GraphProto(name="large")
    gain = np.float32((2 / width) ** 0.5)
    with (folder / "in.onnx.data").open("wb") as file:
        for index in range(layers):
            weight = gain * rng.standard_normal((width, width), dtype=np.float32)
            add_layer(graph, index, weight, file.tell())
            weight.tofile(file)
    for kind, name in ((graph.input, "x0"), (graph.output, f"x{layers}")):
        kind.append(onnx.helper.make_tensor_value_info(name, 1, ["N", width]))
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    samples = rng.standard_normal((16, width), dtype=np.float32)
    np.savez(folder / "samples.npz", x0=samples)
    return folder / "in.onnx"


def add_layer(graph: onnx.GraphProto, index: int, weight: np.ndarray, offset: int) -> None:
    """A MatMul with its weight at ``offset`` of the data file, and a Relu."""
    tensor = graph.initializer.add(name=f"w{index}", data_type=1, dims=weight.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": "in.onnx.data", "offset": offset, "length": weight.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    graph.node.add(op_type="MatMul", input=[f"x{index}", f"w{index}"], output=[f"m{index}"])
    graph.node.add(op_type="Relu", input=[f"m{index}"], output=[f"x{index + 1}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=38)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    model = given.folder / "in.onnx"
    if not model.is_file():
        model = build(given.folder, given.layers, given.width)
    output = given.folder / "out.onnx"
    options = [option.format(folder=given.folder) for option in given.options]
    start = time.perf_counter()
    command = [sys.executable, "-m", "onnx_attnround", str(model), str(output), *options]
    code = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"exit code {code}, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    for file in (model, output):
        size = sum(part.stat().st_size for part in given.folder.glob(f"{file.name}*"))
        print(f"{file.name}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
