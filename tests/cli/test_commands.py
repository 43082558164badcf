"""The commands: what the older form means, a run in one file, forms of output, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import build_proto

from onnx_attnround import QuantConfig
from onnx_attnround.__main__ import main
from onnx_attnround.cli.commands import COMMANDS, with_command
from onnx_attnround.cli.options import Request
from onnx_attnround.errors import ConfigError
from onnx_attnround.samples.preprocess import load_preprocess

ROOT = Path(__file__).resolve().parents[2]
NET = """
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w> { y = Conv(x, w) }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a model and samples."""
    (tmp_path / "in.onnx").write_bytes(build_proto(NET).SerializeToString())
    samples = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=samples)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, QuantConfig]]:
    """The requests that the command line would do, with their settings."""
    requests: list[tuple[Request, QuantConfig]] = []

    def run(request: Request, from_file: dict[str, Any]) -> None:
        requests.append((request, request.settled(from_file)[0]))

    monkeypatch.setattr("onnx_attnround.cli.main.run", run)
    return requests


@pytest.mark.parametrize(
    ("older", "command"),
    [
        ("in.onnx out.onnx --calib c.npz", "quantize in.onnx out.onnx --calib c.npz"),
        ("--weight-bits 4 in.onnx out.onnx", "quantize --weight-bits 4 in.onnx out.onnx"),
        ("in.onnx --dry-run --weight-bits 4", "plan in.onnx --weight-bits 4"),
        ("--check q.onnx --target qnn", "check q.onnx --target qnn"),
        ("check q.onnx", "check q.onnx"),
        ("--version", "--version"),
        ("-h", "-h"),
    ],
)
def test_without_a_command_the_options_tell_it(older: str, command: str) -> None:
    assert with_command(older.split()) == command.split()


def test_two_files_are_compared(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    float_model, samples = str(models_dir / "digits_resnet.onnx"), models_dir / "digits_eval.npz"
    page, given = tmp_path / "page.html", ["--eval", str(samples), "--quiet"]
    assert main(["compare", float_model, float_model, *given, "--report", str(page)]) == 0
    assert capsys.readouterr().out == ""
    told = page.read_text(encoding="utf-8")
    assert "They do not part" in told and "onnx-attnround compare" in told
    assert main(["--compare", float_model, float_model, "--eval", str(samples)]) == 0
    assert "no layer stands out" in capsys.readouterr().out
    for less, message in ((2, "QUANTISED is missing"), (3, "there are no samples to compare on")):
        assert main(["compare", float_model, float_model][:less]) != 0
        assert message in capsys.readouterr().err


def test_a_command_with_a_slip_is_no_model(folder: Path) -> None:
    for slip, meant in (("quantise", "quantize"), ("insepct", "inspect")):
        with pytest.raises(ConfigError, match=f"unknown command '{slip}': did you mean {meant}?"):
            with_command([slip, "in.onnx"])
    (folder / "plans").write_bytes(b"")  # a file of that name is one
    assert with_command(["plans", "out.onnx"]) == ["quantize", "plans", "out.onnx"]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_understood(
    name: str, seen: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("")
    for example in COMMANDS[name].examples:
        assert main([name, *example.replace("'", "").split()]) == 0
    assert {request.command for request, _ in seen} == {name}


# --- a run in one file --------------------------------------------------------------------


RUN = """
model = "in.onnx"
output = "made/out.onnx"
calib = "c.npz"
report = ["r.json", "r.html"]
weight-bits = 4
act_bits = 16
work-dir = "kept"

[preprocess]
size = 8

