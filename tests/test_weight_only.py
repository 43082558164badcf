"""Weights alone quantised, per channel or in blocks: files that run in MatMulNBits."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small_models import build, run
from torch import nn

from onnx_attnround import QuantConfig, QuantizeResult, graph, quantize
from onnx_attnround.__main__ import main
from onnx_attnround.check import openvino_session
from onnx_attnround.qdq.arithmetic import dequantize, spread
from onnx_attnround.records import LayerPlan
from onnx_attnround.runtime.session import open_session
from onnx_attnround.simplify import simplify

pytestmark = pytest.mark.slow

LAYERS = 8  # of the encoder, all of them matrices
COMPUTED = 30.0  # dB at least: MatMulNBits multiplies activations of 8 bits


class Encoder(nn.Module):
    """A projection, two transformer layers, the mean over tokens, a head of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(40, 64), nn.Linear(64, 10)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.wide, self.narrow = nn.Linear(64, 144), nn.Linear(144, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).split(64, -1)
        x = x + (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        return x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder")


@cache
def encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "encoder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder().eval(), (torch.randn(2, 6, 40),), str(path), dynamo=False,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )  # fmt: skip
    return path


def samples(count: int = 32) -> np.ndarray:
    """Correlated tokens, as real ones are."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(40, 40)) * np.logspace(0, -1, 40)
    return np.asarray(rng.normal(size=(count, 6, 40)) @ mixing / 3, np.float32)


def made(path: Path, bits: int, **options: Any) -> QuantizeResult:
    config = {"act_bits": 32, "weight_bits": bits, "first_last_bits": bits, "threads": 1, **options}
    return quantize(path, {"x": samples()}, QuantConfig.parse(config))


def decibels(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of the layers, with the bits of each MatMulNBits."""
    path = folder / "optimised.onnx"
    open_session(model, threads=1, optimised_model=path)
    known = ("MatMulNBits", "DequantizeLinear", "Gemm", "Conv")
    return Counter(
        node.op_type + "".join(str(item.i) for item in node.attribute if item.name == "bits")
        for node in onnx.load(path).graph.node
        if node.op_type in known
    )


def with_dequantised(model: ir.Model, result: QuantizeResult) -> ir.Model:
    """The float model, with the weights that the codes stand for."""
    out = model.clone()
    for layer in result.plan.layers:
        found = result.roundings[layer.node]
        scale, zero = (
            spread(v, found.codes.shape, found.spec) for v in (found.scale, found.zero_point)
        )
        weight = dequantize(found.codes.astype(np.float32), scale, zero.astype(np.float32))
        out.graph.initializers[layer.weight].const_value = ir.tensor(weight.astype(np.float32))
        if layer.bias and found.bias is not None:
            value = out.graph.initializers[layer.bias]
            value.const_value = ir.tensor(found.bias.reshape(value.const_value.shape))
    return out


@pytest.mark.parametrize("block", [None, 16, 32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_encoder_runs_in_matmulnbits(
    bits: int, block: int | None, folder: Path, tmp_path: Path
) -> None:
    path = encoder(folder)
    result = made(path, bits, block_size=block, smooth="never")  # weights are compared
    onnx.checker.check_model(ir.to_proto(graph.in_memory(result.model)), full_check=True)
    assert len(result.plan.layers) == LAYERS
    assert kernels(result.model, tmp_path) == {f"MatMulNBits{max(bits, 4)}": LAYERS}
    assert set(result.checked.fusion.weight_only.values()) == {"MatMulNBits"}
    wanted = run(simplify(graph.load(path))[0], {"x": samples()})[0]
    exact = run(result.model, {"x": samples()})[0]
    computed = open_session(result.model, threads=1).run(None, {"x": samples()})[0]
    assert decibels(exact, computed) > COMPUTED
    assert decibels(wanted, exact) > {2: 14, 3: 20, 4: 27, 8: 40}[bits]
    blocks = {
        (node.name or "").removesuffix("/weight/dequantize"): node.attributes.get_int(
            "block_size", 0
        )
        for node in result.model.graph
        if node.op_type == "DequantizeLinear"
    }
    assert blocks == {
        layer.node: block if block and depth(layer) > block else 0 for layer in result.plan.layers
    }
    float_model, _ = simplify(graph.load(path))
    restored = run(with_dequantised(float_model, result), {"x": samples()})[0]
    np.testing.assert_allclose(exact, restored, atol=2e-5)


def depth(layer: LayerPlan) -> int:
    return layer.weight_shape[1 - (layer.weight_spec.axis or 0)]


@pytest.mark.parametrize("block", [None, 32])
def test_two_bits_may_be_stored_as_such(
    block: int | None, folder: Path, tmp_path: Path
) -> None:
    """But for the head: ONNX Runtime reads 2-bit codes of ten columns wrongly."""
    result = made(encoder(folder), 2, block_size=block, weight_storage="packed2")
    assert kernels(result.model, tmp_path) == {"MatMulNBits2": LAYERS - 1, "MatMulNBits4": 1}
    exact = run(result.model, {"x": samples()})[0]
    computed = open_session(result.model, threads=1).run(None, {"x": samples()})[0]
    assert decibels(exact, computed) > COMPUTED


def test_the_reference_implementation_agrees(folder: Path) -> None:
    result = made(encoder(folder), 4, block_size=32, method="nearest")
    proto = ir.to_proto(graph.in_memory(result.model))
    feeds = {"x": samples(2)}
    (wanted,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(run(result.model, feeds)[0], wanted, atol=1e-4)


def test_blocks_need_no_samples(folder: Path, tmp_path: Path) -> None:
    config = QuantConfig(weight_bits=4, first_last_bits=4, block_size=32)
    result = quantize(encoder(folder), config=config, output=tmp_path / "out.onnx")
    assert kernels(graph.load(tmp_path / "out.onnx"), tmp_path) == {"MatMulNBits4": LAYERS}
    wanted = run(graph.load(encoder(folder)), {"x": samples()})[0]
    assert decibels(wanted, run(result.model, {"x": samples()})[0]) > 17


@pytest.mark.parametrize("reconstruct", ["layer", "block"])
def test_learned_rounding_pays_in_blocks_too(reconstruct: str, folder: Path) -> None:
    wanted = run(graph.load(encoder(folder)), {"x": samples()})[0]
    nearest, learned = (
        decibels(wanted, run(made(encoder(folder), 3, block_size=16, **how).model,
                             {"x": samples()})[0])
        for how in ({"method": "nearest"}, {"reconstruct": reconstruct})
    )  # fmt: skip
    assert learned > nearest + 2


def test_mixed_bits_keep_their_blocks(folder: Path) -> None:
    result = made(encoder(folder), 4, block_size=32, mean_bits=4, allocator="gram")
    assert len({rounding.spec.bits for rounding in result.roundings.values()}) > 1
    blocks = {node: rounding.spec.block_size for node, rounding in result.roundings.items()}
    assert set(blocks.values()) == {32}


@pytest.mark.skipif(not openvino_session.available(), reason="OpenVINO is not installed")
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (3, None)])
def test_openvino_runs_blocks(bits: int, block: int | None, folder: Path) -> None:
    result = made(encoder(folder), bits, block_size=block, target="openvino", method="nearest")
    compiled = openvino_session.compile_model(result.model, threads=1)
    got = openvino_session.run(compiled, {"x": samples()})["y"]
    assert decibels(run(result.model, {"x": samples()})[0], got) > COMPUTED
    sizes = Counter(rounding.spec.block_size for rounding in result.roundings.values())
    assert sizes == {None: LAYERS} if block is None else sizes[block] >= LAYERS - 3


def test_tensorrt_gets_blocks_of_four_bits_and_int8_for_the_rest(folder: Path) -> None:
    result = made(encoder(folder), 4, block_size=64, target="tensorrt", method="nearest")
    types = {
        name.removesuffix("/weight_codes"): value.dtype
        for name, value in result.model.graph.initializers.items()
        if name.endswith("/weight_codes")
    }
    for node, rounding in result.roundings.items():
        blocked = rounding.spec.block_size == 64
        assert types[node] == (ir.DataType.INT4 if blocked else ir.DataType.INT8)
    assert not result.checked.refused


RELUS = (
    "g (float[N,40] x) => (float[N,20] y) <float[40,48] a, float[32,48] b, float[32] bb, "
    "float[32,24] d, float[24] db, float[24,20] e> { p = MatMul(x, a) q = Relu(p) "
    "r = Gemm<transB=1>(q, b, bb) s = Relu(r) t = MatMul(s, d) tb = Add(t, db) u = Relu(tb) "
    "v = MatMul(u, e) y = Relu(v) }"
)


@pytest.mark.parametrize("block", [None, 16])
def test_a_relu_behind_a_layer_does_not_part_it_from_its_kernel(
    block: int | None, tmp_path: Path
) -> None:
    """The last one, an output of the model, does no harm, and stays."""
    model = build(RELUS)
    config = QuantConfig(weight_bits=4, first_last_bits=4, block_size=block)
    result = quantize(model, config=config)
    assert kernels(result.model, tmp_path) == {"MatMulNBits4": 4}
    assert list(result.checked.fusion.weight_only.values()) == ["MatMulNBits"] * 4
    assert [n.op_type for n in result.model.graph if n.op_type in ("Max", "Relu")] == [
        "Max", "Max", "Max", "Relu"
    ]  # fmt: skip
    assert result.checked.findings == ()
    feeds = {"x": samples(4)[:, 0]}
    np.testing.assert_allclose(
        run(result.model, feeds)[0], run(with_dequantised(model, result), feeds)[0], atol=2e-5
    )
    other = quantize(model, config=QuantConfig(weight_bits=4, target="openvino"))
    assert sum(node.op_type == "Relu" for node in other.model.graph) == 4


def test_convolutions_are_packed_and_run_in_float(models_dir: Path, tmp_path: Path) -> None:
    source = models_dir / "digits_resnet.onnx"
    config = QuantConfig(act_bits=32, weight_bits=4, first_last_bits=4, threads=1)
    result = quantize(source, models_dir / "digits_calib.npz", config, output=tmp_path / "out.onnx")
    types = Counter(
        value.dtype.name
        for name, value in result.model.graph.initializers.items()
        if name.endswith("/weight_codes") and value.dtype is not None
    )
    assert types == {"INT4": len(result.plan.layers)}
    unpacked = [  # once, when the file is loaded
        node.inputs[1].producer().op_type for node in result.model.graph if node.op_type == "Conv"
    ]
    assert unpacked and set(unpacked) == {"Mul"}
    assert (tmp_path / "out.onnx").stat().st_size < source.stat().st_size / 4.5
    eval_set = np.load(models_dir / "digits_eval.npz")
    logits = open_session(tmp_path / "out.onnx").run(None, {"input": eval_set["input"]})[0]
    assert float((logits.argmax(1) == eval_set["labels"]).mean()) > 0.97


def test_the_command_line_takes_a_block_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calib, output = tmp_path / "calib.npz", tmp_path / "out.onnx"
    np.savez(calib, x=samples(8))
    given = [str(encoder(folder)), str(output), "--calib", str(calib), "--block-size", "64"]
    assert main([*given, "--quiet"]) == 2
    assert "give --act-bits 32" in capsys.readouterr().err
    assert main([*given, "--act-bits", "32", "--weight-bits", "4", "--method", "nearest"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{LAYERS} of {LAYERS} layers have low-bit weights and float inputs in ONNX" in printed
    assert f"{LAYERS} by MatMulNBits" in printed
    assert "no blocks of 64, 40 inputs fill no more than one: " in printed
    assert "bits with the scales" in printed
    sizes = {node.attributes.get_int("block_size", 0) for node in graph.load(output).graph}
    assert sizes == {0, 64}
