"""Settings have the name that they have where they were given."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from small_models import build_proto

import onnx_attnround
from onnx_attnround.__main__ import main
from onnx_attnround.cli.wording import worded
from onnx_attnround.config import QuantConfig

PACKAGE = Path(onnx_attnround.__file__).parent
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if "cli" not in path.parts)
TWO = """
net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w> { y = Conv(x, w) }
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.onnx"
    path.write_bytes(build_proto(TWO).SerializeToString())
    return str(path)


def test_options_stand_in_place_of_settings_but_for_those_of_a_file() -> None:
    text = "raise `mean_bits`, give `calibration` or `evaluation`; `labels` are none of ours"
    assert worded(text) == (
        "raise --mean-bits, give --calib or --eval; `labels` are none of ours"
    )
    assert worded(text, {"mean_bits"}).startswith("raise `mean_bits`, give --calib")


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_name_settings_in_backticks(path: Path) -> None:
    """The command line puts its options there; in Python there are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    told = {id(node.body[0].value) for node in nodes if ast.get_docstring(node, clean=False)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            options = re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)
            assert options == [], f"{path.name}:{node.lineno}"
            named = re.findall(r"option '(\w+)'", node.value)
            assert named == [], f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weight-bits", "9"], "option --weight-bits: "),
        (["--exclude", "nowhere"], "pattern 'nowhere' matches no node; the command plan"),
        (["--act-bits", "8", "--block-size", "32"], "give --act-bits 32"),
        (["--layer-bits", "a"], "option --layer-bits: got 'a', expected NAME=BITS"),
        (["--layer-bits", "a=x"], "option --layer-bits, 'a': "),
        (["--min-sqnr", "20"], "give --calib or --eval"),
    ],
)
def test_the_command_line_names_options(
    arguments: list[str], words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "calib.npz", x=np.ones((8, 3, 8, 8), np.float32))
    given = [] if "--min-sqnr" in arguments else ["--calib", str(tmp_path / "calib.npz")]
    assert main([model, str(tmp_path / "out.onnx"), *given, *arguments]) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line and "`" not in line


def test_what_came_from_a_file_is_named_as_there(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('weight_bits = 9\nexclude = ["nowhere"]\n')
    run = [model, str(tmp_path / "out.onnx"), "--config", str(file)]
    assert main(run) == 2
    assert "option `weight_bits`: " in capsys.readouterr().err
    assert main([*run, "--weight-bits", "4"]) == 2
    assert "option `exclude`: pattern 'nowhere' matches no node; the" in capsys.readouterr().err


def test_every_key_is_an_option_and_takes_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[QuantConfig] = []

    def run(request: object, from_file: dict[str, object]) -> None:
        seen.append(request.settled(from_file)[0])  # type: ignore[attr-defined]

    monkeypatch.setattr("onnx_attnround.cli.main.run", run)
    values: dict[str, object] = {
        "layer_bits": {"/a=b/*": 6, "c": 4}, "bit_choices": (3, 4), "act_bits": 16,
        "block_size": 32, "steps": 7, "memory_limit": 4_000_000_000, "work_dir": Path("w"),
        "custom_op_library": ("a.so", "b.so"), "activation_memory_mb": 5,
    }  # fmt: skip
    assert main([
        "in.onnx", "out.onnx", "--layer-bits", "/a=b/*=6", "--layer-bits", "c=4",
        "--bit-choices", "4,3", "--act-bits", "16", "--block-size", "32", "--steps", "7",
        "--memory-limit", "4GB", "--work-dir", "w", "--custom-op-library", "a.so",
        "--custom-op-library", "b.so", "--activation-memory-mb", "5",
    ]) == 0  # fmt: skip
    (config,) = seen
    assert {key: getattr(config, key) for key in values} == values
