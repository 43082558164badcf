"""The gates of a run as test cases of JUnit XML, which continuous integration shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from onnx_attnround.check import Checked
from onnx_attnround.report.result import Compared, Point, QuantizeResult
from onnx_attnround.report.sentences import title
from onnx_attnround.verify import Verification, gates

NAME = "onnx_attnround"
_ILLEGAL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""The characters that XML does not allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A test case: what was demanded, and why it failed, ``None`` if it did not."""

    name: str
    failure: str | None


def run(result: QuantizeResult, command: str | None = None) -> str:
    """A case for each gate of the run, and one that its outputs are of use."""
    figures = {} if result.verification is None else _figures(result.verification)
    seconds = sum(result.seconds.values())
    return _text([_suite(title(result), _cases(result), figures, seconds)])


def points(found: Sequence[Point], command: str | None = None) -> str:
    """A suite for each point of a trade-off."""
    return _text(
        _suite(
            f"{title(point.result)} at {point.config.mean_bits:g} mean bits",
            _cases(point.result),
            _figures(point.verification),
            sum(point.result.seconds.values()),
        )
        for point in found
    )


def check(checked: Checked, command: str | None = None) -> str:
    """A case for each rule that the file breaks, failed if that makes it refused."""
    cases = [
        Case(name=f"{found.rule}: {found.node}", failure=found.why if found.refused else None)
        for found in checked.findings
    ]
    whole = Case(name="not refused", failure=checked.verdict if checked.refused else None)
    return _text([_suite(f"check for {checked.target}", [whole, *cases], {}, 0.0)])


def compared(found: Compared, command: str | None = None) -> str:
    """A case that no output has collapsed, and one that no layer parts from the float model."""
    verification, first = found.found.verification, found.found.first
    parts = None if first is None else f"'{first.node}': {first.parts}; {first.mend}"
    cases = [
        Case(name="no output collapses", failure="; ".join(verification.collapsed) or None),
        Case(name="no layer parts from the float model", failure=parts),
    ]
    name = " and ".join(found.names)
    return _text([_suite(name, cases, _figures(verification), sum(found.seconds.values()))])


def _cases(result: QuantizeResult) -> Iterator[Case]:
    found = result.verification
    yield Case(name="loads and runs", failure=None)  # what does not raises, and is not reported
    if found is None:
        return
    for gate in gates(found, result.config):
        yield Case(name=f"{gate.name}: {gate.demand}", failure=gate.missed)


def _figures(found: Verification) -> dict[str, str]:
    figures = {
        "float_bytes": str(found.float_bytes),
        "quantised_bytes": str(found.quantised_bytes),
        "speedup": f"{found.latency.speedup:.3f}",
        "samples": f"{found.samples} ({found.basis})",
    }
    if found.accuracy is not None:
        figures["float_top1"] = f"{found.accuracy.float_top1:.4f}"
        figures["quantised_top1"] = f"{found.accuracy.quantised_top1:.4f}"
    for output in found.outputs:
        if output.sqnr_db is not None:
            figures[f"sqnr_db: {output.name}"] = f"{output.sqnr_db:.2f}"
    return figures


def _suite(
    name: str, cases: Iterable[Case], figures: dict[str, str], seconds: float
) -> ElementTree.Element:
    listed = list(cases)
    suite = ElementTree.Element(
        "testsuite",
        name=name,
        tests=str(len(listed)),
        failures=str(sum(case.failure is not None for case in listed)),
        errors="0",
        skipped="0",
        time=f"{seconds:.3f}",
    )
    if figures:
        properties = ElementTree.SubElement(suite, "properties")
        for key, value in figures.items():
            ElementTree.SubElement(properties, "property", name=key, value=value)
    for case in listed:
        element = ElementTree.SubElement(suite, "testcase", classname=NAME, name=case.name)
        if case.failure is not None:
            failure = ElementTree.SubElement(element, "failure", message=case.failure)
            failure.text = case.failure
    return suite


def _text(suites: Iterable[ElementTree.Element]) -> str:
    root = ElementTree.Element("testsuites", name=NAME)
    root.extend(suites)
    ElementTree.indent(root)
    for element in root.iter():
        element.attrib = {key: _legal(value) for key, value in element.attrib.items()}
        element.text = element.text and _legal(element.text)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _legal(text: str) -> str:
    """``text`` with a mark for each character that XML cannot hold: nodes have any names."""
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
