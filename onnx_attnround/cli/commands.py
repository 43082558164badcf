"""The commands, and what the form without one means: ``onnx-attnround IN OUT``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import typer

from onnx_attnround.cli.options import Options, function_of
from onnx_attnround.errors import ConfigError
from onnx_attnround.version import version

PROGRAM = "onnx-attnround"
_CODES = "Exit codes: 0 done, 1 failed, 2 usage, 3 gate missed, 130 interrupted."
_SWEEPS = frozenset({"jobs", "backend", "workers", "cluster"})
_RUNS = frozenset(each.name for each in fields(Options)) - _SWEEPS - {"more", "quantised"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: what its help says, which options it reads, and which settings (all by default).

    ``examples`` are arguments behind its name.
    """

    does: str
    examples: tuple[str, ...]
    options: frozenset[str] = _RUNS
    keys: frozenset[str] | None = None


COMMANDS: dict[str, Command] = {
    "quantize": Command(
        does="Quantise the ONNX model IN after training, and write it to OUT with Q/DQ nodes.",
        examples=(
            "in.onnx out.onnx --calib samples.npz",
            "in.onnx out.onnx --calib photos/ --preprocess imagenet --report report.html",
            "in.onnx out.onnx --calib c.npz --preset mixed4 --eval labelled.npz --max-drop 0.5",
            "in.onnx out.onnx --calib c.npz --mean-bits 3,4,6",
            "in.onnx out.onnx --calib c.npz --eval labelled.npz --until drop=0.5",
            "--config run.toml",
        ),
    ),
    "plan": Command(
        does="Print what would be quantised, with how many bits, and what not and why; refuse "
        "what a run would refuse, judge the samples given, and write nothing.",
        examples=(
            "in.onnx --weight-bits 4 --exclude '/head/*'",
            "in.onnx --calib samples.npz --memory-limit 2GB --min-sqnr 20",
            "in.onnx --target tensorrt --format json",
        ),
    ),
    "check": Command(
        does="Check quantised models, of any origin, against the rules of a target, run "
        "them on samples or noise where its runtime is installed, and list what breaks or does not "
        "fuse; exit code 1 if one is refused.",
        examples=(
            "quantised.onnx --target tensorrt",
            "quantised.onnx --calib samples.npz --format github",
            "a.int.onnx b.int.onnx --quiet",
        ),
        options=_RUNS - {"output", "evaluation"} | {"more"},
        keys=frozenset({"samples", "target", "custom_op_library"}),
    ),
    "compare": Command(
        does="Compare the float model IN with a QUANTISED one of any make (Q/DQ, operators on "
        "codes, dynamic) on samples: outputs and slices, size and speed, and each layer that both "
        "have; name the first one where they part beyond what its surroundings explain, and what "
        "helps.",
        examples=(
            "float.onnx quantised.onnx --eval samples.npz",
            "float.onnx quantised.onnx --eval labelled.npz --report compared.html",
        ),
        options=_RUNS - {"output", "calib"} | {"quantised"},
        keys=frozenset({"threads", "custom_op_library"}),
    ),
    "inspect": Command(
        does="Print what is in the model IN: operators, weights and their bits, opset, inputs "
        "and outputs, and what each target would quantise of it, or makes of a quantised file.",
        examples=("in.onnx", "quantised.onnx --target qnn --format json"),
        options=frozenset({"model", "config", "format", "verbose"}),
        keys=frozenset({"target"}),
    ),
    "sweep": Command(
        does="Quantise each model of a TOML file for each target at each preset, some at a time; "
        "keep a table and a page of all; leave what an earlier sweep has done as it is, and go on "
        "where it was cut off.",
        examples=("jobs.toml --workers 2", "jobs.toml --backend ray --cluster auto"),
        options=_SWEEPS | {"format", "quiet", "verbose"},
        keys=frozenset(),
    ),
}

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {version()}")
        raise typer.Exit


@app.callback(
    epilog=f"{PROGRAM} IN OUT does what quantize does, with --dry-run what plan does, with --check "
    f"what check does, with --compare what compare does.\n\n{_CODES}"
)
def _main(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Quantise ONNX models after training: ONNX in, ONNX with Q/DQ nodes out."""


def _register(name: str, command: Command) -> None:
    examples = [f"{PROGRAM} {name} {example}" for example in command.examples]
    app.command(
        name,
        help=command.does,
        epilog="\n\n".join(["Examples:", *examples, _CODES]),
        context_settings={"help_option_names": ["-h", "--help"]},
    )(function_of(name, command.options, command.keys))


for _name, _command in COMMANDS.items():
    _register(_name, _command)


def with_command(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the command that they mean where they begin with none.

    Raises ``ConfigError`` where what stands first seems to be a command with a slip.
    """
    given = list(arguments)
    if f"_{PROGRAM.replace('-', '_').upper()}_COMPLETE" in os.environ:
        return given  # a shell asks, and the arguments are in its variables
    first = given[0] if given else ""
    if first in COMMANDS or first in _OF_ALL or first.startswith(("--show-c", "--install-c")):
        return given
    flags = ("check", "--check"), ("compare", "--compare"), ("plan", "--dry-run")
    for name, flag in flags:
        if flag in given:
            return [name, *(each for each in given if each != flag)]
    near = difflib.get_close_matches(first, COMMANDS, 1)
    if near and not os.path.exists(first):
        raise ConfigError(f"unknown command '{first}': did you mean {near[0]}?")
    return ["quantize", *given]


_OF_ALL = ("-h", "--help", "--version")
