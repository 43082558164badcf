"""The documents keep their word: examples run, options and files that they name exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from onnx_attnround import QuantConfig
from onnx_attnround.__main__ import main
from onnx_attnround.calibrate import OBSERVERS
from onnx_attnround.cli.commands import COMMANDS, app
from onnx_attnround.cli.options import Request
from onnx_attnround.samples.preprocess import PREPROCESS, Preprocess
from onnx_attnround.settings import tomllib
from onnx_attnround.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("command_line", "python", "bits", "what_is_quantised")
}
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The arguments of each run of the command line in a document."""
    lines = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    runs = [shlex.split(line, comments=True) for line in lines]
    forms = (["python", "-m", "onnx_attnround"], ["onnx-attnround"])
    return [run[len(form) :] for run in runs for form in forms if run[: len(form)] == form]


def options() -> set[str]:
    """All that the command line understands."""
    group = get_command(app)
    known = [*group.params, *(each for name in COMMANDS for each in group.commands[name].params)]
    flags = {"--check", "--compare", "--dry-run"}
    return flags | {name for parameter in known for name in parameter.opts}


def test_the_first_commands_are_two() -> None:
    first = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert first == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE) for line in first)


@pytest.mark.slow
@pytest.mark.parametrize("example", blocks("python") + blocks("python", GUIDES["python"]))
def test_python_examples_run(example: str, models_dir: Path, tmp_path: Path) -> None:
    for path in models_dir.glob("digits_*"):
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (written,) = re.findall(r'"(\w+\.int\.onnx)"', example)
    assert (tmp_path / written).is_file()


@pytest.mark.slow
def test_the_examples_of_the_readme_run_word_by_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    runs = commands(README)
    assert len(runs) == 2
    for arguments in runs:
        assert main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "models", "digits.int8.onnx", "digits.int4.onnx", "digits.html",
    }  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 1000


def test_command_lines_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[QuantConfig] = []

    def run(request: Request, from_file: dict[str, Any]) -> None:
        seen.append(request.settled(from_file)[0])

    monkeypatch.setattr("onnx_attnround.cli.main.run", run)
    monkeypatch.chdir(tmp_path)
    for arguments in (each for text in (README, *GUIDES.values()) for each in commands(text)):
        assert main(arguments) == 0
    assert len(seen) >= 6
    assert any(config.weight_bits == 4 and config.max_drop == 0.5 for config in seen)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not re.search("pip install|docker", line))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    known = options() | {"--help", "--install-completion", "--strict"}
    if path.parent.name == "docs":  # where the tools of this repository are spoken of
        for tool in (ROOT / "tools").glob("*.py"):
            known |= set(re.findall(r'"(--[a-z-]+)"', tool.read_text(encoding="utf-8")))
    assert named <= known


def test_the_config_example_is_valid() -> None:
    (example,) = blocks("toml", GUIDES["command_line"])
    config = QuantConfig.parse(tomllib.loads(example))
    assert config.layer_bits


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    files = re.findall(r"\b(?:onnx_attnround|tests|tools|docs)/[\w/]+(?:\.\w+)+\b", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_guides_name_what_there_is() -> None:
    words = set(re.findall(r"\w+", " ".join(GUIDES.values())))
    target = TARGETS["ort"]
    assert target.weighted | target.arithmetic | target.movement | target.absorbed <= words
    recipes = (ROOT / "docs" / "preprocessing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[`*]([\w-]+)[`*]", recipes))
    assert {*PREPROCESS, *Preprocess.model_fields} <= named
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in method for name in OBSERVERS)


def test_nothing_of_ours_is_called_the_papers() -> None:
    for path in DOCUMENTS:
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert "paper's formula" not in text
        if "2207.03088" in text:
            assert "our own derivation" in text


# --- figures of the README, within what another CPU or release may change -----------------

OPTIONS = ["--calib", str(ROOT / "models" / "digits_calib.npz")]
RESNET = str(ROOT / "models" / "digits_resnet.onnx")


def figures(pattern: str, text: str) -> list[float]:
    """The numbers that a pattern catches in the only line that it fits."""
    (line,) = [found for row in text.splitlines() if (found := re.search(pattern, row))]
    return [float(number.replace(",", "")) for number in line.groups()]


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = ["--eval", str(ROOT / "models" / "digits_eval.npz"), "--mean-bits", "4"]
    assert main([RESNET, str(tmp_path / "out.onnx"), *OPTIONS, *evaluation]) == 0
    printed, (shown, *_) = capsys.readouterr().out, blocks("text")
    for pattern, margin in (
        (r"^size +([\d.]+) kB +([\d.]+) kB +([\d.]+)x smaller", 0.03),
        (r"SQNR \(600 samples\) +([\d.]+) ± [\d.]+ dB", 0.1),
        (r"^top-1 \(600 samples\) +([\d.]+)% +([\d.]+)%", 0.01),
        (r"^(\d+) of (\d+) layers run in integer", 0.0),
        (r"^([\d.]+) bits per weight", 0.02),
    ):
        assert figures(pattern, shown) == pytest.approx(figures(pattern, printed), rel=margin)


@pytest.mark.slow
def test_the_sizes_of_several_means_are_those_of_the_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    means = ["--mean-bits", "3,4,5,6", "--method", "nearest"]  # which sizes do not depend on
    assert main([RESNET, str(tmp_path / "digits.onnx"), *OPTIONS, *means]) == 0
    printed = capsys.readouterr().out
    shown_there = blocks("text", GUIDES["bits"])
    (shown,) = [block for block in shown_there if block.startswith("mean bits")]
    for mean in (3, 4, 5, 6):
        pattern = rf"^ +{mean} +([\d,]+) "
        assert figures(pattern, shown) == pytest.approx(figures(pattern, printed), rel=0.03)
