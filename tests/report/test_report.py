"""report: every figure in its place, JSON that any reader takes, tables that say it all."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import RenderableType

from onnx_attnround.check import Finding
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import OutputError
from onnx_attnround.pipeline import QuantizeResult
from onnx_attnround.report.console import check_console, console, plan_tables, points_table
from onnx_attnround.report.document import check_dict, report_dict
from onnx_attnround.report.forms import write_report
from onnx_attnround.report.layout import console_on
from onnx_attnround.report.result import Point
from onnx_attnround.targets import TARGETS
from onnx_attnround.verify import Latency, slower_note


def text(renderable: RenderableType) -> str:
    """What is printed where there is no terminal."""
    file = io.StringIO()
    console_on(file).print(renderable)
    return file.getvalue()


def row(printed: str, start: str) -> list[str]:
    """The words of the line that starts so."""
    (line,) = [line for line in printed.splitlines() if line.startswith(start)]
    return line.removeprefix(start).split()


def test_the_report_holds_every_figure(result: QuantizeResult) -> None:
    config = QuantConfig(weight_bits=4, exclude=("lstm*",), max_drop=2.0)
    report = report_dict(replace(result, config=config))
    assert report["schema"] == 1
    assert report["versions"].keys() == {"onnx_attnround", "onnx", "onnxruntime", "torch"}
    assert report["versions"]["onnx"] == onnx.__version__
    assert QuantConfig.parse(report["config"]) == config
    assert report["layers"][0] == {
        "node": "/body/conv[0]",
        "op": "Conv",
        "weight": "/body/conv[0].w",
        "shape": [8, 3, 5, 5],
        "parameters": 600,
        "macs": 1_234_567,
        "bits": 4,
        "coding_length": 2.5,
        "mse_nearest": 0.02,
        "mse_final": 0.005,
        "changed": 0.125,
        "sqnr_db": 28.5,
        "block_size": None,
        "runs_in_integer": True,
        "weight_only_kernel": None,
        "in_float_because": None,
    }
    assert report["layers"][1]["mse_final"] is None
    assert report["layers"][1]["runs_in_integer"] is False
    assert report["layers"][1]["in_float_because"] == "its bias is float"
    assert report["samples"] == {"fitted": 100, "judged": 256, "held_out_share": 0.0}
    assert report["activations"] == [
        {
            "tensor": tensor,
            "bits": 8,
            "signed": False,
            "dynamic": False,
            "range": [-0.5, 31.375],
            "observed": observed,
            "shares_range_of": shares,
        }
        for tensor, observed, shares in (("x", [-0.5, 30.0], None), ("flat", None, "x"))
    ]
    assert report["check"]["integer_share"] == 0.75
    assert report["check"]["oldest_onnxruntime"] == "1.18"
    assert report["check"]["fusion"]["runtime"] == "ONNX Runtime 1.31.1"
    assert report["check"]["findings"] == [
        {"rule": "zero-point-missing", "node": "head", "why": "write zeros", "refused": False}
    ]
    assert report["skipped"] == {"lstm": "op LSTM is not supported"}
    assert report["mean_bits"] == 4.0
    assert report["seconds"] == {"plan": 0.5, "round": 2.0}
    assert report["notes"] == ["no calibration samples: weights only"]


def test_the_report_holds_the_verification_with_what_follows(result: QuantizeResult) -> None:
    found = report_dict(result)["verification"]
    assert found["outputs"][0] == {
        "name": "logits",
        "sqnr_db": 31.25,
        "sqnr_error_db": 0.25,
        "max_abs_error": 0.5,
        "agreeing": 255,
        "judged": 256,
        "agreement": 255 / 256,
        "worst_slices": [{"axis": 1, "index": 3, "sqnr_db": 17.5}],
        "correlation": 0.999,
        "frozen": 0.25,
        "lost_extreme": {"axis": 1, "index": 2, "kept": 0.125, "expected": 0.875, "got": 0.109375},
        "collapsed": "its SQNR is low",
    }
    assert (found["basis"], found["held_out"]) == ("calibration", False)
    assert found["accuracy"]["float_top1"] == 0.95
    assert found["accuracy"]["drop_points"] == 1.5
    assert found["latency"]["speedup"] == 1.6
    assert found["latency"]["spread"] == [1.5, 1.75]
    assert (found["float_bytes"], found["quantised_bytes"]) == (4_000_000, 1_000_000)


def test_the_report_tells_the_share_kept_apart(result: QuantizeResult) -> None:
    assert result.verification is not None
    apart = replace(result.verification, basis="held out", samples=25)
    told = report_dict(replace(result, verification=apart))["samples"]
    assert told == {"fitted": 100, "judged": 25, "held_out_share": 0.2}


def test_the_report_does_without_verification(result: QuantizeResult) -> None:
    report = report_dict(replace(result, verification=None))
    assert report["verification"] is None
    assert report["layers"][0]["sqnr_db"] is None
    assert report["layers"][0]["runs_in_integer"] is True


def test_the_file_is_strict_json(result: QuantizeResult, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    changed = replace(result, seconds={"plan": np.float64(0.25), "round": math.nan})
    write_report(path, changed)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    report = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["verification"]["outputs"][1]["sqnr_db"] is None
    assert report["seconds"] == {"plan": 0.25, "round": None}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_is_an_output_error(
    result: QuantizeResult, tmp_path: Path
) -> None:
    with pytest.raises(OutputError):
        write_report(tmp_path / "missing" / "report.json", result)


def test_the_console_compares(result: QuantizeResult) -> None:
    printed = text(console(result, output=Path("out.onnx"), verbose=False))
    assert row(printed, "top-1 (200 samples)") == ["95.00%", "93.50%", "-1.50", "points"]
    assert row(printed, "logits: SQNR (256 samples it was fitted to)") == [
        "31.25",
        "±",
        "0.25",
        "dB",
    ]
    assert row(printed, "logits: top-1 agrees") == ["99.61%"]
    assert row(printed, "aux: SQNR (256 samples it was fitted to)") == ["exact"]
    assert row(printed, "logits: SQNR of slice 3 of axis 1, the worst") == ["17.50", "dB"]
    assert row(printed, "logits: extreme of slice 2 of axis 1") == ["0.875", "0.109", "12%", "kept"]
    assert row(printed, "logits: elements that no longer vary") == ["25%"]
    assert "warning: output 'logits' has collapsed: its SQNR is low" in printed
    assert row(printed, "size") == ["4.00", "MB", "1.00", "MB", "4.00x", "smaller"]
    assert row(printed, "latency (batch 16, 1 thread)")[:4] == ["8.00", "ms", "5.00", "ms"]
    assert "1.60x as fast (1.50 to 1.75)" in printed
    assert "1 of 2 layers run in integer in ONNX Runtime 1.31.1, 75.0% of their MACs" in printed
    assert "in float, its bias is float: head" in printed
    assert "in float, op LSTM is not supported: lstm" in printed
    assert "check: head: write zeros [zero-point-missing]" in printed
    assert "loads in ONNX Runtime 1.18 or newer" in printed
    assert "not compared with float: head" in printed
    assert "6.00 bits per weight; layers by bits: 1 at 4, 1 at 8" in printed
    assert "note: no calibration samples: weights only" in printed
    assert printed.splitlines()[-1] == "wrote out.onnx"
    assert "/body/conv[0]" not in printed


def test_weights_alone_are_told_with_their_kernels(result: QuantizeResult) -> None:
    """And what the scales of blocks add to the bits per weight."""
    kernels = {"/body/conv[0]": "MatMulNBits", "head": "Gemm"}
    fusion = replace(result.checked.fusion, integer=(), fallen={}, weight_only=kernels)
    rounding = result.roundings["/body/conv[0]"]
    blocks = replace(
        rounding, spec=replace(rounding.spec, block_size=16), scale=np.ones((75, 1), np.float32)
    )
    changed = replace(
        result,
        checked=replace(result.checked, fusion=fusion),
        roundings={"/body/conv[0]": blocks},
    )
    printed = text(console(changed, output=None, verbose=False))
    assert (
        "2 of 2 layers have low-bit weights and float inputs in ONNX Runtime 1.31.1: "
        "1 by MatMulNBits, 1 by Gemm"
    ) in printed
    assert "run in integer" not in printed
    assert "6.00 bits per weight; " in printed
    assert "1 at 4, 1 at 8; 8.00 bits with the scales" in printed
    told = report_dict(changed)["layers"][0]
    assert (told["block_size"], told["weight_only_kernel"]) == (16, "MatMulNBits")
    assert told["in_float_because"] is None


def test_a_dry_run_tells_why_layers_have_no_blocks(result: QuantizeResult) -> None:
    plan = replace(result.plan, unblocked={"head": "Conv takes one scale per channel"})
    printed = text(plan_tables(plan, result.allocation))
    assert row(printed, "no blocks of scales") == ["because"]
    assert "head                 Conv takes one scale per channel" in printed


def test_a_file_that_grew_is_called_larger(result: QuantizeResult) -> None:
    assert result.verification is not None
    grown = replace(result, verification=replace(result.verification, float_bytes=500_000))
    printed = text(console(grown, output=None, verbose=False))
    assert row(printed, "size") == ["500.00", "kB", "1.00", "MB", "2.00x", "larger"]


def test_the_console_lists_layers_if_verbose(result: QuantizeResult) -> None:
    printed = text(console(result, output=None, verbose=True))
    assert row(printed, "/body/conv[0]") == [
        "Conv", "8x3x5x5", "600", "1,234,567", "4", "2.00e-02", "5.00e-03", "12.5%", "28.5", "dB",
    ]  # fmt: skip
    assert row(printed, "head ") == ["Conv", "8x3x5x5", "600", "?", "8"]
    assert "wrote" not in printed


def test_the_console_tells_where_latency_was_measured(result: QuantizeResult) -> None:
    elsewhere = replace(result, plan=replace(result.plan, target=TARGETS["tensorrt"]))
    printed = text(console(elsewhere, output=None, verbose=False))
    assert "latency in ONNX Runtime here (batch 16, 1 thread)" in printed
    assert "loads in ONNX Runtime" not in printed


def test_the_check_is_printed_and_written(result: QuantizeResult, tmp_path: Path) -> None:
    printed = text(check_console(result.checked))
    assert row(printed, "head") == ["note", "zero-point-missing", "write", "zeros"]
    assert "is broken" not in printed
    clean = replace(result.checked, findings=(), ran=False)
    printed = text(check_console(clean))
    assert "no rule of target 'ort' is broken" in printed
    assert "not run" in printed
    broken = Finding(rule="does-not-load", node="(model)", why="no kernel", refused=True)
    printed = text(check_console(replace(clean, findings=(broken,))))
    assert "no kernel" in printed
    assert "run in integer" not in printed and "not run" not in printed
    write_report(tmp_path / "check.json", result.checked)
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["check"] == report_dict(result)["check"] == check_dict(result.checked)["check"]


def test_notes_of_all_points_are_printed_once_each(result: QuantizeResult) -> None:
    assert result.verification is not None
    noted = [replace(result, notes=("shared", *more)) for more in ((), ("slow",), ("slow",))]
    points = [
        Point(
            result=replace(one, config=QuantConfig(mean_bits=mean)),
            verification=result.verification, output=None, missed="",
        )
        for mean, one in zip((3, 4, 6), noted, strict=True)
    ]  # fmt: skip
    lines = text(points_table(points, verbose=False)).splitlines()
    notes = [line for line in lines if line.startswith("note")]
    assert notes == ["note: shared", "note (mean bits 4, 6): slow"]


def test_layers_in_a_kernel_of_low_bits_are_not_called_float(result: QuantizeResult) -> None:
    kernels = {"/body/conv[0]": "MatMulNBits", "head": "Gemm"}
    fusion = replace(result.checked.fusion, integer=(), fallen={}, weight_only=kernels)
    slow = Latency(
        batch=16, pairs=9, float_ms=1.0, quantised_ms=2.0, speedup=0.5, spread=(0.4, 0.6)
    )
    (note,) = slower_note(slow, fusion)
    assert "0 of 2 layers run in integer" in note and "in float" not in note


def test_many_names_are_counted(result: QuantizeResult) -> None:
    fallen = {f"n{i}": "its bias is float" for i in range(8)}
    found = replace(result.checked, fusion=replace(result.checked.fusion, fallen=fallen))
    printed = text(console(replace(result, checked=found), output=None, verbose=False))
    assert "in float, its bias is float: n0, n1, n2, n3, n4 and 3 more" in printed


def test_the_plan_names_what_is_quantised_and_what_is_not(result: QuantizeResult) -> None:
    printed = text(plan_tables(result.plan, result.allocation))
    assert row(printed, "/body/conv[0]") == ["Conv", "8x3x5x5", "600", "1,234,567", "4"]
    assert row(printed, "lstm") == ["op", "LSTM", "is", "not", "supported"]
    summary = printed.splitlines()[-1]
    assert summary.startswith("layers: 2, weights: 1,200, mean bits")
    assert summary.endswith(": 4.00, nodes left in float: 1")
    unknown = replace(result.allocation, bits={"head": 8}, mean_bits=math.nan)
    printed = text(plan_tables(result.plan, unknown))
    assert row(printed, "/body/conv[0]")[-1] == "-"
    assert "): known after a run, which measures the layers, nodes" in printed
    pinned = replace(result.allocation, mean_bits=math.nan)
    assert "): none, nodes" in text(plan_tables(result.plan, pinned))
