"""The pages that are written from the config are those of this config."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from onnx_attnround.config import QuantConfig
from onnx_attnround.run_file import RunFiles

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import describe_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_are_current() -> None:
    """Else run ``python tools/describe_config.py``."""
    made = describe_config.described()
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == made["config.md"]
    schema = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    wanted = json.loads(made["config.schema.json"])
    assert list(schema["properties"]) == [*RunFiles.model_fields, *QuantConfig.model_fields]
    for key, values in wanted["properties"].items():
        assert schema["properties"][key]["description"] == values["description"]
        assert schema["properties"][key].get("default") == values.get("default")


def test_each_key_is_described_with_option_and_default() -> None:
    page = describe_config.described()["config.md"]
    for key, field in QuantConfig.model_fields.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` ")]
        assert f"`--{key.replace('_', '-')}`" in line
        assert field.description and field.description in line
    assert "| `weight_bits` | `--weight-bits` | integer, 2 to 8 | `8` |" in page


def test_the_schema_takes_what_a_file_may_hold() -> None:
    properties = describe_config.schema_of_files()["properties"]
    assert {kind["type"] for kind in properties["mean_bits"]["anyOf"]} == {
        "number", "null", "array",
    }  # fmt: skip
    assert {"type": "string"} in properties["memory_limit"]["anyOf"]
