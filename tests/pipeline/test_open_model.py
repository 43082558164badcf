"""Models from files, bytes, messages and modules of PyTorch are the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from small_models import build_proto, run

from onnx_attnround import ModelError, check_model, from_torch, make_plan
from onnx_attnround.pipeline.open_model import open_model, source_of

NET = """
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w> { y = Conv(x, w) }
"""


class Net(torch.nn.Module):
    """A convolution and a dense layer, which drop nothing in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(image)))
        return self.head(self.drop(x.mean((2, 3))))


class Sum(torch.nn.Module):
    """Two inputs."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first + 2 * second


def test_every_form_is_the_same_model(tmp_path: Path) -> None:
    proto = build_proto(NET)
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    before = proto.SerializeToString(deterministic=True)
    forms: list[Any] = [path, str(path), path.read_bytes(), proto, ir.load(path)]
    for form in forms:
        plan, _ = make_plan(form)
        assert [layer.weight for layer in plan.layers] == ["w"]
        named = all(node.name for node in open_model(form).graph)
        assert named or isinstance(form, ir.Model)  # which is taken as it is
        assert not check_model(form).refused
    assert proto.SerializeToString(deterministic=True) == before
    assert [source_of(form) for form in forms] == [path, path, None, None, None]


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    proto = build_proto(NET)
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    broken = build_proto(NET)
    broken.graph.node[0].op_type = "Convolution"
    for model, message in (
        (b"no model at all", "15 bytes are not an ONNX model"),
        (b"", "the model holds no graph"),
        (proto, "tensor 'w' of the model lies in another file; give the path"),
        (broken, "the model is not a valid ONNX model: .*Convolution"),
        (Net(), r"is a torch.nn.Module.*from_torch\(model, example_inputs\)"),
        (3, "of type int, expected a path, bytes, an onnx.ModelProto"),
    ):
        with pytest.raises(ModelError, match=message):
            make_plan(model)  # type: ignore[arg-type]


@pytest.fixture(params=["torch.export", "TorchScript"])
def exporter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the exporters, the older one as where onnxscript is not installed."""
    if request.param == "TorchScript":
        found = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "onnxscript" else found(name)
        )
    elif importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    return str(request.param)


def test_a_module_is_exported_in_evaluation_mode_for_any_batch(
    exporter: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    if exporter == "torch.export" and torch.__version__.startswith("2.6."):
        pytest.skip("the exporter of torch 2.6 fails on a BatchNormalization in evaluation mode")
    module = Net()
    module.head.eval()
    image = torch.randn(3, 1, 8, 8)
    model = from_torch(module, image[:1])
    (spec,) = model.graph.inputs
    assert spec.name == "image" and spec.shape is not None and not isinstance(spec.shape[0], int)
    with torch.no_grad():
        modes = [module.training, module.conv.training, module.head.training]
        wanted = module.eval()(image).numpy()
    np.testing.assert_allclose(run(model, {"image": image.numpy()})[0], wanted, atol=1e-5)
    assert modes == [True, True, False]
    assert capfd.readouterr() == ("", "") and len(recwarn) == 0


def test_inputs_by_name_and_a_batch_as_it_is(exporter: str) -> None:
    x = torch.ones(2, 3)
    model = from_torch(Sum(), {"first": x, "second": x}, dynamic_batch=False)
    assert [list(value.shape or ()) for value in model.graph.inputs] == [[2, 3], [2, 3]]
    feeds = {"first": np.ones((2, 3), np.float32), "second": np.full((2, 3), 3, np.float32)}
    np.testing.assert_array_equal(run(model, feeds)[0], np.full((2, 3), 7))


def test_what_cannot_be_exported_names_exporter_and_remedy(exporter: str) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("nothing\nworks")

    remedy = "install onnxscript" if exporter == "TorchScript" else "give the file"
    with pytest.raises(ModelError, match=f"{exporter} cannot export Broken: .*{remedy}") as caught:
        from_torch(Broken(), torch.ones(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="example inputs are of type int, expected a tensor"):
        from_torch(Net(), 3)  # type: ignore[arg-type]
