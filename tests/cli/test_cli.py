"""The command line: exit codes, one line per error, what wins over what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnx_attnround import errors, pipeline
from onnx_attnround.__main__ import main
from onnx_attnround.calibrate import Calibration
from onnx_attnround.check import Checked, Fusion
from onnx_attnround.cli import progress
from onnx_attnround.config import QuantConfig
from onnx_attnround.records import Event
from onnx_attnround.samples.preprocess import PREPROCESS
from onnx_attnround.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FakeQuantize:
    """Stands for ``pipeline.quantize``: keeps what it was called with, and may raise."""

    error: BaseException | None = None
    config: QuantConfig | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: Path, calibration: Path | None, config: QuantConfig, **arguments: Any
    ) -> pipeline.QuantizeResult:
        self.config = config
        self.arguments = {"model": model, "calibration": calibration, **arguments}
        for done in (1, 2):
            arguments["on_event"](Event(stage="round", done=done, total=2, detail=f"conv{done}"))
        if self.error is not None:
            raise self.error
        return empty_result()


def empty_result() -> pipeline.QuantizeResult:
    """A run without layers or figures."""
    plan = pipeline.QuantPlan(target=TARGETS["ort"], layers=(), activations={})
    return pipeline.QuantizeResult(
        model=None,  # type: ignore[arg-type]
        config=QuantConfig(),
        plan=plan,
        fitted=0,
        ranges=Calibration(stats={}, params={}),
        allocation=pipeline.BitAllocation(bits={}, coding_length={}, mean_bits=8.0),
        roundings={},
        blocks=(),
        checked=Checked(
            target="ort", findings=(), oldest_onnxruntime=None, ran=False,
            fusion=Fusion(runtime="none", measured=False, integer=(), fallen={}, macs={}),
        ),
        verification=None,
        notes=("a remark",),
        seconds={},
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeQuantize:
    """The command line runs this in place of the pipeline."""
    stand_in = FakeQuantize()
    monkeypatch.setattr(pipeline, "quantize", stand_in)
    return stand_in


def only_line(text: str) -> str:
    """The text, which must be one line."""
    (line,) = text.splitlines()
    return line


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "onnx_attnround", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip


def test_help_has_every_setting_with_default_and_examples() -> None:
    done = command("quantize", "--help")
    assert done.returncode == 0
    assert "onnx-attnround quantize in.onnx out.onnx --calib samples.npz" in done.stdout
    for option in ("--mean-bits", "--first-last-bits", "--weight-storage", "--max-drop"):
        assert option in done.stdout
    assert "attention, adaround, nearest. Default: attention." in " ".join(
        done.stdout.replace("│", " ").split()
    )
    assert done.stderr == ""


def test_version_and_help_import_nothing_heavy() -> None:
    script = (
        "import sys; from onnx_attnround.__main__ import main; main(['--version']); "
        "main(['--help']); main(['quantize', '--help']); "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'onnx_ir'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("onnx-attnround")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "--nonsense"),
        ([], "IN"),
        (["in.onnx"], "OUT is missing"),
        (["in.onnx", "out.onnx", "surplus"], "surplus"),
        (["in.onnx", "out.onnx", "--weight-bits", "x"], "--weight-bits"),
        (["in.onnx", "out.onnx", "--weight-bits", "9"], "option --weight-bits: "),
        (["in.onnx", "out.onnx", "--act-bits", "9"], "8, 16 or 32"),
        (["in.onnx", "out.onnx", "--method", "magic"], "'attention', 'adaround' or 'nearest'"),
        (["in.onnx", "out.onnx", "--target", "abacus"], "expected one of ort"),
        (["in.onnx", "out.onnx", "--bit-choices", "2,x"], "option --bit-choices, item 2: "),
        (["in.onnx", "out.onnx", "--bit-choices", "1,4"], "option --bit-choices, item 1: "),
        (["in.onnx", "out.onnx", "--report", "r.txt"], "ends in one of .json, .html, .md, .xml"),
        (["in.onnx", "out.onnx", "--report", "r.md", "--report", "./r.md"], "give each once"),
        (["in.onnx", "out.onnx", "--quiet", "--verbose"], "give one of them"),
        (["in.onnx", "out.onnx", "--config", "missing.toml"], "cannot read config 'missing.toml'"),
        (["in.onnx", "out.onnx", "--preprocess", "magic"], "unknown preprocessing 'magic'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], message: str, fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert only_line(printed.err.split("Traceback")[0]).startswith("error: ")
    assert message in printed.err
    assert printed.out == ""
    assert fake.config is None


@pytest.mark.parametrize("line", ["weigth_bits = 4", "act_bits = 9", "[layer_bits]\nconv = 99"])
def test_a_wrong_config_file_is_code_2(
    line: str, fake: FakeQuantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(line)
    assert main(["in.onnx", "out.onnx", "--config", str(file)]) == 2
    assert only_line(capsys.readouterr().err).startswith("error: ")
    assert fake.config is None


def test_an_unknown_config_key_lists_the_valid_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("weigth_bits = 4")
    main(["in.onnx", "out.onnx", "--config", str(file)])
    printed = capsys.readouterr().err
    assert "unknown key 'weigth_bits': did you mean 'weight_bits'?" in printed


def test_without_options_the_defaults_hold(fake: FakeQuantize) -> None:
    assert main(["in.onnx", "out.onnx"]) == 0
    assert fake.config == QuantConfig()
    assert fake.arguments["model"] == Path("in.onnx")
    assert fake.arguments["output"] == Path("out.onnx")
    assert fake.arguments["calibration"] is None
    assert fake.arguments["evaluation"] is None
    assert fake.arguments["preprocess"] is None


def test_options_win_over_the_file_and_the_file_over_defaults(
    fake: FakeQuantize, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'weight_bits = 4\nseed = 7\nsteps = 11\nexclude = ["a*"]\nbit_choices = [3, 4]\n'
    )
    arguments = ["in.onnx", "out.onnx", "--config", str(file), "--weight-bits", "3", "--seed", "0"]
    assert main(arguments) == 0
    assert fake.config == QuantConfig(
        weight_bits=3, seed=0, steps=11, exclude=("a*",), bit_choices=(3, 4)
    )


def test_every_option_arrives(fake: FakeQuantize) -> None:
    text = (
        "in.onnx out.onnx --calib c.npz --preprocess cifar10 --eval e.npz --samples 9 "
        "--batch-size 3 --seed 5 --weight-bits 4 --act-bits 16 --mean-bits 3.5 "
        "--bit-choices 2,4,8 --first-last-bits 6 --method adaround --observer minmax --target ort "
        "--weight-storage int8 --weight-range full --threads 2 --include a* --include b "
        "--exclude c[0-9] --min-sqnr 12.5 --max-drop 0"
    )
    assert main(text.split()) == 0
    assert fake.config == QuantConfig(
        samples=9,
        batch_size=3,
        seed=5,
        weight_bits=4,
        act_bits=16,
        mean_bits=3.5,
        bit_choices=(2, 4, 8),
        first_last_bits=6,
        method="adaround",
        observer="minmax",
        target="ort",
        weight_storage="int8",
        weight_range="full",
        threads=2,
        include=("a*", "b"),
        exclude=("c[0-9]",),
        min_sqnr=12.5,
        max_drop=0.0,
    )
    assert fake.arguments["calibration"] == Path("c.npz")
    assert fake.arguments["evaluation"] == Path("e.npz")
    assert fake.arguments["preprocess"] == PREPROCESS["cifar10"]


def test_the_result_goes_to_stdout_and_one_line_per_stage_to_stderr(
    fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["in.onnx", "out.onnx"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["note: a remark", "wrote out.onnx"]
    assert printed.err.splitlines() == ["round"]


def test_verbose_tells_each_step_and_quiet_nothing(
    fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["in.onnx", "out.onnx", "--verbose"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "round", "round 1/2 conv1", "round 2/2 conv2",
    ]  # fmt: skip
    assert main(["in.onnx", "out.onnx", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ModelError("no graph\nat all"), 1),
        (errors.CalibrationError("no samples"), 1),
        (errors.OutputError("disk full"), 1),
        (errors.ConfigError("no such node"), 2),
        (errors.GateError("gate missed"), 3),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("by zero"), 1),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: int, fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = error
    assert main(["in.onnx", "out.onnx"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["round", "error"]
    assert main(["in.onnx", "out.onnx", "--verbose"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_named_and_asks_for_a_report(
    fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = ZeroDivisionError("by zero")
    main(["in.onnx", "out.onnx"])
    assert "error: unexpected ZeroDivisionError: by zero; please report" in capsys.readouterr().err


def test_running_out_of_memory_names_what_needs_less(
    fake: FakeQuantize, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = MemoryError()
    assert main(["in.onnx", "out.onnx"]) == 1
    assert "error: out of memory: give fewer --samples" in capsys.readouterr().err
    fake.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert main(["in.onnx", "out.onnx"]) == 1
    assert "error: the GPU is out of memory: give a smaller --batch" in capsys.readouterr().err


def test_a_missed_gate_still_writes_the_report(
    fake: FakeQuantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = errors.GateError("gate missed: SQNR")
    fake.error.result = empty_result()  # type: ignore[attr-defined]
    report = tmp_path / "report.json"
    assert main(["in.onnx", "out.onnx", "--report", str(report)]) == 3
    assert json.loads(report.read_text())["notes"] == ["a remark"]
    printed = capsys.readouterr()
    assert "wrote" not in printed.out
    assert printed.err.splitlines()[-1] == "error: gate missed: SQNR"


def test_a_report_without_a_folder_is_found_out_before_the_run(
    fake: FakeQuantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "missing" / "report.json"
    assert main(["in.onnx", "out.onnx", "--report", str(report)]) == 1
    assert "missing" in only_line(capsys.readouterr().err)
    assert fake.config is None


def test_bars_fill_when_the_next_stage_begins_and_keep_names_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt), progress._bars() as on_event:
        on_event(Event(stage="plan", done=0, total=1))
        on_event(Event(stage="round", done=1, total=2, detail="/conv[red] 1.00 -> 0.50"))
        raise KeyboardInterrupt
    plan, rounding = capsys.readouterr().err.splitlines()[-2:]
    assert plan.startswith("plan")
    assert " 1/1 " in plan
    assert " 1/2 " in rounding
    assert rounding.endswith("/conv[red] 1.00 -> 0.50")


def test_missing_files_are_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, output = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    assert main([missing, output]) == 1
    assert f"'{missing}' does not exist" in only_line(capsys.readouterr().err.splitlines()[-1])
    assert main([missing, "--dry-run"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_writes_nothing(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(models_dir / "digits_resnet.onnx")
    arguments = [model, str(tmp_path / "o.onnx"), "--dry-run", "--weight-bits", "4"]
    assert main([*arguments, "--first-last-bits", "6"]) == 0
    printed = capsys.readouterr().out
    layers = [line.split() for line in printed.splitlines() if " Conv " in line or " Gemm " in line]
    assert len(layers) >= 8
    assert [words[-1] for words in (layers[0], layers[1], layers[-1])] == ["6", "4", "6"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_gives_the_reason_for_what_is_left_out(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(models_dir / "digits_resnet.onnx"), "--dry-run", "--exclude", "/0/*"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("/0/Conv ")]
    assert line.split()[1:] == ["matched", "by", "exclude"]


def test_dry_run_judges_the_samples_as_the_run_does(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((8, 1, 99, 8), np.float32))
    np.save(tmp_path / "few.npy", np.load(models_dir / "digits_calib.npz")["input"][:8])
    arguments = [str(models_dir / "digits_resnet.onnx"), "--dry-run"]
    for option, name, words in (
        ("--calib", "missing.npy", "not found"),
        ("--calib", "wide.npy", "expected"),
        ("--eval", "wide.npy", "expected"),
    ):
        assert main([*arguments, option, str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and words in only_line(printed.err)
    given = [*arguments, "--calib", str(tmp_path / "few.npy"), "--report", str(tmp_path / "r.json")]
    assert main([*given, "--bit-choices", "3,4"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.split(":")[1].strip() for note in notes] == [
        "8 calibration samples are too few to keep some apart",
        "option --bit-choices has no effect",
        "option --report has no effect",
    ]
    assert not (tmp_path / "r.json").exists()
    before = set(tmp_path.iterdir())
    assert main([*given, "--work-dir", str(tmp_path / "work")]) == 0
    assert set(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def digits(models_dir: Path) -> list[str]:
    """A quick run on the sample model."""
    return [
        str(models_dir / "digits_resnet.onnx"),
        "out.onnx",
        *("--calib", str(models_dir / "digits_calib.npz")),
        *("--eval", str(models_dir / "digits_eval.npz")),
        *("--samples", "64", "--threads", "1", "--method", "nearest"),
    ]


def test_from_model_to_model(digits: list[str], tmp_path: Path) -> None:
    done = command(*digits, "--report", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "wrote out.onnx"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    accuracy = report["verification"]["accuracy"]
    assert accuracy["samples"] == 600
    assert accuracy["quantised_top1"] > 0.98
    assert report["config"]["method"] == "nearest"
    assert report["verification"]["quantised_bytes"] == (tmp_path / "out.onnx").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "report.json"}


def test_a_missed_gate_leaves_the_report_alone(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*digits, "--report", "report.json", "--min-sqnr", "200"]) == 3
    assert "below --min-sqnr 200" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_an_interrupt_leaves_nothing_behind(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(event: Event) -> None:
        if event.stage == "verify":
            raise KeyboardInterrupt

    def shown(**_: bool) -> AbstractContextManager[Callable[[Event], None]]:
        return nullcontext(interrupt)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "shown", shown)
    assert main(digits) == 130
    assert only_line(capsys.readouterr().err) == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