[layer-bits]
"a-b" = 3
"""


def test_a_file_holds_a_whole_run_with_paths_that_start_from_it(
    seen: list[tuple[Request, QuantConfig]], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    assert main(["quantize", "--config", str(tmp_path / "run.toml"), "--eval", "e.npz"]) == 0
    ((request, config),) = seen
    options = request.options
    assert (options.model, options.calib) == (tmp_path / "in.onnx", tmp_path / "c.npz")
    assert options.output == tmp_path / "made" / "out.onnx"
    assert options.report == [tmp_path / "r.json", tmp_path / "r.html"]
    assert options.evaluation == Path("e.npz")
    assert load_preprocess(options.preprocess).size == 8
    assert (config.weight_bits, config.act_bits, config.layer_bits) == (4, 16, {"a-b": 3})
    assert config.work_dir == tmp_path / "kept"


def test_arguments_go_before_the_file(
    seen: list[tuple[Request, QuantConfig]], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    given = ["--calib", "d.npz", "--preprocess", "unit", "--preset", "small", "--act-bits", "8"]
    config = ["--config", str(tmp_path / "run.toml")]
    assert main(["quantize", "other.onnx", "out.onnx", *config, *given]) == 0
    ((request, settings),) = seen
    options = request.options
    assert (options.model, options.output) == (Path("other.onnx"), Path("out.onnx"))
    assert (options.calib, options.preprocess) == (Path("d.npz"), "unit")
    assert (settings.first_last_bits, settings.act_bits) == (4, 8)


def test_the_nearest_pyproject_is_read_where_no_config_is_given(
    seen: list[tuple[Request, QuantConfig]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[tool.onnx-attnround]\ncalib = "c.npz"\nseed = 7\n'
    )
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.other]\nbroken = 1\n")
    (inner / "run.toml").write_text("seed = 8\n")
    assert main(["in.onnx", "out.onnx"]) == 0
    assert main(["in.onnx", "out.onnx", "--config", "run.toml"]) == 0
    assert main(["in.onnx", "out.onnx", "--config", str(tmp_path / "pyproject.toml")]) == 0
    assert [config.seed for _, config in seen] == [7, 8, 7]
    assert [request.options.calib for request, _ in seen] == [
        tmp_path / "c.npz", None, tmp_path / "c.npz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weigth-bits = 4", "unknown key 'weigth_bits': did you mean 'weight_bits'? "),
        ("evaluation = 'e.npz'", "did you mean 'eval'?"),
        ("weight-bits = 4\nweight_bits = 4", "'weight_bits' is given twice"),
        ("target = 'tensort'", "unknown target 'tensort': did you mean 'tensorrt'?"),
        ("preset = 'w4a4'", "option `preset`: "),
        ("calib = 3", "key 'calib': "),
        ("[preprocess]\nsise = 3", "unknown key 'sise': did you mean 'size'?"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_names_what_is_near(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.toml").write_text(f"model = 'in.onnx'\n{text}\n")
    arguments = ["in.onnx", "o.onnx", "--calib", "c.npz", "--config", "run.toml"]
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# --- forms of output ----------------------------------------------------------------------


def test_plan_and_check_and_inspect_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--format", "json"]) == 0
        read: dict[str, Any] = json.loads(capsys.readouterr().out)
        return read

    (plan,) = printed("plan", "in.onnx", "--layer-bits", "*=5", "--calib", "c.npz")["plans"]
    assert [(layer["op"], layer["bits"]) for layer in plan["layers"]] == [("Conv", 5)]
    fast = ["--method", "nearest", "--observer", "minmax", "--threads", "1"]
    report = printed("quantize", "in.onnx", "out.onnx", "--calib", "c.npz", *fast)
    assert report["verification"]["samples"] == 16
    assert printed("check", "out.onnx")["check"]["findings"] == []
    model = printed("inspect", "out.onnx", "--target", "ort")["model"]
    assert model["quantised"] and model["weights"] == {"INT8": 108}
    assert [taken["layers"] for taken in model["taken"]] == [1]


def test_inspect_tells_what_targets_would_take_and_what_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two.onnx").write_bytes(build_proto("""
        net (float[N,4] x, float[4,4] other) => (float[N,4] z)
        <float[4,4] w> { y = MatMul(x, w) z = MatMul(y, other) }
    """).SerializeToString())  # fmt: skip
    assert main(["inspect", "two.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "float model, opset ai.onnx 17" in printed and "operators: 2 MatMul" in printed
    assert [line.split()[1:3] for line in printed.splitlines() if line.startswith("ort ")] == [
        ["1", "16"]
    ]
    assert "in float because" not in printed
    assert main(["inspect", "two.onnx", "--target", "ort"]) == 0
    assert "in float because" in capsys.readouterr().out


def test_annotations_for_github(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["--method", "nearest", "--observer", "minmax", "--threads", "1", "--format", "github"]
    assert main(["in.onnx", "out.onnx", "--calib", "c.npz", *fast]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("::notice title=onnx-attnround::16 calibration") for line in printed)
    assert "wrote out.onnx" in printed
    assert main(["in.onnx", "o2.onnx", "--calib", "c.npz", "--min-sqnr", "200", *fast]) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "::error" in line]
    assert "below --min-sqnr 200" in line
    assert main(["check", "out.onnx", "--target", "tensorrt", "--format", "github"]) == 1
    refused = "::error title=onnx-attnround::x/quantize: zero-point-not-zero"
    assert refused in capsys.readouterr().out


def test_a_shell_is_offered_commands_options_and_values() -> None:
    def offered(words: str) -> set[str]:
        asked = {"_ONNX_ATTNROUND_COMPLETE": "complete_bash", "COMP_WORDS": words}
        done = subprocess.run(
            [sys.executable, "-m", "onnx_attnround"], capture_output=True, text=True, check=True,
            env={**os.environ, **asked, "COMP_CWORD": str(len(words.split(" ")) - 1)}, cwd=ROOT,
        )  # fmt: skip
        return set(done.stdout.split())

    assert offered("onnx-attnround ") >= set(COMMANDS)
    assert "--weight-bits" in offered("onnx-attnround quantize --w")
    assert offered("onnx-attnround check --target o") == {"ort", "ort-arm", "openvino"}
    assert offered("onnx-attnround quantize --preset w4") == {"w4a8", "w4a16"}
