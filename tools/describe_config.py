"""Write what describes the config: docs/config.md for people, docs/config.schema.json for editors.

    python tools/describe_config.py

Both follow from the fields of ``QuantConfig`` and ``RunFiles`` and their descriptions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_attnround.cli.wording import option
from onnx_attnround.config import SECTIONS, QuantConfig, settings
from onnx_attnround.run_file import RunFiles
from onnx_attnround.run_file import described as described_files

DOCS = Path(__file__).resolve().parent.parent / "docs"

HEAD = """# Settings

Each is a key of a config file (`--config FILE.toml`), a keyword of `QuantConfig`, `quantize`,
`make_plan`, `check_model` and `trade_off` in Python, and an option of the command line. Options win
over the file, keywords over a `config`; a preset yields to all settings that are given beside it.
Keys may be written with `-` for `_`. Without `--config`, the table `[tool.onnx-attnround]` of the
nearest `pyproject.toml`, in this folder or one above, is read. There is a
[JSON schema](config.schema.json) of it for editors. `python tools/describe_config.py` writes both
from the source.

With what a run reads and writes in it too, a config file is a whole run, `onnx-attnround quantize
--config run.toml`. Paths in a file start from the folder of the file:

```toml
model = "in.onnx"
output = "out.onnx"
calib = "samples.npz"
eval = "labelled.npz"
preprocess = "imagenet"    # or a table of its keys, [preprocess]
report = ["report.html", "report.json"]
preset = "mixed4"
max-drop = 0.5
```
"""


def main() -> None:
    """Write both files."""
    for name, text in described().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def described() -> dict[str, str]:
    """The text of each file by its name."""
    schema = schema_of_files()
    sections = [_section(name, schema["properties"]) for name in SECTIONS]
    return {
        "config.md": "\n".join([HEAD, _files(), *sections]),
        "config.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def schema_of_files() -> dict[str, Any]:
    """The JSON schema of a config file: several mean bits, and sizes such as 4GB, included."""
    schema = QuantConfig.model_json_schema()
    schema["title"] = "Config file of onnx_attnround"
    properties = schema["properties"]
    for values in properties.values():
        del values["section"]
    means = properties["mean_bits"]["anyOf"]
    number = next(kind for kind in means if kind["type"] == "number")
    means.append({"type": "array", "items": number, "minItems": 1})
    properties["memory_limit"]["anyOf"].append({"type": "string"})
    files = RunFiles.model_json_schema()["properties"]
    files["report"] = {**files["report"], "anyOf": [{"type": "string"}, _of_paths(files["report"])]}
    for key in ("type", "items"):
        del files["report"][key]
    schema["properties"] = {**files, **properties}
    return schema


def _of_paths(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("type", "items")}


def _files() -> str:
    """The table of what is no setting."""
    lines = ["## What a run reads and writes\n", "| Key | In place of | |", "|---|---|---|"]
    places = {"model": "IN", "output": "OUT"}
    lines += [
        f"| `{key}` | `{places.get(key, option(key))}` | {description} |"
        for key, description in described_files()
    ]
    return "\n".join(lines) + "\n"


def _section(name: str, schema: dict[str, Any]) -> str:
    lines = [f"## {name}\n", "| Key | Option | Values | Default | |", "|---|---|---|---|---|"]
    lines += [
        f"| `{setting.key}` | `{option(setting.key)}` | {_values(schema[setting.key])} "
        f"| {_code(setting.default)} | {setting.description} |"
        for setting in settings()
        if setting.section == name
    ]
    return "\n".join(lines) + "\n"


def _values(schema: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    return " or ".join(filter(None, map(_kind, kinds)))


def _kind(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if kind.get("type") == "array":
        return f"list of {_kind(kind['items'])}"
    if kind.get("type") == "object":
        return f"table of {_kind(kind['additionalProperties'])}"
    low, high = kind.get("minimum"), kind.get("maximum")
    word = {"integer": "integer", "number": "number", "string": "text"}.get(kind.get("type", ""))
    if word is None or low is None:
        return word or ""
    return f"{word}, {low:g} to {high:g}" if high is not None else f"{word} from {low:g}"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    main()
