"""Models come in checked, go out whole, and keep their meaning in between."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_models import build, build_proto, run

from onnx_attnround import graph
from onnx_attnround.errors import ModelError, OutputError
from onnx_attnround.graph import saving
from onnx_attnround.records import InputSpec

SMALL = """g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
    m = MatMul(x, w)
    y = Relu(m)
}"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    path.write_bytes(build_proto(SMALL).SerializeToString())
    return path


def write_external(folder: Path, location: str = "in.onnx.data") -> Path:
    """A model whose weight says that it lies at ``location``."""
    model = build_proto(SMALL)
    weight = model.graph.initializer[0]
    data = onnx.numpy_helper.to_array(weight).tobytes()
    for field in ("float_data", "raw_data"):
        weight.ClearField(field)
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        weight.external_data.add(key=key, value=value)
    folder.mkdir(exist_ok=True)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    (folder / "in.onnx.data").write_bytes(data)
    return folder / "in.onnx"


# Loading


def test_load_reads_a_checked_model(file: Path) -> None:
    model = graph.load(file)
    assert [node.name for node in model.graph] == ["MatMul_0", "Relu_0"]
    assert graph.tensor_value(model, "w").tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


BAD_FILES = {
    "empty": (b"", "holds no graph"),
    "no graph": (b"\x08\x08", "holds no graph"),
    "truncated": (build_proto(SMALL).SerializeToString()[:-20], "truncated"),
    "text": (b"hello world\n" * 9, "not an ONNX file"),
    "zip": (b"PK\x03\x04" + bytes(99), "not an ONNX file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_load_refuses_what_is_no_model(case: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        graph.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_a_model_error(tmp_path: Path) -> None:
    model = build_proto(SMALL)
    model.opset_import.pop()  # whether that is missing cannot be seen
    data = model.SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            graph.load(path)


def test_load_refuses_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        graph.load(tmp_path / "no.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        graph.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_load_tells_of_missing_permission(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        graph.load(file)


def test_load_words_the_checker_in_one_line_with_the_node(tmp_path: Path) -> None:
    model = build_proto(SMALL)
    model.graph.node[0].op_type = "MatMool"
    model.graph.node[0].name = "layer7"
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="not a valid ONNX model: .*MatMool.*layer7") as caught:
        graph.load(path)
    assert "\n" not in str(caught.value)


def test_load_puts_nodes_in_order_as_onnx_runtime_does(tmp_path: Path) -> None:
    proto = build_proto("""g (float[N,4] x, bool c) => (float[N,4] y) {
        a = Relu(x)
        b = Neg(a)
        y = If (c) <
            then_branch = t () => (float[N,4] p) { p = Exp(b) },
            else_branch = e () => (float[N,4] q) { q = Abs(b) }>
    }""")
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = tmp_path / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    feed = {"x": np.ones((2, 4), np.float32), "c": np.array(True)}
    model = graph.load(path)
    assert [node.op_type for node in model.graph] == ["Relu", "Neg", "If"]
    np.testing.assert_array_equal(
        run(model, feed)[0], ort.InferenceSession(path).run(None, feed)[0]
    )


def test_load_refuses_sparse_weights(tmp_path: Path) -> None:
    model = build_proto(SMALL)
    weight = model.graph.initializer.pop()
    sparse = model.graph.sparse_initializer.add(dims=[4, 2])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), weight.name))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 5])))
    path = tmp_path / "sparse.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="sparse initializer 'w'"):
        graph.load(path)


def test_load_maps_external_data_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = graph.load(Path("in.onnx"))
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert graph.tensor_value(model, "w")[3].tolist() == [7, 8]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped")
def test_external_data_is_mapped_only_while_it_is_looked_at(tmp_path: Path) -> None:
    def mapped() -> bool:
        return "in.onnx.data" in Path("/proc/self/maps").read_text()

    model = graph.load(write_external(tmp_path))
    values = graph.tensor_value(model, "w")
    assert mapped()
    assert values.sum() == 36
    del values
    assert not mapped()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", ""])
def test_load_refuses_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    path = write_external(tmp_path / "models", location)
    with pytest.raises(ModelError, match="'w' in .* is outside the model's folder"):
        graph.load(path)


