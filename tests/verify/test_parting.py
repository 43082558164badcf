"""compare: layers are found in files of every make, and the one that was broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import quantization
from small_models import build

from onnx_attnround import compare, graph, quantize
from onnx_attnround.errors import CalibrationError, ModelError
from onnx_attnround.report.result import Compared
from onnx_attnround.verify.pairs import match
from onnx_attnround.verify.sites import find_sites

pytestmark = pytest.mark.slow
LAYER = "/4/branch/branch.3/Conv"
Files = dict[str, Path]


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Sixty-four samples, once."""

    def __init__(self, samples: np.ndarray) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = iter([{"input": samples[:64]}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.fixture(scope="module")
def samples(models_dir: Path) -> np.ndarray:
    found: np.ndarray = np.load(models_dir / "digits_calib.npz")["input"]
    return found


@pytest.fixture(scope="module")
def files(
    models_dir: Path, samples: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Files:
    """The model of the digits as ONNX Runtime's own tools and as we quantise it."""
    folder, source = tmp_path_factory.mktemp("foreign"), models_dir / "digits_resnet.onnx"
    made = {name: folder / f"{name}.onnx" for name in ("QDQ", "QOperator", "dynamic", "ours")}
    for name in ("QDQ", "QOperator"):
        quantization.quantize_static(
            str(source), str(made[name]), Reader(samples), per_channel=True,
            quant_format=quantization.QuantFormat[name],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=name == "QOperator",  # of 8 bits it is wrong on x86-64 without VNNI
        )  # fmt: skip
    quantization.quantize_dynamic(str(source), str(made["dynamic"]))
    settings: dict[str, Any] = {"weight_bits": 4, "method": "nearest", "threads": 1}
    quantize(source, samples[:64], output=made["ours"], **settings)
    return {"float": source, **made}


def found_in(files: Files, name: str | Path, samples: np.ndarray) -> Compared:
    file = files[name] if isinstance(name, str) else name
    return compare(files["float"], file, samples[-64:], threads=1)


def anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with other names of all nodes and of all values but inputs and outputs."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
        for names in (node.input, node.output):
            names[:] = [name if name in kept else f"v.{name[::-1]}" for name in names]
    for tensor in model.graph.initializer:
        tensor.name = f"v.{tensor.name[::-1]}"
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("name", ["QDQ", "QOperator", "dynamic", "ours"])
def test_all_layers_are_found_in_files_of_all_makes(
    files: Files, name: str, samples: np.ndarray
) -> None:
    compared = found_in(files, name, samples)
    layers, alone = compared.found.layers, compared.found.alone
    assert len(layers) == 9 and not alone
    assert all(layer.node.startswith(layer.float_node) for layer in layers)
    assert {layer.matched for layer in layers} == {"name"}
    least = 12 if name == "ours" else 25
    assert all(layer.sqnr_db > least for layer in layers)
    widths = {"ours": {4, 7}, "QOperator": {7}}
    assert {layer.bits for layer in layers} <= widths.get(name, {8})
    assert all(layer.input_db is not None and layer.input_db > 30 for layer in layers)


@pytest.mark.parametrize("name", ["QDQ", "QOperator", "dynamic", "ours"])
def test_without_names_weights_tell_layers(
    files: Files, name: str, samples: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "anonymous.onnx"
    onnx.save(anonymous(onnx.load(files[name])), path)
    compared, known = found_in(files, path, samples), found_in(files, name, samples)
    how = [layer.matched for layer in compared.found.layers]
    assert how[:-1] == ["weights"] * 8  # the last one may be told by the name of the output
    for one, other in zip(compared.found.layers, known.found.layers, strict=True):
        assert one.float_node == other.float_node
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=0.5)


def test_what_is_left_is_paired_in_its_order(files: Files) -> None:
    """Weights of another training are alike in nothing but their shapes."""
    _, floats = find_sites(graph.load(files["float"]), quantised=False)
    rng = np.random.default_rng(0)
    others = [
        replace(site, node=f"n{index}", ys=(f"y{index}",), weight=rng.normal(size=weight.shape))
        for index, site in enumerate(floats)
        if (weight := site.weight) is not None
    ]
    pairs = match(floats, others)
    assert {pair.matched for pair in pairs} == {"order"}
    assert [pair.float.node for pair in pairs] == [site.node for site in floats]
    assert len(match(floats, others[1:])) < len(floats)


def nodes_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def change(model: onnx.ModelProto, name: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other values in the place of a constant."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    before = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(how(before).astype(before.dtype), name))


def wrong_scale(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    change(model, nodes_of(model)[node.input[1]].input[1], lambda scale: scale * 1.5)


def no_codes(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    def emptied(codes: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(codes)).reshape(-1, 1, 1, 1) < 8, 0, codes)

    change(model, nodes_of(model)[node.input[1]].input[0], emptied)


def other_weights(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    change(model, nodes_of(model)[node.input[1]].input[0], lambda codes: codes[::-1])


def other_bias(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    change(model, nodes_of(model)[node.input[2]].input[0], lambda b: b + 2 * b.std())


def cut_off(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    change(model, nodes_of(model)[node.input[0]].input[1], lambda scale: scale / 4)


def too_wide(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    change(model, nodes_of(model)[node.input[0]].input[1], lambda scale: scale * 16)


BROKEN = [
    (wrong_scale, "1.5 times what it should be, as of a wrong scale", "correct the scales"),
    (no_codes, "0 times, in 8 of 32 channels, what it should be", "correct the scales"),
    (other_weights, "times the error that rounding to 8 bits explains", "from this float model"),
    (other_bias, "off by a constant in each channel, as of another bias", "correct its bias"),
    (cut_off, "of the values are cut off", "calibrate it on samples like these"),
    (too_wide, "their steps are too wide", "more bits"),
]


@pytest.mark.parametrize(("how", "parts", "mend"), BROKEN, ids=[how.__name__ for how, *_ in BROKEN])
def test_a_layer_broken_by_hand_is_named(
    files: Files,
    samples: np.ndarray,
    tmp_path: Path,
    how: Callable[[onnx.ModelProto, onnx.NodeProto], None],
    parts: str,
    mend: str,
) -> None:
    model = onnx.load(files["QDQ"])
    (node,) = (node for node in model.graph.node if node.name == LAYER)
    how(model, node)
    onnx.save(model, tmp_path / "broken.onnx")
    compared = found_in(files, tmp_path / "broken.onnx", samples)
    first = compared.found.first
    assert first is not None and first.node == LAYER
    assert parts in str(first.parts) and mend in str(first.mend)
    assert f"the two part first at '{LAYER}'" in " ".join(compared.summary().split())


def test_a_range_between_layers_is_told_apart(
    files: Files, samples: np.ndarray, tmp_path: Path
) -> None:
    """What an Add reads is cut off: no layer is at fault, but the next one tells where to look."""
    model = onnx.load(files["QDQ"])
    (node,) = (node for node in model.graph.node if node.name == "/5/Add")
    cut_off(model, node)
    onnx.save(model, tmp_path / "broken.onnx")
    first = found_in(files, tmp_path / "broken.onnx", samples).found.first
    assert first is not None and first.node == "/8/Gemm"
    assert "up to '/5/branch/branch.3/Conv'" in str(first.parts)
    assert "the nodes between" in str(first.mend)


@pytest.mark.parametrize("name", ["dynamic", "ours"])
def test_no_layer_of_a_sound_file_is_named(files: Files, name: str, samples: np.ndarray) -> None:
    compared = found_in(files, name, samples)
    assert compared.found.first is None
    assert "no layer stands out" in compared.summary()


def test_one_scale_for_unequal_channels_is_named(
    files: Files, samples: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(files["float"])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    factors = np.geomspace(1, 0.01, 16).reshape(-1, 1, 1, 1)
    change(model, first.input[1], lambda values: values * factors)
    onnx.save(model, tmp_path / "float.onnx")
    file = tmp_path / "per_tensor.onnx"
    quantization.quantize_static(
        str(tmp_path / "float.onnx"), str(file), Reader(samples), per_channel=False,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    compared = compare(tmp_path / "float.onnx", file, samples[-64:], threads=1)
    found = compared.found.first
    assert found is not None and found.node == first.name
    assert "its weight has one scale, and rows" in str(found.parts)
    assert "per channel" in str(found.mend)


def test_outputs_of_other_names_are_taken_in_their_order(
    files: Files, samples: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(files["QDQ"])
    (output,) = model.graph.output
    nodes_of(model)[output.name].output[0] = output.name = "renamed"
    onnx.save(model, tmp_path / "renamed.onnx")
    compared = found_in(files, tmp_path / "renamed.onnx", samples)
    assert [each.name for each in compared.found.verification.outputs] == ["logits"]
    assert len(compared.found.layers) == 9


def test_files_of_two_models_are_refused(files: Files, samples: np.ndarray) -> None:
    other = build("net (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="the quantised file has the inputs x, the float model"):
        compare(files["float"], other, samples)
    two = build(
        "net (float[N,1,8,8] input) => (float[N,1,8,8] a, float[N,1,8,8] b)"
        "{ a = Relu(input) b = Abs(input) }"
    )
    with pytest.raises(ModelError, match="has 2 outputs, the float model 1"):
        compare(files["float"], two, samples)
    with pytest.raises(CalibrationError, match="no samples to compare on"):
        compare(files["float"], files["QDQ"], None)


def test_a_model_does_not_part_from_itself(files: Files, samples: np.ndarray) -> None:
    compared = found_in(files, files["float"], samples)
    assert len(compared.found.layers) == 9 and compared.found.first is None
    assert all(layer.own_db > 100 for layer in compared.found.layers)


def test_models_without_layers_are_compared_as_wholes() -> None:
    model = build("net (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    compared = compare(model, model.clone(), np.ones((32, 3), np.float32))
    assert compared.found.layers == () and compared.found.first is None
    assert "exact" in compared.summary()


def test_a_comparison_is_reported_in_all_forms(
    files: Files, samples: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(files["QDQ"])
    (node,) = (node for node in model.graph.node if node.name == LAYER)
    wrong_scale(model, node)
    onnx.save(model, tmp_path / "broken.onnx")
    compared = found_in(files, tmp_path / "broken.onnx", samples)
    for ending in ("json", "html", "md", "xml"):
        compared.write_report(tmp_path / f"report.{ending}")
        told = (tmp_path / f"report.{ending}").read_text(encoding="utf-8")
        assert LAYER in told and "as of a wrong scale" in told
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["parts_first_at"] == LAYER
    assert report["layers"][0]["matched"] == "name"
    assert "failures=\"1\"" in (tmp_path / "report.xml").read_text(encoding="utf-8")
