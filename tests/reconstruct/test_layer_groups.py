"""Blocks hold all layers, in order, with the fewest numbers alive between them."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import onnx_ir as ir
import pytest
from layered_models import LAYERED, layered

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.plan import make_plan
from onnx_attnround.reconstruct.layer_groups import _alive, find_blocks
from onnx_attnround.records import LayerPlan
from onnx_attnround.simplify import simplify

MODELS = Path(__file__).resolve().parents[2] / "models"


def layers_of(model: ir.Model) -> tuple[LayerPlan, ...]:
    return make_plan(model, QuantConfig(), quantise_activations=False).layers


def digits(name: str) -> ir.Model:
    return simplify(graph.load(MODELS / f"digits_{name}.onnx"))[0]


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LAYERED)
def test_all_layers_in_order_and_no_block_too_long(name: str, most: int) -> None:
    model = layered(name)
    layers = layers_of(model)
    blocks = find_blocks(model, layers, most)
    assert tuple(layer for block in blocks for layer in block) == layers
    assert all(1 <= len(block) <= most for block in blocks)


@pytest.mark.parametrize("most", [2, 3, 4])
def test_no_other_cuts_leave_fewer_numbers_alive(most: int) -> None:
    model = digits("resnet")
    layers = layers_of(model)
    alive = _alive(model, layers)

    def cost(starts: tuple[int, ...]) -> float:
        return sum(alive[start] for start in starts)

    found = tuple(
        next(i for i, layer in enumerate(layers) if layer is block[0])
        for block in find_blocks(model, layers, most)
    )[1:]
    inner = range(1, len(layers))
    allowed = [
        starts
        for count in range(len(layers))
        for starts in combinations(inner, count)
        if all(b - a <= most for a, b in pairwise((0, *starts, len(layers))))
    ]
    assert found in allowed
    assert cost(found) == min(map(cost, allowed))


def test_what_is_alive_between_the_layers_of_a_residual_unit() -> None:
    model = layered("residual")
    assert _alive(model, layers_of(model)) == [144.0, 288.0, 432.0, 432.0]


def test_inverted_bottlenecks_are_blocks() -> None:
    model = digits("mobilenet")
    layers = layers_of(model)
    depthwise = [i for i, layer in enumerate(layers) if layer.attributes.get("group", 1) > 1]
    blocks = [{layer.node for layer in block} for block in find_blocks(model, layers)]
    for i in depthwise[1:]:
        unit = {layer.node for layer in layers[i - 1 : i + 2]}
        assert unit in blocks
