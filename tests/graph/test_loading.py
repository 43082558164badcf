"""Files that runtimes take, though the checker of onnx does not, and files that are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_models import build_proto, run
from versions import RUNTIME

from onnx_attnround import graph
from onnx_attnround.errors import ModelError

NET = "net (float[N,4] x) => (float[N,2] y) { y = MatMul(x, w) }"


def parsed(text: str, opset: int) -> onnx.ModelProto:
    """A model that no checker has seen."""
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


# --- external data behind links ----------------------------------------------------------


def write_external(folder: Path, data: str = "w.data") -> None:
    """``m.onnx``, whose weight lies in ``w.data``, which is put at ``data``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_proto(NET.replace("{", "<float[4,2] w> {", 1))
    weight = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    (folder / data).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model, folder / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    (folder / "w.data").rename(folder / data)


def link(path: Path, target: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def download_cache(root: Path) -> Path:
    write_external(root / "blobs", "aa")
    link(root / "snapshot/onnx/w.data", "../../blobs/aa")
    return link(root / "snapshot/onnx/m.onnx", "../../blobs/m.onnx")


def chain(root: Path) -> Path:
    write_external(root / "blobs")
    for folder, target in (("one", "../blobs"), ("two", "../one")):
        link(root / folder / "w.data", f"{target}/w.data")
        link(root / folder / "m.onnx", f"{target}/m.onnx")
    return root / "two/m.onnx"


def below_the_file(root: Path) -> Path:
    write_external(root / "blobs", "sub/w")
    link(root / "here/w.data", "../blobs/sub/w")
    return link(root / "here/m.onnx", "../blobs/m.onnx")


def within_the_folder(root: Path) -> Path:
    write_external(root, "sub/w")
    link(root / "w.data", "sub/w")
    return root / "m.onnx"


def link_to_the_folder(root: Path) -> Path:
    write_external(root / "real")
    return link(root / "alias", "real") / "m.onnx"


def data_elsewhere(root: Path) -> Path:
    write_external(root / "real", "../elsewhere/w")
    link(root / "real/w.data", "../elsewhere/w")
    return root / "real/m.onnx"


def both_elsewhere(root: Path) -> Path:
    write_external(root / "real", "../elsewhere/w")
    link(root / "here/w.data", "../elsewhere/w")
    return link(root / "here/m.onnx", "../real/m.onnx")


def model_alone(root: Path) -> Path:
    write_external(root / "real")
    return link(root / "here/m.onnx", "../real/m.onnx")


@pytest.mark.parametrize(
    "lay", [download_cache, chain, below_the_file, within_the_folder, link_to_the_folder]
)
def test_data_behind_links_that_onnxruntime_follows_is_read(lay, tmp_path: Path) -> None:
    path = lay(tmp_path)
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert graph.tensor_value(graph.load(path), "w").sum() == 36


@pytest.mark.parametrize("lay", [data_elsewhere, both_elsewhere, model_alone])
def test_data_behind_links_that_lead_elsewhere_is_not(lay, tmp_path: Path) -> None:
    path = lay(tmp_path)
    if RUNTIME >= (1, 24):  # older ones follow any link
        with pytest.raises(Exception, match="External data path|No such file"):
            ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(ModelError, match="outside the model's folder|does not exist"):
        graph.load(path)


def test_a_constant_of_a_node_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_external(tmp_path)
    model = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    constant = onnx.helper.make_node("Constant", [], ["w"], value=model.graph.initializer.pop())
    nodes = [constant, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = graph.load(tmp_path / "m.onnx")
    monkeypatch.chdir("/")
    assert loaded.graph.node(0).attributes["value"].as_tensor().numpy().sum() == 36


# --- GroupNormalization before opset 21 --------------------------------------------------

GROUP_NORM = """net (float[{dims}] x) => (float[{dims}] y)
<float[2] s = {{1.5, 0.5}}, float[2] b = {{0.25, -1}}> {{
    n = GroupNormalization<num_groups = 2, epsilon = 0.01>(x, s, b)
    y = Relu(n)
}}"""
IN_A_BRANCH = """net (float[N,4,3] x, bool c) => (float[N,4,3] y)
<float[2] s = {1.5, 0.5}, float[2] b = {0.25, -1}> {
    y = If(c) <then_branch = t () => (float[N,4,3] p) {
                   p = GroupNormalization<num_groups = 2>(x, s, b) },
               else_branch = e () => (float[N,4,3] q) { q = Relu(x) }>
}"""


def loaded_and_run(model: onnx.ModelProto, folder: Path, feeds: dict[str, np.ndarray]) -> tuple:
    """What ONNX Runtime gives for the file itself, and for what was loaded."""
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "in.onnx", providers=["CPUExecutionProvider"])
    loaded = graph.load(folder / "in.onnx")
    onnx.checker.check_model(ir.to_proto(loaded))
    return session.run(None, feeds)[0], run(loaded, feeds)[0]


@pytest.mark.parametrize("opset", [18, 19, 20])
@pytest.mark.parametrize("dims", ["N,4,5", "N,6,3,2", "2,4,2,3,2"])
def test_scales_of_groups_are_taken(dims: str, opset: int, tmp_path: Path) -> None:
    shape = [3 if size == "N" else int(size) for size in dims.split(",")]
    feeds = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    model = parsed(GROUP_NORM.format(dims=dims), opset)
    expected, got = loaded_and_run(model, tmp_path, feeds)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [True, False])
def test_scales_of_groups_are_taken_in_a_branch(flag: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    expected, got = loaded_and_run(
        parsed(IN_A_BRANCH, 18), tmp_path, {"x": x, "c": np.array(flag)}
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_group_norm_keeps_its_name_and_notes(tmp_path: Path) -> None:
    model = parsed(GROUP_NORM.format(dims="N,4,5"), 18)
    model.graph.node[0].name = "norm"
    model.graph.node[0].metadata_props.add(key="module", value="stem")
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    loaded = graph.load(tmp_path / "in.onnx")
    named = next(node for node in loaded.graph if node.name == "norm")
    assert (named.outputs[0].name, named.metadata_props) == ("n", {"module": "stem"})


# --- other formats -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.ort", "model.onnx"])
def test_onnxruntime_s_own_format_is_named(name: str, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = os.fspath(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(
        build_proto(NET.replace("{", "<float[4,2] w> {", 1)).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    path = (tmp_path / "model.ort").rename(tmp_path / name)
    with pytest.raises(ModelError, match=r"own format \(\.ort\).* give the ONNX file"):
        graph.load(path)
