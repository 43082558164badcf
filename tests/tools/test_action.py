"""The action of GitHub: its steps run in a clean folder, its files name what there is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnx_attnround.__main__ import main
from onnx_attnround.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
FAST = "--method nearest --observer minmax --samples 96 --threads 1"


def read_yaml(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def clean(tmp_path: Path, models_dir: Path) -> Path:
    """A folder with a model and samples, as a checkout of somebody else's repository."""
    folder = tmp_path / "their checkout"
    folder.mkdir()
    for name in ("digits_resnet.onnx", "digits_calib.npz", "digits_eval.npz"):
        shutil.copy(models_dir / name, folder)
    return folder


def step(folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """The step that quantises, with nothing in its environment but what a runner has."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder.parent / "summary"),
        "GITHUB_OUTPUT": str(folder.parent / "output"),
    }
    assert BASH is not None
    return subprocess.run(
        [BASH, str(ROOT / "tools" / "action.sh"), "quantise"],
        capture_output=True, text=True, check=False, cwd=folder, env={**environment, **given},
    )  # fmt: skip


GIVEN = {
    "MODEL": "digits_resnet.onnx",
    "OUTPUT": "out file.onnx",
    "CALIB": "digits_calib.npz",
    "EVAL": "digits_eval.npz",
    "REPORTS": "kept",
}


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_a_gate_that_is_met_and_one_that_is_missed(clean: Path) -> None:
    wrong = step(clean, **GIVEN, ARGUMENTS=f"{FAST} --exclude '/no $(such) *'")
    assert wrong.returncode == 2
    assert "pattern '/no $(such) *' matches no node" in wrong.stderr  # quoted, it stays whole
    met = step(clean, **GIVEN, ARGUMENTS=f"{FAST} --max-drop 5")
    assert met.returncode == 0, met.stderr
    assert (clean / "out file.onnx").is_file()
    reports = {path.name for path in (clean / "kept").iterdir()}
    assert reports == {"report.html", "report.json", "report.md", "gates.xml"}
    summary = (clean.parent / "summary").read_text()
    assert "top-1" in summary
    assert (clean.parent / "output").read_text().splitlines()[-2:] == [
        "exit-code=0", "reports=kept",
    ]  # fmt: skip

    missed = step(clean, **GIVEN | {"OUTPUT": "b.onnx"}, ARGUMENTS=f"{FAST} --min-sqnr 200")
    assert missed.returncode == 3
    assert "::error title=onnx-attnround::gate missed" in missed.stdout
    assert not (clean / "b.onnx").exists()
    assert len((clean.parent / "summary").read_text()) > len(summary)
    assert "exit-code=3" in (clean.parent / "output").read_text().splitlines()
    assert "<failure" in (clean / "kept" / "gates.xml").read_text()


def test_the_script_tells_its_steps() -> None:
    assert BASH is not None
    done = subprocess.run(
        [BASH, str(ROOT / "tools" / "action.sh")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "usage: tools/action.sh install|quantise\n")


def test_the_action_gives_the_script_what_it_reads() -> None:
    action = read_yaml(ROOT / "action.yml")
    script = (ROOT / "tools" / "action.sh").read_text(encoding="utf-8")
    (quantise,) = [each for each in action["runs"]["steps"] if each.get("id") == "quantise"]
    assert set(quantise["env"]) == set(re.findall(r"\$\{([A-Z]+):-", script)) - {"BASH_SOURCE"}
    named = re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text(encoding="utf-8"))
    assert set(named) == set(action["inputs"])
    runs = [each["run"] for each in action["runs"]["steps"] if "run" in each]
    assert all(re.search(rf"^{run.split()[-1]}\(\)", script, re.MULTILINE) for run in runs)
    for output in action["outputs"].values():
        assert f"{output['value'].split('.')[-1].strip(' }')}=%s" in script


def test_the_example_workflow_gives_the_action_what_it_takes() -> None:
    workflow = read_yaml(ROOT / "docs" / "examples" / "workflow.yml")
    action = read_yaml(ROOT / "action.yml")
    steps = workflow["jobs"]["quantise"]["steps"]
    (used,) = [each for each in steps if each["uses"].startswith("OWNER/")]
    assert set(used["with"]) <= set(action["inputs"])


def test_the_hook_is_a_command_that_takes_many_files(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hook,) = read_yaml(ROOT / ".pre-commit-hooks.yaml")
    program, command, *options = hook["entry"].split()
    assert program == "onnx-attnround" and command in COMMANDS
    assert re.search(hook["files"], "models/net.int.onnx")
    files = [str(models_dir / "digits_resnet.onnx")] * 2
    assert main([command, *options, *files]) == 0
    assert main([command, *options, *files, str(tmp_path / "none.onnx")]) == 1
    assert "none.onnx' does not exist" in capsys.readouterr().err


def test_the_image_copies_what_the_package_needs_and_runs_as_a_user() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    named = {word for word in copied if not word.startswith(("-", "/"))}
    assert named == allowed and all((ROOT / word).exists() for word in named)
    users = [index for index, line in enumerate(lines) if line.startswith("USER ")]
    assert users and users[-1] < next(
        index for index, line in enumerate(lines) if line.startswith("ENTRYPOINT")
    )
