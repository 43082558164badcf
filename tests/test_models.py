"""The sample models are what their cards say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

pytestmark = pytest.mark.slow

NAMES = ("digits_resnet", "digits_mobilenet")
MODEL_BYTES = 700_000
FOLDER_BYTES = 2_000_000


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, models_dir: Path) -> Path:
    return models_dir / f"{request.param}.onnx"


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_model_is_valid_onnx_of_the_stated_form(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    assert (x.name, x.type, x.shape) == ("input", "tensor(float)", ["N", 1, 8, 8])
    assert (y.name, y.type, y.shape) == ("logits", "tensor(float)", ["N", 10])


def test_accuracy_is_that_of_the_card(path: Path) -> None:
    stated = re.search(r"\| Float top-1 \| \*\*([\d.]+)\*\*", path.with_suffix(".md").read_text())
    assert stated is not None
    samples = np.load(path.with_name("digits_eval.npz"))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input": samples["input"]})[0]
    top1 = float((logits.argmax(1) == samples["labels"]).mean())
    assert top1 == pytest.approx(float(stated[1]), abs=1e-3)
    assert top1 >= 0.98


def test_logits_do_not_depend_on_the_batch(path: Path) -> None:
    """True of BatchNormalization only if it uses the trained statistics."""
    x = np.load(path.with_name("digits_eval.npz"))["input"][:8]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    together = session.run(None, {"input": x})[0]
    alone = np.concatenate([session.run(None, {"input": x[i : i + 1]})[0] for i in range(len(x))])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_resnet_has_its_batch_norm_folded(models_dir: Path) -> None:
    found = ops(models_dir / "digits_resnet.onnx")
    assert found["BatchNormalization"] == 0
    assert (found["Conv"], found["Add"], found["Gemm"]) == (8, 3, 1)


def test_mobilenet_keeps_its_batch_norm_and_is_depthwise(models_dir: Path) -> None:
    found = ops(models_dir / "digits_mobilenet.onnx")
    assert found["BatchNormalization"] == found["Conv"] == 14
    assert found["Clip"] > 0
    convs = [n for n in onnx.load(models_dir / "digits_mobilenet.onnx").graph.node
             if n.op_type == "Conv"]
    groups = [a.i for n in convs for a in n.attribute if a.name == "group"]
    assert sum(g > 1 for g in groups) == 4


def test_samples_have_the_stated_form_and_do_not_overlap(models_dir: Path) -> None:
    calib = np.load(models_dir / "digits_calib.npz")
    held_out = np.load(models_dir / "digits_eval.npz")
    assert calib.files == ["input"]
    assert sorted(held_out.files) == ["input", "labels"]
    assert calib["input"].shape == (512, 1, 8, 8)
    assert held_out["input"].shape == (len(held_out["labels"]), 1, 8, 8)
    for x in (calib["input"], held_out["input"]):
        assert x.dtype == np.float32
        assert (x.min(), x.max()) == (0, 1)
    seen = {x.tobytes() for x in calib["input"]}
    assert not any(x.tobytes() in seen for x in held_out["input"])


def test_size_budget(models_dir: Path) -> None:
    sizes = {p.name: p.stat().st_size for p in models_dir.iterdir()}
    assert all(sizes[f"{name}.onnx"] < MODEL_BYTES for name in NAMES)
    assert sum(sizes.values()) < FOLDER_BYTES