def test_load_refuses_external_data_behind_a_link_outside(tmp_path: Path) -> None:
    path = write_external(tmp_path / "models")
    data = path.with_name("in.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is outside the model's folder"):
        graph.load(path)


def test_load_refuses_external_data_with_hard_links(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    os.link(path.with_name("in.onnx.data"), tmp_path / "twin")
    with pytest.raises(ModelError, match="has 2 hard links"):
        graph.load(path)


def test_load_refuses_missing_short_and_garbled_external_data(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    data = path.with_name("in.onnx.data")
    data.write_bytes(bytes(31))
    with pytest.raises(ModelError, match="has 31 bytes, expected at least 32"):
        graph.load(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"'in\.onnx\.data' of tensor 'w' .* does not exist"):
        graph.load(path)
    model = onnx.load(str(path), load_external_data=False)
    model.graph.initializer[0].external_data[1].value = "many"
    path.write_bytes(model.SerializeToString())
    data.write_bytes(bytes(32))
    with pytest.raises(ModelError, match="not a valid ONNX model: .*many"):
        graph.load(path)


def test_nodes_get_unique_names_and_keep_those_they_have() -> None:
    model = build(
        """g (float[N] x, bool c) => (float[N] y) {
            a = Relu(x)
            [Relu_0] b = Relu(a)
            [twin] d = Relu(b)
            [twin] e = Relu(d)
            y = If(c) <then_branch = t () => (float[N] p) { [twin] p = Relu(e) },
                       else_branch = f () => (float[N] q) { q = Relu(e) }>
        }"""
    )
    names = [node.name for node in model.graph.all_nodes()]
    assert names[:4] == ["Relu_1", "Relu_0", "twin", "twin_0"]
    assert all(names) and len(set(names)) == len(names)
    graph.name_nodes(model)
    assert [node.name for node in model.graph.all_nodes()] == names


def test_optional_outputs_stay_unnamed(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(
        build_proto(
            """g (float[S,N,3] x, float[1,8,3] w, float[1,8,2] r) => (float[1,N,2] y) {
                , y = LSTM<hidden_size = 2>(x, w, r)
            }"""
        ).SerializeToString()
    )
    assert [value.name for value in graph.load(path).graph[0].outputs] == ["", "y"]


# Saving


def test_save_and_load_again(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    model = build(SMALL)
    model.metadata_props["by"] = "me"
    graph.save(model, path)
    again = graph.load(path)
    assert ir.to_proto(again) == ir.to_proto(model)
    assert os.listdir(tmp_path) == ["out.onnx"]


def test_save_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from onnx_attnround import graph;"
        "graph.save(graph.load(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    source = tmp_path / "in.onnx"
    source.write_bytes(build_proto(SMALL).SerializeToString())
    written = []
    for seed in ("1", "2"):
        target = tmp_path / f"out{seed}.onnx"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(source), str(target)]
        subprocess.run(command, check=True, env=environment)
        written.append(target.read_bytes())
    assert written[0] == written[1]


def test_save_takes_external_data_in(tmp_path: Path) -> None:
    model = graph.load(write_external(tmp_path / "a"))
    graph.save(model, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["a", "out.onnx"]
    assert graph.tensor_value(graph.load(tmp_path / "out.onnx"), "w")[3].tolist() == [7, 8]
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def large_model(seed: int = 0) -> ir.Model:
    model = build("g (float[N,40] x, float[40,30] w) => (float[N,30] y) { y = MatMul(x, w) }")
    weight = model.graph.inputs.pop()
    data = np.random.default_rng(seed).normal(size=(40, 30)).astype(np.float32)
    weight.const_value = ir.tensor(data, name="w")
    model.graph.register_initializer(weight)
    return model


def test_save_above_the_limit_writes_weights_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "INLINE_LIMIT", 1000)
    model, path = large_model(), tmp_path / "out.onnx"
    before = ir.to_proto(model)
    graph.save(model, path)
    name, data = sorted(os.listdir(tmp_path))
    assert name == "out.onnx"
    assert re.fullmatch(r"out\.onnx\.[0-9a-f]{12}\.data", data)
    assert (tmp_path / data).stat().st_size == 4800
    assert path.stat().st_size < 1000
    assert ir.to_proto(model) == before
    again = graph.load(path)
    np.testing.assert_array_equal(graph.tensor_value(again, "w"), graph.tensor_value(model, "w"))
    ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first = contents(tmp_path)
    graph.save(model, path)
    assert contents(tmp_path) == first


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_model_is_never_beside_the_weights_of_another(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes between the two files, the older model finds its own weights."""

    def replace(file: Path, target: Path) -> None:
        if target == path:
            raise failure
        os.replace(file, target)

    monkeypatch.setattr(saving, "INLINE_LIMIT", 1000)
    path = tmp_path / "out.onnx"
    graph.save(large_model(seed=1), path)
    older = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises((OutputError, KeyboardInterrupt)):
        patch.setattr(Path, "replace", replace)
        graph.save(large_model(seed=2), path)
    assert contents(tmp_path) == older
    graph.save(large_model(seed=2), path)
    assert len(contents(tmp_path)) == 2
    got = graph.tensor_value(graph.load(path), "w")
    np.testing.assert_array_equal(got, graph.tensor_value(large_model(seed=2), "w"))


def test_only_weights_that_nobody_needs_go_with_an_older_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "INLINE_LIMIT", 1000)
    path, copy = tmp_path / "out.onnx", tmp_path / "copy.onnx"
    graph.save(large_model(seed=1), path)
    copy.write_bytes(path.read_bytes())
    for name in ("out.onnx.data", "out.onnx.0123456789ab.data", "other.onnx.0123456789ab.data"):
        (tmp_path / name).write_bytes(b"x")
    before = contents(tmp_path)
    graph.save(graph.load(copy), path, source=copy)
    assert contents(tmp_path).items() >= before.items() - {("out.onnx", before["out.onnx"])}
    monkeypatch.setattr(saving, "INLINE_LIMIT", saving.INLINE_LIMIT << 20)
    graph.save(large_model(seed=3), path)
    gone = before.keys() - contents(tmp_path).keys()
    assert len(gone) == 1
    assert graph.tensor_value(graph.load(path), "w").shape == (40, 30)


@pytest.mark.parametrize("limit", [1000, saving.INLINE_LIMIT])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_output_and_nothing_else(
    limit: int, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(saving, "INLINE_LIMIT", limit)
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        graph.save(large_model(), path)
    if isinstance(failure, OSError):
        assert "No space left on device; free some space" in str(caught.value)
    assert os.listdir(tmp_path) == ["out.onnx"]
    assert path.read_bytes() == b"old"


def test_save_replaces_an_old_output_and_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    old = os.umask(0o022)
    try:
        graph.save(build(SMALL), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    graph.load(path)


def test_save_refuses_the_input_itself(file: Path) -> None:
    model, data = graph.load(file), file.read_bytes()
    link = file.with_name("link.onnx")
    link.symlink_to(file)
    for path in (file, link, file.parent / "." / "in.onnx"):
        with pytest.raises(OutputError, match="is the input model itself"):
            graph.save(model, path, source=file)
    assert file.read_bytes() == data
    graph.save(model, file.with_name("out.onnx"), source=file)


def test_save_refuses_impossible_places(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"folder '.*no' of the output does not exist; create"):
        graph.save(build(SMALL), tmp_path / "no" / "out.onnx")
    with pytest.raises(OutputError, match="is a folder; give the name of a file"):
        graph.save(build(SMALL), tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        graph.write_atomic(tmp_path / "no" / "report.json", b"{}")


def test_save_refuses_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match="is not writable: Read-only file system; choose"):
        graph.check_output(tmp_path / "out.onnx")


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    graph.write_atomic(path, b"{}")
    graph.write_atomic(path, b"[]")
    assert path.read_bytes() == b"[]"
    monkeypatch.chdir(tmp_path)
    graph.write_atomic(Path("other.json"), b"1")
    assert sorted(os.listdir(tmp_path)) == ["other.json", "report.json"]


# Reading and editing


def test_input_specs_leave_default_values_out() -> None:
    model = build(
        """g (float[N,3,?,32] image, int64[1] k, uint8 flag, float[2] w = {1, 2})
        => (float[N,3,?,32] y) { y = Relu(image) }"""
    )
    assert graph.input_specs(model) == (
        InputSpec(name="image", dtype=np.dtype("float32"), shape=(None, 3, None, 32)),
        InputSpec(name="k", dtype=np.dtype("int64"), shape=(1,)),
        InputSpec(name="flag", dtype=np.dtype("uint8"), shape=()),
    )


def test_input_specs_read_minus_one_as_dynamic() -> None:
    model = build("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape([-1, 3])
    assert graph.input_specs(model)[0].shape == (None, 3)


@pytest.mark.parametrize("kind", ["seq(float[N])", "float"])
def test_input_specs_refuse_what_cannot_be_fed(kind: str) -> None:
    model = build(f"g ({kind} x) => ({kind} y) {{ y = Identity(x) }}")
    if kind == "float":
        model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="input 'x' has type .* known number of dimensions"):
        graph.input_specs(model)


def test_tensor_value_of_no_constant() -> None:
    with pytest.raises(ModelError, match="'m' is not a constant"):
        graph.tensor_value(build(SMALL), "m")


BRANCHES = """g (float[N,2] x, bool c) => (float[N,2] y, float[N,2] z) <float[2] w = {1, 2}> {
    a = Add(x, w)
    b = Mul(a, w)
    p = If(c) <then_branch = t () => (float[N,2] q) { q = Relu(b) },
               else_branch = f () => (float[N,2] r) { r = Neg(b) }>
    y = Sqrt(p)
    z = Exp(x)
}"""


def test_with_outputs_keeps_what_they_need() -> None:
    model = build(BRANCHES)
    before = ir.to_proto(model)
    result = graph.with_outputs(model, ["p", "a"])
    assert [value.name for value in result.graph.outputs] == ["p", "a"]
    assert [node.op_type for node in result.graph] == ["Add", "Mul", "If"]
    assert [value.name for value in result.graph.inputs] == ["x", "c"]
    assert ir.to_proto(model) == before
    x = np.array([[1, -5]], np.float32)
    p, a = run(result, {"x": x, "c": np.array(False)})
    np.testing.assert_array_equal(a, x + np.array([1, 2]))
    np.testing.assert_array_equal(p, -(a * [1, 2]))


def test_with_outputs_of_inputs_and_constants() -> None:
    result = graph.with_outputs(build(BRANCHES), ["x", "w"])
    x = np.array([[1, -5]], np.float32)
    outputs = run(result, {"x": x, "c": np.array(False)})
    np.testing.assert_array_equal(outputs[0], x)
    np.testing.assert_array_equal(outputs[1], [1, 2])


def test_with_outputs_refuses_unknown_names() -> None:
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        graph.with_outputs(build(SMALL), ["y", "nothing"])


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv2_cifar"])
def test_shared_models_survive_all_of_it(name: str, data_dir: Path, tmp_path: Path) -> None:
    model = graph.load(data_dir / f"{name}.onnx")
    assert graph.input_specs(model) == (
        InputSpec(name="input", dtype=np.dtype("float32"), shape=(None, 3, 32, 32)),
    )
    raised = graph.raise_opset(model, 21)
    graph.save(raised, tmp_path / "out.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    again = graph.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(model, {"input": x})[0], run(again, {"input": x})[0])


def test_text_that_is_no_text_is_refused_with_protobuf_in_python_too(tmp_path: Path) -> None:
    """Which is slower, and raises other errors; some packages switch to it."""
    path = tmp_path / "model.onnx"
    text = "g (float[N] x) => (float[N] y) { y = Relu(x) }"
    data = build_proto(text).SerializeToString()
    assert data.count(b'"\x04Relu') == 1
    path.write_bytes(data.replace(b'"\x04Relu', b'"\x04Re\xfau'))
    code = (
        "import sys, pathlib; from onnx_attnround import ModelError, graph\n"
        "try: graph.load(pathlib.Path(sys.argv[1]))\n"
        "except ModelError as error: print(error)"
    )
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "is not an ONNX file" in done.stdout


def test_an_input_of_no_type_is_refused() -> None:
    model = build("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.UNDEFINED)
    with pytest.raises(ModelError, match="input 'x' has type UNDEFINED"):
        graph.input_specs(model)
