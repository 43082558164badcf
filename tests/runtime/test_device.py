"""Layers are rounded on any device alike, and ONNX Runtime shares its memory with torch there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fake_device import DEVICE, Far, run_on_far
from layered_models import LAYERED, layered, noise
from small_models import build

from onnx_attnround import QuantConfig, QuantizeResult, pipeline, quantize
from onnx_attnround.__main__ import main
from onnx_attnround.errors import ConfigError
from onnx_attnround.reconstruct import blockwise, layerwise, sensitivity, walk
from onnx_attnround.reconstruct.activation_store import ActivationStore
from onnx_attnround.rounding import methods
from onnx_attnround.runtime import device
from onnx_attnround.runtime import session as sessions
from onnx_attnround.runtime.device import CPU, Value, fetched, open_device, placed, run_on
from onnx_attnround.runtime.session import open_session

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "models"
KINDS = """g (float[N,3] x, bool[M] b, uint16[L] q, int64[K] i)
    => (float[N,3] y, bool[M] c, uint16[L] r, int64[K] j, float s)
    { y = Relu(x)  c = Not(b)  r = Identity(q)  j = Identity(i)  s = ReduceSum<keepdims=0>(x) }"""
FEEDS = {
    "x": np.float32([[1, -2, 3], [-4, 5, -6]]),
    "b": np.array([True, False, True]),
    "q": np.uint16([1, 65535]),
    "i": np.int64([-1, 1 << 40]),
}


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, Value]:
    return {name: placed(values, CPU) for name, values in feeds.items()}


@pytest.mark.parametrize("rows", [2, 0])
def test_a_bound_run_gives_what_a_run_gives(rows: int) -> None:
    session = open_session(build(KINDS), threads=1)
    feeds = {**FEEDS, "x": FEEDS["x"][:rows]}
    names = ["s", "c", "y", "r", "j"]
    wanted = session.run(names, feeds)
    got = run_on(CPU, session, names, tensors(feeds))
    assert all(isinstance(value, torch.Tensor) for value in got)
    for value, expected in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(fetched(value), expected)
        assert fetched(value).dtype == np.asarray(expected).dtype


def test_outputs_outlive_the_session_and_the_next_run() -> None:
    session = open_session(build("g (float[N] x) => (float[N] y) { y = Relu(x) }"), threads=1)
    first = run_on(CPU, session, ["y"], {"x": torch.arange(5.0)})[0]
    second = run_on(CPU, session, ["y"], {"x": -torch.arange(5.0)})[0]
    del session
    np.testing.assert_array_equal(fetched(first), np.arange(5.0))
    np.testing.assert_array_equal(fetched(second), np.zeros(5))


def test_feeds_need_not_be_contiguous() -> None:
    session = open_session(build("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }"), threads=1)
    x = torch.arange(6.0).reshape(2, 3).T
    (y,) = run_on(CPU, session, ["y"], {"x": x})
    np.testing.assert_array_equal(fetched(y), x.numpy())


def test_text_goes_through_as_arrays() -> None:
    session = open_session(
        build("""g (string[N] t, float[N] x) => (string[N] u, float[N] y)
            { u = Identity(t)  y = Relu(x) }"""), threads=1)  # fmt: skip
    words = np.array(["a", "bc"], object)
    u, y = run_on(CPU, session, ["u", "y"], tensors({"t": words, "x": np.float32([1, -1])}))
    np.testing.assert_array_equal(u, words)
    np.testing.assert_array_equal(fetched(y), [1, 0])


def test_only_what_may_be_written_to_is_shared() -> None:
    values = np.arange(4.0)
    shared = placed(values, CPU)
    values.flags.writeable = False
    copied = placed(values, CPU)
    assert isinstance(shared, torch.Tensor)
    assert isinstance(copied, torch.Tensor)
    assert shared.data_ptr() == values.ctypes.data != copied.data_ptr()
    np.testing.assert_array_equal(copied.numpy(), values)


def test_on_the_cpu_settings_of_cudnn_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tells its older flags from the newer ones with an error."""
    monkeypatch.setattr(torch.backends.cudnn, "fp32_precision", "ieee")
    with device.exact(CPU):
        assert torch.backends.cudnn.fp32_precision == "ieee"


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_cuda_without_a_gpu_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"`device`: got cuda, and PyTorch .* `device` cpu"):
        open_device("cuda")
    with pytest.raises(ConfigError, match="cannot start its CUDAExecutionProvider; install"):
        open_session(build("g (float[N] x) => (float[N] y) { y = Relu(x) }"), device="cuda")
    out = tmp_path / "out.onnx"
    arguments = [str(MODELS / "digits_resnet.onnx"), str(out), "--device", "cuda"]
    assert main(arguments) == 2
    assert "error: option --device: got cuda" in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="option `device`: .* 'cpu' or 'cuda', got 'tpu'"):
        QuantConfig.parse({"device": "tpu"})


# --- a device that tells its tensors from those of the CPU --------------------------------


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """In place of a GPU, and used."""
    before = Far.operators
    for module in (device, layerwise, sensitivity, walk):
        monkeypatch.setattr(module, "open_device", lambda name: DEVICE if name == "cuda" else CPU)
    monkeypatch.setattr(walk, "run_on", run_on_far(run_on))
    monkeypatch.setattr(methods, "RESAMPLES", 2)  # each operator takes its time there
    for name in ("cuda", DEVICE.type):
        monkeypatch.setitem(sessions._PROVIDERS, name, sessions._PROVIDERS["cpu"])
    yield DEVICE
    assert Far.operators > before


