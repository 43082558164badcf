"""Whether a file deploys on a target: rules of its runtime, what it loads, what it fuses.

A rule is a short function that finds the nodes that break it; the rules of a
runtime are a table in the module of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_attnround.check import openvino, openvino_session, ort, qnn, tensorrt
from onnx_attnround.check.execution import (
    DOES_NOT_RUN,
    find_cut_off_sums,
    find_faults,
    made_up_feed,
)
from onnx_attnround.check.fusion import (
    UNPACKING_OP,
    Fusion,
    expected_fusion,
    find_fusion,
    refused_fusion,
)
from onnx_attnround.check.rules import Finding, Rule, apply
from onnx_attnround.check.saturation import fits_int16
from onnx_attnround.check.versions import oldest_onnxruntime
from onnx_attnround.check.view import View
from onnx_attnround.errors import ModelError
from onnx_attnround.records import Array
from onnx_attnround.targets import Runtime, Target

__all__ = ["RULES", "UNPACKING_OP", "Checked", "Finding", "Fusion", "Rule", "check", "findings"]

DOES_NOT_LOAD = "does-not-load"

RULES: dict[Runtime, tuple[Rule, ...]] = {
    "onnxruntime": ort.RULES,
    "openvino": openvino.RULES,
    "tensorrt": tensorrt.RULES,
    "qnn": qnn.RULES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the check of a file found.

    ``findings`` are the rules that it breaks, those that the runtime refuses
    first. ``oldest_onnxruntime`` is the oldest release known to load the file.
    ``ran`` says whether the runtime ran it: TensorRT and QNN never do here. No layer
    runs in integer, by its ``fusion``, if it is refused and was not run.
    ``fits_int16`` says whether no sum in integer can be cut off on CPUs that add pairs of
    products in 16 bits; ``None`` where no layer of the target is computed there.
    """

    target: str
    findings: tuple[Finding, ...]
    fusion: Fusion
    oldest_onnxruntime: str | None
    ran: bool
    fits_int16: bool | None = None

    @property
    def loads(self) -> bool:
        """Whether the runtime, where it is here, did not fail to load the file."""
        return all(finding.rule != DOES_NOT_LOAD for finding in self.findings)

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings for which the runtime refuses the file, or computes something else."""
        return tuple(finding for finding in self.findings if finding.refused)

    @property
    def verdict(self) -> str:
        """A sentence on a file that is refused: the number of findings, and the first."""
        refused = self.refused
        rules, places = len({finding.rule for finding in refused}), len(refused)
        return (
            f"breaks {rules} rule{'s' * (rules > 1)} of target '{self.target}' in {places} "
            f"place{'s' * (places > 1)}, first {refused[0].rule} at {refused[0].node}: "
            f"{refused[0].why}"
        )


def findings(view: View) -> tuple[Finding, ...]:
    """The rules of the view's target that its model breaks; nothing is run."""
    return apply(RULES[view.target.runtime], view)


def check(model: ir.Model, target: Target, feed: Mapping[str, Array] | None = None) -> Checked:
    """Check a QDQ ``model`` against the rules of ``target``, and run it where its runtime is.

    ``feed`` is a batch of inputs by name to run it on; without, it is noise, where
    shapes are known but for the batch.
    """
    view = View(model, target)
    found = findings(view)
    runs = target.runtime == "onnxruntime" or (
        target.runtime == "openvino" and openvino_session.available()
    )
    try:
        fusion = find_fusion(view)
    except ModelError as error:
        runs, fusion = False, expected_fusion(view)
        found += (Finding(rule=DOES_NOT_LOAD, node="(model)", why=str(error), refused=True),)
    given = feed or made_up_feed(model)
    fits = fits_int16(view, found)
    if runs and given is not None:
        found += tuple(find_faults(view, given))
        if fits is False and target.runtime == "onnxruntime":
            found += tuple(find_cut_off_sums(view, given))
    ran = runs and given is not None and all(finding.rule != DOES_NOT_RUN for finding in found)
    if not ran and any(finding.refused for finding in found):
        fusion = refused_fusion(fusion)
    return Checked(
        target=target.name,
        findings=tuple(sorted(found, key=lambda finding: not finding.refused)),
        fusion=fusion,
        oldest_onnxruntime=oldest_onnxruntime(view),
        ran=ran,
        fits_int16=fits,
    )
