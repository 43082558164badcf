"""Names and globs in settings: exact names go before globs, whatever characters they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import QuantConfig, make_plan
from onnx_attnround.errors import ConfigError
from onnx_attnround.plan.patterns import chosen, values_for

NAMES = ("a[0]", "a0", "a1", "b*", "bee", "c?", "cd")


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["a[0]"], {"a[0]": "a[0]"}),
        (["a[01]"], {"a0": "a[01]", "a1": "a[01]"}),
        (["b*"], {"b*": "b*"}),
        (["b?*"], {"b*": "b?*", "bee": "b?*"}),
        (["c?"], {"c?": "c?"}),
        (["a*", "a[0]"], {"a[0]": "a[0]", "a0": "a*", "a1": "a*"}),
        (["a[0]", "a*"], {"a[0]": "a[0]", "a0": "a*", "a1": "a*"}),
        (["*e", "bee"], {"bee": "bee"}),
        (["x", "y*"], {}),
    ],
)
def test_an_exact_name_means_that_one_alone(
    patterns: list[str], found: dict[str, str]
) -> None:
    assert chosen(patterns, NAMES) == found


def test_of_several_globs_the_first_counts() -> None:
    settings = {"b*": 1, "*": 2, "a?": 3, "a1": 4}
    expected = {"a[0]": 2, "a0": 2, "a1": 4, "b*": 1, "bee": 2, "c?": 2, "cd": 2}
    assert values_for(settings, NAMES) == expected


NET = """net (float[N,4] x) => (float[N,4] y)
<float[4,4] u, float[4,4] v, float[4,4] w> {
    [blocks0] a = MatMul(x, u)
    b = Relu(a)
    [other] c = MatMul(b, v)
    d = Relu(c)
    [head] y = MatMul(d, w)
}"""


def net() -> ir.Model:
    """The parser takes no brackets in names."""
    model = build(NET)
    next(node for node in model.graph if node.name == "other").name = "blocks[0]"
    return model


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"exclude": ("blocks[0]",)}, {"blocks0", "head"}),
        ({"exclude": ("blocks*",)}, {"head"}),
        ({"include": ("blocks[0]",)}, {"blocks[0]"}),
        ({"include": ("blocks[0]", "h*")}, {"blocks[0]", "head"}),
    ],
)
def test_nodes_whose_names_are_globs_too(options: dict[str, object], layers: set[str]) -> None:
    plan, _ = make_plan(net(), QuantConfig.parse(options))
    assert {layer.node for layer in plan.layers} == layers


def test_bits_of_layers_whose_names_are_globs_too() -> None:
    bits = {"*": 5, "blocks[0]": 3}
    _, allocation = make_plan(net(), QuantConfig(layer_bits=bits))
    assert allocation.bits == {"blocks0": 5, "blocks[0]": 3, "head": 5}


def test_bits_of_activations_whose_names_are_globs_too() -> None:
    model = net()
    values = ir.convenience.create_value_mapping(model.graph)
    values["b"].name, values["d"].name = "t0", "t[0]"
    plan, _ = make_plan(model, QuantConfig(activation_bits={"t[0]": 16}))
    assert {name: plan.activations[name].bits for name in ("t0", "t[0]")} == {"t0": 8, "t[0]": 16}


@pytest.mark.parametrize("option", ["include", "exclude", "layer_bits", "activation_bits"])
def test_a_pattern_that_fits_nothing_is_named(option: str, tmp_path: Path) -> None:
    value = {"nowhere[0]": 8} if option.endswith("bits") else ("nowhere[0]",)
    with pytest.raises(ConfigError, match=rf"option `{option}`: pattern 'nowhere\[0\]' matches no"):
        make_plan(net(), QuantConfig.parse({option: value}))


def test_tables_whose_nodes_have_names_that_are_globs_too() -> None:
    text = """net (int64[N] i) => (float[N,4] y) <float[6000,16] t, float[6000,16] u, float[16,4] w>
    { [look0] a = Gather(t, i)  [other] b = Gather(u, i)  c = Add(a, b)  [m] y = MatMul(c, w) }"""
    model = build(text)
    next(node for node in model.graph if node.name == "other").name = "look[0]"
    plan, _ = make_plan(model, QuantConfig(exclude=("look[0]",)))
    assert set(plan.tables) == {"look0"}
    assert np.all([name != "look[0]" for name in plan.tables])
