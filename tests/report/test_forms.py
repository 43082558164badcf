"""The forms of a report for people and pipelines: Markdown, JUnit XML, and what a page says."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, OutputError
from onnx_attnround.pipeline import QuantizeResult
from onnx_attnround.records import TensorStats
from onnx_attnround.report import junit, markdown
from onnx_attnround.report.charts import Series, along, code_histogram, histogram
from onnx_attnround.report.forms import ENDINGS, write_report
from onnx_attnround.report.page import check_page, points_page, run_page
from onnx_attnround.report.result import GoalSearch, Point, Trial

HOSTILE = '</title><script>alert("1")</script>|*_\x00'


def met(result: QuantizeResult) -> QuantizeResult:
    """The run with outputs that are of use, and gates that these reach."""
    assert result.verification is not None
    outputs = tuple(replace(output, collapsed=None) for output in result.verification.outputs)
    return replace(
        result,
        verification=replace(result.verification, outputs=outputs),
        config=QuantConfig(max_drop=2, min_sqnr=20),
    )


def points_of(result: QuantizeResult) -> tuple[Point, ...]:
    """Three points, of which the second is beaten."""
    assert result.verification is not None
    found = []
    for mean, size, front in ((3, 900_000, True), (4, 1_100_000, False), (6, 1_500_000, True)):
        measured = replace(result.verification, quantised_bytes=size)
        one = replace(result, config=QuantConfig(mean_bits=mean), verification=measured)
        found.append(
            Point(result=one, verification=measured, output=None, missed="", on_front=front)
        )
    return tuple(found)


def named(result: QuantizeResult, name: str) -> QuantizeResult:
    """The run with another name of its second layer, a note and an output of that name."""
    layers = (result.plan.layers[0], replace(result.plan.layers[1], node=name))
    bits = {layers[0].node: 4, name: 8}
    assert result.verification is not None
    outputs = tuple(replace(output, name=name) for output in result.verification.outputs)
    return replace(
        result,
        plan=replace(result.plan, layers=layers),
        allocation=replace(result.allocation, bits=bits, coding_length={}),
        verification=replace(result.verification, outputs=outputs, not_compared=(name,)),
        notes=(name,),
    )


class Text(HTMLParser):
    """The text of a page, tags and styles left out; and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_a_page_tells_what_matters_first(result: QuantizeResult) -> None:
    text = Text(run_page(result, "onnx-attnround in.onnx out.onnx")).text
    order = [
        "4.00× smaller, 1.60× as fast; top-1 is 93.50%, −1.50 points.",
        "Of no use as it is",
        "Output 'logits' has collapsed: its SQNR is low",
        "1.00 MB",
        "1.60 times as fast",
        "1.50 to 1.75 in half of 9 pairs of runs",
        "Signal over error 31.25 dB",
        "75.0% of MACs",
        "which flatters",
        "No calibration samples: weights only",
        "17.50 dB, slice 3 of axis 1",
        "Error along the network",
        "/body/conv[0] Conv",
        "op LSTM is not supported 1 lstm",
        "onnx-attnround in.onnx out.onnx",
    ]
    places = [text.index(each) for each in order]
    assert places == sorted(places)


def test_a_page_tells_of_gates(result: QuantizeResult) -> None:
    text = Text(run_page(met(result))).text
    assert "All 2 gates met SQNR of the worst output at least 20 dB; loss of top-1 at most" in text
    missed = replace(result, config=QuantConfig(max_drop=1))
    text = Text(run_page(missed)).text
    assert "Gate missed Loss of top-1 is 1.50 points, above max_drop 1" in text
    bare = replace(result, verification=None, roundings={})
    assert "Not measured there were no samples" in Text(run_page(bare)).text


def test_a_page_tells_of_a_goal(result: QuantizeResult) -> None:
    trial = Trial(
        act_bits=8, mean_bits=4.5, size=90_000, speedup=1.5, told="0.25 points", reached=True,
        kept=True,
    )  # fmt: skip
    reached = GoalSearch(goal="drop=0.5", trials=(trial,))
    text = Text(run_page(replace(met(result), search=reached))).text
    assert "Goal reached, all 2 gates met drop=0.5; SQNR of the worst output" in text
    assert "8 bits 4.50 90,000 1.50× 0.25 points reached" in text
    missed = replace(reached, missed="goal drop=0.5 is not reached")
    page = run_page(replace(met(result), search=missed))
    assert "Goal not reached Goal drop=0.5 is not reached" in Text(page).text
    assert "The way to the goal" in markdown.run(replace(result, search=missed))


def test_a_page_tells_where_the_time_goes(result: QuantizeResult) -> None:
    assert result.verification is not None
    told = " ".join(" ".join(Text(run_page(result)).words).split())
    assert "Where the time goes" in told
    assert "QLinearConv 4.5 Small0" in told
    assert "Small7 0.125 0.0625 1 other 0.125 0.0625 all 8.12 5.06" in told
    nothing = replace(result, verification=replace(result.verification, kernels=()))
    assert "Where the time goes" not in run_page(nothing)


def test_a_page_asks_nothing_of_anybody(result: QuantizeResult) -> None:
    """No script, no file, no address but the empty one of the icon."""
    for page in (run_page(result), points_page(points_of(result)), check_page(result.checked)):
        found = Text(page).elements
        assert not [tag for tag, _ in found if tag in ("script", "img", "iframe", "object", "base")]
        links = [a[key] for _, a in found for key in ("href", "src") if key in a]
        assert links == ["data:,"]
        style = page.split("<style>")[1].split("</style>")[0]
        assert "url(" not in style and "@import" not in style


