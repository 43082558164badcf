"""The results of a sweep in one table: on a console, as JSON, as Markdown, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx_attnround.report.document import SCHEMA, versions
from onnx_attnround.report.layout import Rows
from onnx_attnround.report.markdown import table
from onnx_attnround.report.page import render
from onnx_attnround.report.summary import Verdict
from onnx_attnround.report.tables import size


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """The result of one job of a sweep.

    ``status`` is done, gate missed or failed, and ``message`` says why it is not done. ``figures``
    hold ``bytes``, ``float_bytes``, ``sqnr_db``, ``agreement``, ``top1``, ``float_top1``,
    ``speedup``, ``integer_share`` and ``basis`` of a model that was made and measured, ``None``
    where there is none: a speed is that of ONNX Runtime, and is told for its targets alone.
    """

    name: str
    model: str
    target: str
    preset: str
    status: str
    message: str
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)


def swept_table(found: Sequence[Swept]) -> Rows:
    """A row for each job."""
    headers = "bytes", "smaller", "SQNR", "agreement", "top-1", "speed", "seconds"
    return Rows(
        ("job", *(f">{name}" for name in headers), "result"),
        [_cells(each) for each in found],
    )


def _cells(each: Swept) -> list[str]:
    figures = each.figures
    made, before = figures.get("bytes"), figures.get("float_bytes")
    told = {"sqnr_db": "{:.2f} dB", "agreement": "{:.2%}", "top1": "{:.2%}", "speedup": "{:.2f}x"}
    known = {key: figures.get(key) for key in told}
    return [
        each.name,
        "" if made is None else size(made),
        "" if made is None or before is None else f"{before / made:.2f}x",
        *("" if known[key] is None else form.format(known[key]) for key, form in told.items()),
        f"{each.seconds:.0f}",
        each.status if not each.message else f"{each.status}: {each.message}",
    ]


def swept_dict(found: Sequence[Swept]) -> dict[str, Any]:
    """The results, as JSON has them."""
    return {"schema": SCHEMA, "versions": versions(), "jobs": [asdict(each) for each in found]}


def swept_markdown(found: Sequence[Swept]) -> str:
    """The table, under how many jobs are done."""
    return f"### Sweep: {verdict_of(found).word}\n\n{table(swept_table(found))}\n"


def swept_page(found: Sequence[Swept], folder: Path) -> str:
    """A page with the table, whose jobs lead to their own pages in ``folder``."""
    pages = {each.name: f"{each.name}.html" for each in found}
    there = {name: page for name, page in pages.items() if (folder / page).is_file()}
    return render(
        "swept.html",
        title="Sweep",
        verdict=verdict_of(found),
        models=len({each.model for each in found}),
        targets=len({each.target for each in found}),
        presets=len({each.preset for each in found}),
        table=swept_table(found),
        pages=there,
    )


def verdict_of(found: Sequence[Swept]) -> Verdict:
    """How many jobs are done, and what became of the others."""
    others = [f"{each.name}: {each.status}, {each.message}" for each in found if each.message]
    done = sum(each.status == "done" for each in found)
    tone = "good" if done == len(found) else "bad"
    return Verdict(tone=tone, word=f"{done} of {len(found)} jobs are done", reasons=others)