def test_a_far_tensor_mixes_with_none_on_the_cpu(far: torch.device) -> None:
    x = torch.ones(2, 3).to(far)
    assert isinstance(x + 1.0, Far)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(2, 3)
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    np.testing.assert_array_equal(fetched(x @ torch.ones(3, 1, device=far)), [[3], [3]])


def on_both(
    model: ir.Model | Path, feeds: dict[str, np.ndarray], **options: Any
) -> tuple[QuantizeResult, QuantizeResult]:
    options = {"weight_bits": 3, "steps": 5, "threads": 1, **options}
    near, far = (
        quantize(model, feeds, QuantConfig(device=name, **options)) for name in ("cpu", "cuda")
    )
    return near, far


def assert_same(one: QuantizeResult, other: QuantizeResult) -> None:
    assert one.allocation.bits == other.allocation.bits
    for node, wanted in one.roundings.items():
        found = other.roundings[node]
        np.testing.assert_array_equal(found.codes, wanted.codes)
        np.testing.assert_array_equal(found.scale, wanted.scale)
        assert (found.bias is None) == (wanted.bias is None)
        if wanted.bias is not None:
            np.testing.assert_array_equal(found.bias, wanted.bias)
        assert found.mse_final == wanted.mse_final


@pytest.mark.parametrize("name", LAYERED)
def test_layers_are_rounded_alike_on_any_device(name: str, far: torch.device) -> None:
    assert_same(*on_both(layered(name), noise(layered(name))))


@pytest.mark.parametrize(
    "options",
    [
        {"act_bits": 16},
        {"act_bits": 32, "block_size": 16},
        {"method": "adaround"},
        {"mean_bits": 4, "allocator": "gram"},
        {"batch_size": 7},
    ],
    ids="-".join,
)
def test_every_way_of_rounding_runs_on_any_device(
    options: dict[str, Any], far: torch.device
) -> None:
    images = {"input": np.load(MODELS / "digits_calib.npz")["input"][:48]}
    assert_same(*on_both(MODELS / "digits_resnet.onnx", images, **options))


def test_activations_come_back_from_disk_to_any_device(
    far: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spilled: list[torch.Tensor] = []
    spill = ActivationStore._spill

    def counted(store: ActivationStore, tensor: torch.Tensor) -> Any:
        spilled.append(tensor)
        return spill(store, tensor)

    monkeypatch.setattr(ActivationStore, "_spill", counted)
    monkeypatch.setattr(walk, "room_on", lambda device, budget: 1000)
    assert_same(*on_both(layered("residual"), noise(layered("residual"))))
    assert any(isinstance(tensor, Far) for tensor in spilled)


def test_wide_layers_are_rounded_alike_on_any_device(
    far: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_attnround.rounding.moments.WIDE", 8)
    assert_same(*on_both(layered("chain"), noise(layered("chain"))))


BLOCKS = {
    "a float made of a shape": """g (float[N,2,6,6] x) => (float[N,2,6,6] y, float[2] f)
        <float[4,2,1,1] v, float[2,4,1,1] w, int64[1] two = {2}, int64[1] four = {4}>
        { a = Conv(x, v)  b = Relu(a)  y = Conv(b, w)
          s = Shape(b)  t = Slice(s, two, four)  f = Cast<to=1>(t) }""",
    "resized": """g (float[N,2,6,6] x) => (float[N,2,12,12] y)
        <float[4,2,1,1] v, float[2,4,1,1] w, float[4] by = {1, 1, 2, 2}>
        { a = Conv(x, v)  b = Resize<mode="nearest">(a, , by)  y = Conv(b, w) }""",
}


@pytest.mark.parametrize("text", BLOCKS.values(), ids=BLOCKS)
def test_shapes_in_blocks_stay_on_the_cpu(
    text: str, far: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "STEPS", 5)
    monkeypatch.setattr(pipeline, "output_sqnr", lambda *given: 0.0)
    one, other = on_both(build(text), noise(build(text)), reconstruct="block")
    assert_same(one, other)
    assert one.blocks == other.blocks
    assert not any(block.skipped for block in one.blocks)


@pytest.mark.parametrize("name", LAYERED)
def test_blocks_are_refined_alike_on_any_device(
    name: str, far: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "STEPS", 5)
    monkeypatch.setattr(pipeline, "output_sqnr", lambda *given: 0.0)
    one, other = on_both(layered(name), noise(layered(name)), reconstruct="block", act_bits=4)
    assert_same(one, other)
    assert one.blocks == other.blocks


# --- a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["layer", "block"])
def test_a_gpu_rounds_as_well_as_a_cpu(how: str) -> None:
    """Sums in another order make other codes of near ties, and the error the same."""
    images = {"input": np.load(MODELS / "digits_calib.npz")["input"][:256]}
    near, far = on_both(MODELS / "digits_resnet.onnx", images, reconstruct=how, steps=50)
    assert near.verification is not None
    assert far.verification is not None
    gap = near.verification.outputs[0].sqnr_db - far.verification.outputs[0].sqnr_db
    assert abs(gap) < 0.5
    for node, wanted in near.roundings.items():
        assert far.roundings[node].mse_final == pytest.approx(wanted.mse_final, rel=0.1)
