"""Names and figures stay whole, however narrow the terminal."""

from __future__ import annotations

import io

import pytest

from onnx_attnround.cli import progress
from onnx_attnround.records import Event
from onnx_attnround.report.layout import Rows, console_on, plain_text

NAME = "/model/encoder/layers.11/self_attention/query_projection/dense/MatMul_quant"
ROWS = Rows(
    ("layer", "op", ">weights", ">MACs", "because"),
    [[NAME, "MatMul", "9,437,184", "1,849,688,064", "why"], ["b", "Conv", "1", "2", "it is so"]],
)


def test_a_table_that_fits_is_a_table() -> None:
    head, first, second = plain_text(ROWS, 160).splitlines()
    assert head.split() == ["layer", "op", "weights", "MACs", "because"]
    assert first.split() == [NAME, "MatMul", "9,437,184", "1,849,688,064", "why"]
    assert second.index("Conv") == head.index("op") == len(NAME) + 2


@pytest.mark.parametrize("width", [80, 60, 40])
def test_else_each_name_has_a_line_of_its_own(width: int) -> None:
    lines = plain_text(ROWS, width).splitlines()
    assert NAME in lines
    words = " ".join(lines).split()
    assert {"9,437,184", "1,849,688,064", "MatMul", "Conv"} <= set(words)
    assert all(len(line) <= width for line in lines if line != NAME)


def test_a_bar_keeps_its_figures_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console_on", lambda _: console_on(file, 80))
    with pytest.raises(KeyboardInterrupt), progress._bars() as on_event:
        on_event(Event(stage="round w4.5", done=117, total=312, detail=f"{NAME} 1.0 -> 0.5"))
        raise KeyboardInterrupt
    line = file.getvalue().splitlines()[-1]
    assert "round w4.5" in line and "117/312" in line and "0:00:00" in line
    assert "/model/" in line and "…" in line
    assert len(line.rstrip()) <= 80
