"""Networks as PyTorch's two exporters and skl2onnx write them: nothing lost, at 8 and at 4 bits."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checked_conversion import Feeds, convert, layers
from exported_models import NETWORKS, network

pytestmark = pytest.mark.slow

BITS = {8: 30.0, 4: 20.0}  # and the SQNR in dB that random weights reach at least

LAYERS = {
    "classifier": {"Conv": 2, "Gemm": 1},
    "detector": {"Conv": 8},
    "u-net": {"Conv": 3, "ConvTranspose": 1},
    "recurrent": {"MatMul": 2},
    "transformer": {"MatMul": 9},
    "audio": {"Conv": 3, "ConvTranspose": 1},
    "volume": {"Conv": 2, "Gemm": 1},
    "super-resolution": {"Conv": 2},
    "mobile": {"Conv": 5, "Gemm": 1},
    "two inputs": {"Conv": 4, "Gemm": 1},
}
LOOKED_UP = "its table is small: it stays float"
STAYS = {
    "recurrent": {f"{op} is not handled: its weights stay float" for op in ("LSTM", "GRU")},
    "transformer": {"no constant weight", LOOKED_UP},
}


@cache
def exported(name: str, folder: Path, *, dynamo: bool) -> tuple[Path, list[Feeds]]:
    """The file that the exporter writes, with a dynamic batch, and 16 samples."""
    model, batch = network(name)
    inputs = list(inspect.signature(model.forward).parameters)
    path = folder / f"{name}-{dynamo}.onnx"
    axes = {"dynamic_shapes": tuple({0: "batch"} for _ in inputs)} if dynamo else {
        "dynamic_axes": {key: {0: "batch"} for key in inputs}
    }  # fmt: skip
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, batch, str(path), input_names=inputs, dynamo=dynamo, verbose=False, **axes
        )
    _, maker = NETWORKS[name]
    samples = [dict(zip(inputs, (t.numpy() for t in maker()), strict=True)) for _ in range(8)]
    return path, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_from_pytorch(
    name: str, dynamo: bool, bits: int, folder: Path, tmp_path: Path
) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    path, samples = exported(name, folder, dynamo=dynamo)
    result = convert(
        path, tmp_path, samples, sqnr=BITS[bits], weight_bits=bits, first_last_bits=bits
    )
    assert Counter(layers(result)) == LAYERS[name]
    assert set(result.plan.skipped.values()) == STAYS.get(name, set())
    assert result.verification is not None
    assert result.verification.samples == 16


def test_a_network_from_scikit_learn(tmp_path: Path) -> None:
    skl2onnx = pytest.importorskip("skl2onnx")
    neural_network = pytest.importorskip("sklearn.neural_network")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    y = (x[:, 0] > x[:, 1]).astype(np.int64)
    model = neural_network.MLPClassifier((12,), max_iter=200, random_state=0).fit(x, y)
    proto = skl2onnx.to_onnx(model, x[:1], options={"zipmap": False})
    assert isinstance(proto, onnx.ModelProto)
    for bits, sqnr in BITS.items():
        result = convert(
            proto, tmp_path, [{"X": x[:16]}], sqnr=sqnr, weight_bits=bits, first_last_bits=bits
        )
        assert layers(result) == ["Gemm", "Gemm"]
        assert result.verification is not None
        names = [output.name for output in result.verification.outputs]
        assert names == ["label", "probabilities"]
