"""What exporters noted on a model is still there behind all stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from checked_conversion import convert
from small_models import build_proto

NET = """net (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[4,3,3,3] v, float[4,4,1,1] w> {
    h = Conv<pads = [1, 1, 1, 1]>(x, v)
    r = Relu(h)
    y = Conv(r, w)
}"""


def noted(opset: int) -> onnx.ModelProto:
    """A model with a text and an entry of metadata on everything that can have them."""
    model = build_proto(NET, opset, ir_version=10)
    graph = model.graph
    for name, node in zip(("stem", "act", "head"), graph.node, strict=True):
        node.name = name
    for each in (model, graph, *graph.node, *graph.input, *graph.output):
        name = getattr(each, "name", "model")
        each.doc_string = f"text of {name}"
        each.metadata_props.add(key="from", value=name)
    return model


@pytest.mark.parametrize("options", [{}, {"target": "qnn"}, {"act_bits": 32, "weight_bits": 4}])
@pytest.mark.parametrize("opset", [9, 17])
def test_texts_and_metadata_are_kept(
    opset: int, options: dict[str, object], tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
    model = noted(opset)
    convert(model, tmp_path, [{"x": x}], sqnr=10, **options)
    written = onnx.load(str(tmp_path / "target.onnx"))
    nodes = {node.name: node for node in written.graph.node}
    ends = [*written.graph.input, *written.graph.output]
    pairs = [
        (model, written),
        (model.graph, written.graph),
        *((node, nodes[node.name]) for node in model.graph.node if node.name in nodes),
        *zip([*model.graph.input, *model.graph.output], ends, strict=True),
    ]
    for old, new in pairs:
        assert new.doc_string == old.doc_string
        entries = {entry.key: entry.value for entry in new.metadata_props}
        assert entries["from"] == old.metadata_props[0].value
    assert {"stem", "head"} <= nodes.keys()
