"""Every option is checked when it is given, and a mistake is one line that says what is right."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import onnx.defs
import pytest
from pydantic import ValidationError

from onnx_attnround.config import QuantConfig, read_config
from onnx_attnround.errors import ConfigError
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.presets import PRESETS, Preset
from onnx_attnround.targets import TARGETS, get_target


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        QuantConfig.parse(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid_and_documented_values() -> None:
    config = QuantConfig.parse({})
    assert config == QuantConfig()
    assert QuantConfig.parse(config.model_dump()) == config
    assert QuantConfig.model_validate_json(config.model_dump_json()) == config
    assert (config.target, config.weight_bits, config.act_bits) == ("ort", 8, 8)
    assert (config.first_last_bits, config.mean_bits, config.weight_storage) == (8, None, None)


def test_unknown_option_lists_the_known_ones() -> None:
    message = refused(weight_bit=4)
    assert "unknown option `weight_bit`" in message
    assert all(name in message for name in QuantConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weight_bits": 1}, "option `weight_bits`: greater than or equal to 2, got 1"),
        ({"weight_bits": 9}, "option `weight_bits`: less than or equal to 8, got 9"),
        ({"weight_bits": 4.5}, "option `weight_bits`: valid integer, got 4.5"),
        ({"act_bits": 12}, "option `act_bits`: 7, 8, 16 or 32, got 12"),
        ({"mean_bits": 1.9}, "option `mean_bits`: got 1.9"),
        ({"mean_bits": float("nan")}, "option `mean_bits`: got nan"),
        ({"bit_choices": ()}, "option `bit_choices`: empty"),
        ({"bit_choices": (4, 16)}, "option `bit_choices`, item 2: 8, got 16"),
        ({"bit_choices": (4, 8), "mean_bits": 3.5}, "option `bit_choices`: `mean_bits` 3.5"),
        ({"first_last_bits": 16}, "option `first_last_bits`: got 16"),
        ({"layer_bits": {"conv*": 12}}, "option `layer_bits`, 'conv*': got 12"),
        ({"target": "tpu"}, "option `target`: ort, got 'tpu'"),
        ({"method": "magic"}, "option `method`: 'attention', 'adaround' or 'nearest', got"),
        ({"observer": "max"}, "option `observer`: 'minmax', 'percentile', 'entropy' or 'mse'"),
        ({"weight_storage": "int2"}, "option `weight_storage`: 'packed', 'packed2', 'int8' or"),
        ({"samples": 0}, "option `samples`: got 0"),
        ({"batch_size": 0}, "option `batch_size`: got 0"),
        ({"seed": -1}, "option `seed`: got -1"),
        ({"steps": -1}, "option `steps`: got -1"),
        ({"threads": 0}, "option `threads`: got 0"),
        ({"activation_memory_mb": 0}, "option `activation_memory_mb`: got 0"),
        ({"include": "conv*"}, "option `include`: a list, got 'conv*'"),
        ({"min_sqnr": float("nan")}, "option `min_sqnr`: finite number, got nan"),
        ({"max_drop": float("inf")}, "option `max_drop`: finite number, got inf"),
    ],
)
def test_bad_value_names_option_value_and_what_is_valid(
    values: dict[str, Any], words: str
) -> None:
    message = refused(**values)
    start, rest = words.split(": ", 1)
    assert message.startswith(start)
    assert "Value error" not in message
    for part in rest.split(", got"):
        assert part in message


@pytest.mark.parametrize(
    "values",
    [
        {"weight_bits": 2}, {"weight_bits": 8}, {"act_bits": 2}, {"act_bits": 16}, {"act_bits": 32},
        {"mean_bits": 2}, {"mean_bits": 8.0}, {"mean_bits": 4, "bit_choices": (4,)}, {"steps": 0},
        {"min_sqnr": -3.0}, {"max_drop": 0.0}, {"weight_storage": "int4"}, {"include": ["a", "b*"]},
        {"layer_bits": {"a": 2, "b*": 8}},
    ],
)  # fmt: skip
def test_good_values_pass(values: dict[str, Any]) -> None:
    config = QuantConfig.parse(values)
    for name, value in values.items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(config, name) == wanted


def test_bit_choices_are_sorted_and_distinct() -> None:
    assert QuantConfig(bit_choices=(8, 2, 4, 2)).bit_choices == (2, 4, 8)


def test_config_is_frozen_and_keywords_are_checked_too() -> None:
    config = QuantConfig()
    with pytest.raises(ValidationError):
        config.weight_bits = 4  # type: ignore[misc]
    with pytest.raises(ConfigError, match="option `weight_bits`: .* got 9"):
        QuantConfig(weight_bits=9)
    with pytest.raises(ConfigError, match="option `weight_bits`: .* got 1"):
        QuantConfig.model_validate({"weight_bits": 1})


def test_a_mapping_does_for_a_config_and_nothing_else_does() -> None:
    config = QuantConfig(weight_bits=4)
    assert QuantConfig.of({"weight_bits": 4}) == QuantConfig.of(config) == config
    assert QuantConfig.of({}) == QuantConfig.of(None) == QuantConfig()
    with pytest.raises(ConfigError, match="unknown option `weight_bit`"):
        QuantConfig.of({"weight_bit": 4})
    with pytest.raises(ConfigError, match="^unknown option `4`"):
        QuantConfig.of({4: "weight_bits"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"is of type str, expected a QuantConfig or a mapping"):
        QuantConfig.of("config.toml")  # type: ignore[arg-type]


# --- files --------------------------------------------------------------------------------


def test_file_gives_the_same_config_as_keywords(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'weight_bits = 4\nmean_bits = 3.5\nexclude = ["/head/*"]\n[layer_bits]\n"/c*" = 6\n'
    )
    config = QuantConfig.parse(read_config(path))
    assert config == QuantConfig(
        weight_bits=4, mean_bits=3.5, exclude=("/head/*",), layer_bits={"/c*": 6}
    )


def test_values_of_a_file_are_checked_as_any_others(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("weight_bits = 12\n")
    with pytest.raises(ConfigError, match="weight_bits"):
        QuantConfig.parse(read_config(path))


@pytest.mark.parametrize("content", [None, b"weight_bits = ", b"a = 1\na = 2\n", b"\xff\xfe\x00"])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read config '.*broken\.toml'") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        read_config(tmp_path)


# --- targets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_target_speaks_of_ops_that_exist_and_of_each_once(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    kinds = [target.weighted, target.arithmetic, target.movement, target.absorbed]
    ops = [op for kind in kinds for op in kind]
    assert len(ops) == len(set(ops))
    assert set(ops) <= {schema.name for schema in onnx.defs.get_all_schemas()}
    assert target.weighted <= set(WEIGHTED_OPS)
    assert target.float_output <= target.weighted
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.name = "other"  # type: ignore[misc]


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown target 'tpu': expected one of ort"):
        get_target("tpu")


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({}, []),
        ({"weight_bits": 4, "weight_storage": "int4", "observer": "minmax"}, []),
        ({"mean_bits": 4, "bit_choices": (4, 8), "allocator": "gram"}, []),
        ({"mean_bits": 4, "weight_bits": 4}, ["weight_bits"]),
        ({"bit_choices": (4, 8), "allocator": "gram"}, ["bit_choices", "allocator"]),
        ({"observer": "minmax", "act_bits": 32}, ["observer"]),
        ({"weight_storage": "packed"}, ["weight_storage"]),
        ({"weight_storage": "packed", "layer_bits": {"a": 4}}, []),
        ({"weight_range": "full"}, []),
        ({"weight_range": "full", "act_bits": 16}, ["weight_range"]),
        ({"weight_range": "full", "target": "tensorrt"}, ["weight_range"]),
        ({"weight_storage": "packed", "mean_bits": 6}, []),
        ({"weight_storage": "packed", "mean_bits": 6, "bit_choices": (5, 8)}, ["weight_storage"]),
    ],
)
def test_settings_that_change_nothing_are_told(values: dict[str, Any], idle: list[str]) -> None:
    lines = QuantConfig.parse(values).idle()
    assert [line.split("`")[1] for line in lines] == idle
    assert all("has no effect" in line for line in lines)


# --- presets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_settings_it_stands_for_and_yields_to_any(name: str) -> None:
    config = QuantConfig.parse({"preset": name})
    assert config.model_copy(update={"preset": None}) == QuantConfig(**PRESETS[name])
    assert QuantConfig.parse(config.model_dump()) == config
    assert QuantConfig.parse({"preset": name, "act_bits": 16}).act_bits == 16
    assert QuantConfig.of({"weight_bits": 3, "seed": 1}, preset=name).seed == 1


def test_the_names_of_presets_are_known_and_bits_are_as_they_say() -> None:
    assert set(get_args(Preset)) == set(PRESETS)
    for name, settings in PRESETS.items():
        if found := re.fullmatch(r"w(\d+)a(\d+)", name):
            assert settings == {"weight_bits": int(found[1]), "act_bits": int(found[2])}
    assert QuantConfig.of(QuantConfig(weight_bits=8), preset="w4a8").weight_bits == 4


def test_a_key_that_is_nearly_known_is_named() -> None:
    message = refused(weigth_bits=4)
    assert message.startswith("unknown option `weigth_bits`: did you mean `weight_bits`? expected")
