"""What a run may take in memory: estimated beforehand, and held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import build_proto

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.errors import ConfigError

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "models"
LAYERS, SIZE = 4, 128


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4_000_000_000), ("800 MB", 800_000_000), ("1.5g", 1_500_000_000), ("7", 7), (9, 9)],
)
def test_sizes(text: object, expected: int) -> None:
    assert QuantConfig.parse({"memory_limit": text}).memory_limit == expected


@pytest.mark.parametrize("text", ["much", "4 apples", "GB", "-1GB", "1.2.3GB", 0])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="option `memory_limit`"):
        QuantConfig.parse({"memory_limit": text})


def test_an_impossible_limit_is_refused_with_what_is_needed() -> None:
    samples = np.load(MODELS / "digits_calib.npz")["input"][:16]
    config = QuantConfig(memory_limit=100_000_000)
    with pytest.raises(ConfigError, match=r"got 100MB, .* needs about \d{3}MB, .* give"):
        quantize(MODELS / "digits_resnet.onnx", samples, config)


def test_blocks_are_refused() -> None:
    samples = np.load(MODELS / "digits_calib.npz")["input"][:16]
    config = QuantConfig(memory_limit=4_000_000_000, reconstruct="block")
    with pytest.raises(ConfigError, match="`memory_limit`: it does not hold for blocks"):
        quantize(MODELS / "digits_resnet.onnx", samples, config)


def test_a_generous_limit_changes_nothing() -> None:
    samples = np.load(MODELS / "digits_calib.npz")["input"][:16]
    results = [
        quantize(MODELS / "digits_resnet.onnx", samples, QuantConfig(steps=5, memory_limit=limit))
        for limit in (None, 4_000_000_000)
    ]
    assert results[0].verification is not None
    assert results[1].verification is not None
    assert results[0].verification.outputs == results[1].verification.outputs
    assert results[0].model.metadata_props == results[1].model.metadata_props


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with few weights and large activations, and samples for it."""
    folder = tmp_path_factory.mktemp("memory")
    body = "".join(
        f"c{i} = Conv<pads = [1, 1, 1, 1]>(r{i - 1 if i else 'x'}, w{i}) r{i} = Relu(c{i})\n"
        for i in range(LAYERS)
    ).replace("rx", "x")
    weights = ", ".join(f"float[32,{32 if i else 3},3,3] w{i}" for i in range(LAYERS))
    proto = build_proto(
        f"g (float[N,3,{SIZE},{SIZE}] x) => (float[N,32,1,1] y) <{weights}> {{\n{body}"
        f"y = GlobalAveragePool(r{LAYERS - 1}) }}"
    )
    onnx.save(proto, folder / "in.onnx")
    noise = np.random.default_rng(0).normal(size=(32, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(folder / "samples.npz", x=noise)
    return folder


# Not ru_maxrss, which begins with the memory of the process that started this one.
PEAK = """
import re, sys
from pathlib import Path
from onnx_attnround.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def peak(folder: Path, *options: str) -> int:
    """Peak memory of a run in a process of its own, in bytes."""
    files = [str(folder / name) for name in ("in.onnx", "out.onnx", "samples.npz")]
    arguments = [*files[:2], "--calib", files[2], "--quiet", "--threads", "1"]
    arguments += ["--method", "nearest", "--observer", "minmax", *options]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="tells peak memory in its own way")
def test_a_limit_is_held(folder: Path) -> None:
    limit = 700_000_000
    assert peak(folder) > limit
    assert peak(folder, "--memory-limit", "700MB") <= limit