def test_names_are_text_wherever_they_stand(result: QuantizeResult) -> None:
    changed = named(result, HOSTILE)
    page = run_page(changed, f"onnx-attnround '{HOSTILE}'")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert "<script" not in points_page(points_of(changed))
    told = markdown.run(changed)
    assert HOSTILE not in told and r"\</title\>\<script\>" in told
    cells = [line for line in told.splitlines() if line.startswith("| \\</title")]
    assert cells and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in cells[:2])
    suite = ElementTree.fromstring(junit.run(replace(changed, config=QuantConfig(strict=True))))
    assert suite.find(".//failure") is not None


def test_a_page_of_points_has_the_front_and_the_bits(result: QuantizeResult) -> None:
    page = points_page(points_of(result))
    text = Text(page).text
    assert "3 files, 2.67× to 4.44× smaller; 2 of them are best for the size." in text
    assert "3 mean bits, 900.00 kB" in text
    line = next(a["d"] for tag, a in Text(page).elements if a.get("class") == "line")
    assert line is not None and line.count("L") == 1  # of two points on the front
    assert "1 /body/conv[0] 4 4 4" in text


def test_markdown_is_a_table_that_github_reads(result: QuantizeResult) -> None:
    told = markdown.run(met(result), "onnx-attnround in.onnx out.onnx")
    assert "✅ **All 2 gates met**" in told
    rows = [line for line in told.splitlines() if line.startswith("|")]
    assert rows[:2] == ["|  | float | quantised | change |", "| --- | ---: | ---: | ---: |"]
    assert r"| size | 4.00 MB | 1.00 MB | 4.00x smaller |" in rows
    assert "<details><summary>Layers</summary>" in told
    assert "```sh\nonnx-attnround in.onnx out.onnx\n```" in told
    assert "❌ **Of no use as it is**" in markdown.run(result)
    assert "| 3 | 900,000 | 31.25 dB |" in markdown.points(points_of(result))
    assert "✅ **not refused**" in markdown.check(result.checked)


def test_gates_are_cases_of_junit(result: QuantizeResult) -> None:
    root = ElementTree.fromstring(junit.run(met(result)))
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names[0] == "loads and runs"
    assert names[1] == "min_sqnr: SQNR of the worst output at least 20 dB"
    figures = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert figures["sqnr_db: logits"] == "31.25" and figures["speedup"] == "1.600"
    missed = replace(result, config=QuantConfig(max_drop=1, strict=True))
    root = ElementTree.fromstring(junit.run(missed))
    failures = [each.get("message") for each in root.iter("failure")]
    assert failures == [
        "loss of top-1 is 1.50 points, above `max_drop` 1",
        "output 'logits' has collapsed: its SQNR is low",
    ]
    assert len(ElementTree.fromstring(junit.points(points_of(result)))) == 3


def test_a_check_is_reported_in_all_forms(result: QuantizeResult, tmp_path: Path) -> None:
    for ending in ENDINGS.split(", "):
        write_report(tmp_path / f"check{ending}", result.checked, "onnx-attnround --check x.onnx")
        assert "zero-point-missing" in (tmp_path / f"check{ending}").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ends in one of \.json, \.html, \.md, \.xml"):
        write_report(tmp_path / "check.txt", result.checked)
    with pytest.raises(OutputError):
        write_report(tmp_path / "missing" / "check.html", result.checked)


def test_a_histogram_shows_what_the_codes_cannot_hold() -> None:
    found = histogram(np.array([1, 5, 1]), np.array([-1.0, 0.0, 1.0, 3.0]), (0.0, 1.0))
    assert (found.start, found.width) == (25.0, 25.0)
    assert "holds 0 to 1" in found.told
    codes = code_histogram(np.array([-2, 0, 0, 1]), -2, 1)
    assert codes.told == "codes -2 to 1, 1 of them unused"
    assert re.findall(r"V([\d.]+)h", codes.path) == ["36.9", "100.0", "0.0", "36.9"]


def test_marks_lie_where_their_values_say() -> None:
    series = [
        Series(label="before", style="ring", values=[0.0, 10.0]),
        Series(label="after", style="dot", values=[10.0, None]),
    ]
    chart = along(["a", "b"], series, "dB")
    dots = {each.label: re.findall(r"M([\d.]+) ([\d.]+)", each.path) for each in chart.drawn}
    (left, low), (right, high) = dots["before"]
    assert (left, right) == ("25.00", "75.00") and float(low) > 90 and float(high) < 10
    assert dots["after"] == [("25.00", high)]
    assert chart.links == f"M25.00 {low}V{high}"
    assert chart.slots[1].told == "2. b\nbefore: 10.0 dB"
    assert [tick.label for tick in chart.y_ticks] == ["0", "5", "10"]


def test_what_a_tensor_holds_is_drawn_with_its_range(result: QuantizeResult) -> None:
    stats = TensorStats(
        name="x", count=9, lo=-0.5, hi=60.0, hist=np.array([3, 6]), edges=np.array([-1.0, 0, 63])
    )
    changed = replace(result, ranges=replace(result.ranges, stats={"x": stats}))
    found = Text(run_page(changed)).elements
    held = [a["width"] for _, a in found if a.get("class") == "held"]
    assert "49.8" in held  # -0.5 to 31.375 of -1 to 63
    assert "100" in held  # of the codes of a weight
