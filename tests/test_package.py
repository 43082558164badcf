"""Wheel and sdist hold the package and its licence; what they install works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import onnx
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **environment: str) -> str:
    """What ``python`` prints, in a folder that is not ours, without our sources on its path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=environment.pop("cwd", tempfile.gettempdir()),
        env={**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, by their suffix."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", folder, cwd=str(ROOT))
    return {path.suffix: path for path in folder.iterdir()}


def test_they_hold_what_they_should(built: dict[str, Path]) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "onnx_attnround").rglob("*")
        if path.suffix in (".py", ".typed", ".html", ".css")
    }  # fmt: skip
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    info = Path(metadata).parent.as_posix()
    assert {name for name in names if not name.startswith(info)} == sources
    assert f"{info}/licenses/LICENSE" in names
    assert "\nLicense-Expression: Apache-2.0\n" in text
    with tarfile.open(built[".gz"]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert held >= sources | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    assert held >= {"tests/test_package.py", "models/digits_resnet.onnx", "docs/method.md"}
    assert not {name for name in held if name.startswith((".venv", "build", ".git/"))}


def installed(package: Path, folder: Path) -> Path:
    """The command line that the package installs into ``folder``, alone there."""
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation",
        "--target", folder, package)  # fmt: skip
    (program,) = (path for path in (folder / "bin").iterdir() if path.stem == "onnx-attnround")
    return program


def test_the_wheel_installs_and_converts(built: dict[str, Path], tmp_path: Path) -> None:
    site, out, models = tmp_path / "site", tmp_path / "out.onnx", ROOT / "models"
    program = installed(built[".whl"], site)
    run(program, models / "digits_resnet.onnx", out, "--calib", models / "digits_calib.npz",
        "--samples", "16", "--method", "nearest", PYTHONPATH=str(site))  # fmt: skip
    assert {node.op_type for node in onnx.load(out).graph.node} >= {"Conv", "DequantizeLinear"}


def test_the_sdist_installs(built: dict[str, Path], tmp_path: Path) -> None:
    program = installed(built[".gz"], tmp_path)
    code = "import onnx_attnround as package; print(package.__file__)"
    where = Path(run("-c", code, PYTHONPATH=str(tmp_path)).strip())
    assert where.is_relative_to(tmp_path)
    assert run(program, "--version", PYTHONPATH=str(tmp_path)).startswith("onnx-attnround ")
