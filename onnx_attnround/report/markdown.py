"""The report as Markdown, for the summary of a job in continuous integration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onnx_attnround.check import Checked
from onnx_attnround.report import tables
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.result import Compared, Point, QuantizeResult
from onnx_attnround.report.sentences import (
    advice_line,
    bits_line,
    exactness_line,
    fusion_lines,
    notes_of_all,
    release_line,
    title,
)
from onnx_attnround.report.summary import (
    Verdict,
    basis,
    lead,
    verdict,
    verdict_of_all,
    verdict_of_pair,
)

_MARKS = {"good": "✅", "bad": "❌", "": "⚪"}


def run(result: QuantizeResult, command: str | None = None) -> str:
    """A run: the verdict, the figures, the notes; the layers folded away."""
    found, plan = result.verification, result.plan
    parts = [f"### {title(result)}", *_verdict(verdict(result)), _escaped(lead(found))]
    if found is not None:
        parts.append(table(tables.comparison(found, elsewhere=plan.target.name != "ort")))
        parts.append(basis(found))
    lines = [*fusion_lines(result.checked.fusion, plan.skipped), *exactness_line(result.checked)]
    if plan.target.runtime == "onnxruntime":
        lines += release_line(result.checked)
    if plan.layers:
        lines.append(bits_line(result))
    parts.append(_list(lines))
    if result.search is not None:
        parts.append(_folded("The way to the goal", table(tables.trials(result.search))))
    if result.advice is not None:
        told = _escaped(advice_line(result.advice))
        parts.append(f"**What would help**\n\n{told}\n\n```toml\n{result.advice.block}\n```")
    if result.notes:
        parts.append("**Notes**\n\n" + _list(result.notes))
    if found is not None and found.kernels:
        parts.append(_folded("Where the time goes", table(tables.kernels(found))))
    if plan.layers:
        parts.append(_folded("Layers", table(tables.layers(result))))
    return _joined(parts, command)


def points(found: Sequence[Point], command: str | None = None) -> str:
    """The points of a trade-off in a table."""
    results = [(f"{point.config.mean_bits:g}", point.result) for point in found]
    parts = [
        f"### {title(found[0].result)}",
        *_verdict(verdict_of_all(results)),
        table(tables.points(found)),
        basis(found[0].verification),
        _list(f"{note}{some}" for note, some in notes_of_all(found)),
    ]
    return _joined(parts, command)


def check(checked: Checked, command: str | None = None) -> str:
    """What a check found."""
    tone, word = ("bad", checked.verdict) if checked.refused else ("good", "not refused")
    parts = [f"### Check for {checked.target}", *_verdict(Verdict(tone=tone, word=word))]
    if checked.findings:
        parts.append(table(tables.findings(checked)))
    parts.append(_list([*fusion_lines(checked.fusion, {}), *exactness_line(checked)]))
    return _joined(parts, command)


def compared(found: Compared, command: str | None = None) -> str:
    """A comparison of two files: where they part, the figures, the layers folded away."""
    pair = found.found
    parts = [
        f"### {_escaped(found.names[1])} beside {_escaped(found.names[0])}",
        *_verdict(verdict_of_pair(pair)),
        table(tables.comparison(pair.verification, elsewhere=False)),
        _list(found.notes),
    ]
    if pair.layers:
        parts.append(_folded("Layers", table(tables.layer_pairs(pair))))
    return _joined(parts, command)


def table(rows: Rows) -> str:
    """A table in the dialect of GitHub; what starts with ``>`` is right-aligned."""
    titles = [header.removeprefix(">") for header in rows.headers]
    rule = ["---:" if header.startswith(">") else "---" for header in rows.headers]
    lines = [titles, rule, *([_escaped(cell) for cell in row] for row in rows.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(found: Verdict) -> list[str]:
    detail = f": {_escaped(found.detail)}" if found.detail else ""
    return [f"{_MARKS[found.tone]} **{_escaped(found.word)}**{detail}", _list(found.reasons)]


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _folded(name: str, text: str) -> str:
    return f"<details><summary>{name}</summary>\n\n{text}\n\n</details>"


def _joined(parts: Iterable[str], command: str | None) -> str:
    shown = [part for part in parts if part]
    if command:
        shown.append(f"```sh\n{command}\n```")
    return "\n\n".join(shown) + "\n"


def _escaped(text: str) -> str:
    """``text`` with nothing in it that Markdown or a table reads as its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text)
