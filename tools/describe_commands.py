"""Write docs/commands.md: every command with its options, as --help tells them.

python tools/describe_commands.py
"""

from __future__ import annotations

from pathlib import Path

from typer.main import get_command

from onnx_attnround.cli.commands import COMMANDS, PROGRAM, app
from onnx_attnround.cli.options import Options
from onnx_attnround.config import QuantConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"

HEAD = f"""# Commands

`{PROGRAM} COMMAND --help` prints this of each. `python tools/describe_commands.py` writes this page
from the source.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(described(), encoding="utf-8")


def described() -> str:
    """The text of the page."""
    return "\n".join([HEAD, *map(_section, COMMANDS)])


def _section(name: str) -> str:
    command = COMMANDS[name]
    parsed = get_command(app).commands[name]
    arguments = [each for each in parsed.params if each.param_type_name == "argument"]
    names = " ".join(each.metavar or each.name.upper() for each in arguments)
    examples = "\n".join(f"{PROGRAM} {name} {example}" for example in command.examples)
    own = set(Options.__dataclass_fields__)
    options = [each for each in parsed.params if each.name in own and each not in arguments]
    settings = [each for each in parsed.params if each.name in QuantConfig.model_fields]
    rows = [f"| `{' '.join(each.opts)}` | {_cell(each.help)} |" for each in options]
    lines = [f"## {name}\n", f"`{PROGRAM} {name} {names}`\n", f"{command.does}\n"]
    lines += ["```sh", examples, "```\n", "| Option | |", "|---|---|", *rows]
    return "\n".join(lines) + f"\n\n{_settings([each.opts[0] for each in settings])}\n"


def _settings(names: list[str]) -> str:
    if len(names) == len(QuantConfig.model_fields):
        return "And an option for each of the [settings](config.md).\n"
    listed = ", ".join(f"`{name}`" for name in names)
    return f"Of the [settings](config.md): {listed}.\n" if names else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
