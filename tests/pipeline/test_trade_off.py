"""Several mean bits from one calibration: files as from runs of their own, and the front."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_attnround import QuantConfig, pipeline, quantize, trade_off
from onnx_attnround.__main__ import main
from onnx_attnround.errors import CalibrationError, ConfigError, GateError, OutputError
from onnx_attnround.pipeline import trade_off as module
from onnx_attnround.pipeline.trade_off import Point, _on_front, point_path, with_means
from onnx_attnround.records import Event

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "models"
SHARED = ["load", "simplify", "plan", "smooth", "calibrate", "pace"]
OWN = ["round", "write", "check", "verify"]
RESNET, EVALUATION = MODELS / "digits_resnet.onnx", MODELS / "digits_eval.npz"


def samples(count: int = 32) -> np.ndarray:
    return np.load(MODELS / "digits_calib.npz")["input"][:count]


def config(**options: Any) -> QuantConfig:
    return QuantConfig.parse({"threads": 1, "steps": 2, "observer": "minmax", **options})


@cache
def points_of(*means: float, evaluated: bool = False, **options: Any) -> tuple[Point, ...]:
    """A run that is not changed afterwards."""
    return trade_off(
        RESNET,
        samples(),
        config(**options),
        mean_bits=means,
        evaluation=EVALUATION if evaluated else None,
    )


def sqnr(point: Point) -> float:
    assert point.verification.worst_output is not None
    assert point.verification.worst_output.sqnr_db is not None
    return point.verification.worst_output.sqnr_db


# --- what is made -----------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["coding-length", "gram"])
def test_each_file_is_that_of_a_run_of_its_own(allocator: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    chosen = config(allocator=allocator)
    points = trade_off(RESNET, samples(), chosen, mean_bits=[3, 4.5], output=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.w3.onnx", "out.w4.5.onnx"]
    for point in points:
        assert point.output is not None
        mean = point.config.mean_bits
        assert point.output == point_path(out, point.config)
        assert point.size == point.output.stat().st_size
        assert point.result.allocation.mean_bits <= (mean or 0)
        alone = tmp_path / "alone.onnx"
        quantize(RESNET, samples(), config(allocator=allocator, mean_bits=mean), output=alone)
        assert alone.read_bytes() == point.output.read_bytes()


def test_what_does_not_depend_on_the_bits_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        usual = getattr(pipeline, name)

        def call(*given: Any, **named: Any) -> Any:
            done.append(name)
            return usual(*given, **named)

        return call

    for name in ("simplify", "plan_parted", "ranges_of", "_measure", "_round"):
        monkeypatch.setattr(pipeline, name, counted(name))
    events: list[Event] = []
    points = trade_off(
        RESNET, samples(), config(), mean_bits=[3, 4, 6], on_event=events.append
    )
    assert done == ["simplify", "plan_parted", "ranges_of", "_measure", *["_round"] * 3]
    stages = list(dict.fromkeys(event.stage for event in events))
    own = [f"{stage} w{mean}" for mean in (3, 4, 6) for stage in OWN]
    assert stages == SHARED + own
    for point in points:
        assert list(point.result.seconds) == [*SHARED, *OWN]
        assert point.result.notes == points[0].result.notes
    assert sqnr(points[0]) < sqnr(points[1]) < sqnr(points[2])


def test_accuracy_is_top1_where_there_are_labels() -> None:
    (labelled,) = points_of(4.0, evaluated=True)
    assert labelled.verification.accuracy is not None
    assert labelled.quality == labelled.verification.accuracy.quantised_top1
    (plain,) = points_of(4.0)
    assert plain.quality == sqnr(plain)


# --- the front --------------------------------------------------------------------------


class Spot(Point):
    """A point of which only size and quality count."""

    size = 0
    quality = 0.0

    def __init__(self, size: int, quality: float) -> None:
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "quality", quality)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_front_has_no_point_that_another_beats(found: list[tuple[int, int]]) -> None:
    points = [Spot(size, quality) for size, quality in found]
    front = {spot for spot, point in zip(found, points, strict=True) if _on_front(point, points)}
    assert front
    for size, quality in found:
        beaten = any(
            s <= size and q >= quality and (s, q) != (size, quality) for s, q in front
        )
        assert beaten == ((size, quality) not in front)


def test_a_point_is_marked_unless_another_beats_it() -> None:
    """Up to 4 bits take the same space: a mean of 2 saves nothing against one of 4."""
    points = points_of(2.0, 4.0, 8.0, bit_choices=(2, 4, 8))
    assert points[0].size >= points[1].size - 100
    assert [point.on_front for point in points][1:] == [True, True]
    assert points[2].size > points[1].size


# --- refusals and gates -----------------------------------------------------------------


def test_means_are_judged_before_any_work(tmp_path: Path) -> None:
    for means, words in (
        ([], "got no value"),
        ([3, 4, 3.0], "3 is given twice"),
        ([3, 9], "option `mean_bits`"),
        ([1], "option `mean_bits`"),
    ):
        with pytest.raises(ConfigError, match=words):
            trade_off(tmp_path / "nothing.onnx", mean_bits=means)
    with pytest.raises(ConfigError, match=r"no width is within `mean_bits` 3"):
        with_means(QuantConfig(bit_choices=(4, 8)), [4, 3])
    (kept,) = with_means(QuantConfig(weight_bits=4, mean_bits=5, target="tensorrt"), [6])
    assert (kept.weight_bits, kept.mean_bits, kept.target) == (4, 6, "tensorrt")


def test_files_and_samples_are_judged_before_any_work(tmp_path: Path) -> None:
    copy = tmp_path / "in.w3.onnx"
    copy.write_bytes(RESNET.read_bytes())
    events: list[Event] = []

    def refused(calibration: object, output: Path) -> None:
        trade_off(
            copy, calibration, config(), mean_bits=[4, 3], output=output, on_event=events.append
        )

    with pytest.raises(OutputError, match="is the input model itself"):
        refused(samples(), tmp_path / "in.onnx")
    with pytest.raises(OutputError, match="does not exist"):
        refused(samples(), tmp_path / "missing" / "out.onnx")
    with pytest.raises(CalibrationError, match="no samples to compare them on"):
        refused(None, tmp_path / "out.onnx")
    assert {event.stage for event in events} == {"load"}
    assert [path.name for path in tmp_path.iterdir()] == ["in.w3.onnx"]


def test_a_point_that_misses_a_gate_leaves_no_file_and_the_others_do(tmp_path: Path) -> None:
    low, high = (sqnr(point) for point in points_of(2.0, 6.0))
    out = tmp_path / "out.onnx"
    between = (low + high) / 2
    with pytest.raises(GateError, match=r"with mean bits 2, SQNR of output 'logits'") as caught:
        trade_off(RESNET, samples(), config(min_sqnr=between), mean_bits=[2, 6], output=out)
    assert "mean bits 6" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.w6.onnx"]
    assert isinstance(caught.value.result, tuple)
    missed, made = caught.value.result
    assert (missed.output, bool(missed.missed)) == (None, True)
    assert (made.output, made.missed) == (tmp_path / "out.w6.onnx", "")


def test_what_was_made_before_an_interrupt_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(event: Event) -> None:
        if event.stage == "verify w6":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trade_off(
            RESNET, samples(), config(), mean_bits=[3, 6], output=tmp_path / "out.onnx",
            on_event=interrupted,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out.w3.onnx"]
    alone = tmp_path / "alone.onnx"
    quantize(RESNET, samples(), config(mean_bits=3), output=alone)
    assert alone.read_bytes() == (tmp_path / "out.w3.onnx").read_bytes()


# --- the command line -------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    np.savez(tmp_path / "calib.npz", input=samples())
    settings = tmp_path / "fast.toml"
    settings.write_text('steps = 2\nobserver = "minmax"\nthreads = 1\nmean_bits = 5\n')
    return [
        str(RESNET), str(tmp_path / "out.onnx"),
        "--calib", str(tmp_path / "calib.npz"), "--config", str(settings),
    ]  # fmt: skip


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.onnx")}


def test_a_table_files_and_a_report(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main([*arguments, "--mean-bits", "3,4.5", "--report", str(report)]) == 0
    printed = capsys.readouterr()
    assert made(tmp_path) == {"out.w3.onnx", "out.w4.5.onnx"}
    head, plain, *rows = (line.split() for line in printed.out.splitlines())
    assert head[:3] == ["mean", "bits", "bytes"]
    assert plain[0] == "float"
    told = json.loads(report.read_text())
    assert set(told) == {"schema", "versions", "points"}
    for row, point in zip(rows, told["points"], strict=False):
        size = Path(point["file"]).stat().st_size
        assert row[:2] == [f"{point['mean_bits']:g}", f"{size:,}"]
        assert row[-1] == point["file"]
        assert ("*" in row) == point["on_front"]
        assert point["bytes"] == size
        assert point["gates_missed"] is None
        (output,) = point["report"]["verification"]["outputs"]
        assert row[2] == f"{output['sqnr_db']:.2f}"
        assert point["report"]["config"]["mean_bits"] == point["mean_bits"]
    assert "round w4.5" in printed.err.splitlines()


def test_one_value_is_a_run_as_ever(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--mean-bits", "3"]) == 0
    assert made(tmp_path) == {"out.onnx"}
    assert f"wrote {tmp_path / 'out.onnx'}" in capsys.readouterr().out
    alone = tmp_path / "alone.onnx"
    quantize(RESNET, samples(), config(mean_bits=3), output=alone)
    assert alone.read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize(
    ("means", "options", "files"),
    [
        ("[3, 4.5]", [], {"out.w3.onnx", "out.w4.5.onnx"}),
        ("[3]", [], {"out.onnx"}),
        ("[3, 4.5]", ["--mean-bits", "4,5"], {"out.w4.onnx", "out.w5.onnx"}),
        ("[3, 4.5]", ["--mean-bits", "4"], {"out.onnx"}),
    ],
)
def test_several_values_in_a_file_are_as_on_the_command_line(
    means: str, options: list[str], files: set[str], arguments: list[str], tmp_path: Path
) -> None:
    settings = tmp_path / "fast.toml"
    settings.write_text(settings.read_text().replace("mean_bits = 5", f"mean_bits = {means}"))
    assert main([*arguments, *options]) == 0
    assert made(tmp_path) == files


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ("[]", "option `mean_bits`"),
        ("[3, 3.0]", "3 is given twice"),
        ("[3, [4]]", "valid number, got [4]"),
        ("[3, 9]", "option `mean_bits`"),
    ],
)
def test_wrong_means_in_a_file_are_one_line_and_code_2(
    means: str,
    words: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "fast.toml").write_text(f"mean_bits = {means}\n")
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_missed_gate_is_code_3_and_in_table_and_report(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    gate = ["--mean-bits", "2,6", "--min-sqnr", "90", "--report", str(report), "--verbose"]
    assert main([*arguments, *gate]) == 3
    printed = capsys.readouterr()
    assert made(tmp_path) == set()
    error = next(line for line in printed.err.splitlines() if line.startswith("error:"))
    assert "with mean bits 2, SQNR" in error
    assert "with mean bits 6, SQNR" in error
    assert printed.out.count("gate missed") == 2
    assert printed.out.count("layers by bits") == 2
    points = json.loads(report.read_text())["points"]
    assert [point["file"] for point in points] == [None, None]
    assert all("SQNR" in point["gates_missed"] for point in points)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--mean-bits", "3,x"], "option --mean-bits"),
        (["--mean-bits", "x,3"], "option --mean-bits"),
        (["--mean-bits", "3,"], "option --mean-bits"),
        (["--mean-bits", "3,3"], "3 is given twice"),
        (["--mean-bits", "3,9"], "option --mean-bits"),
        (["--mean-bits", "x"], "option --mean-bits"),
    ],
)
def test_wrong_means_are_one_line_and_code_2(
    given: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_file_of_an_option_is_not_overwritten(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.w3.json"
    arguments[1] = str(tmp_path / "r.json")
    assert main([*arguments, "--mean-bits", "4,3", "--report", str(report)]) == 2
    assert "r.w3.json' is the file of --report" in capsys.readouterr().err


def test_a_dry_run_plans_each(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--mean-bits", "3,6", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("layers: 9, weights") == 2


def test_the_module_is_not_hidden_by_the_function() -> None:
    assert module.trade_off is trade_off
