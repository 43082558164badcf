"""What each node of a model takes, as ONNX Runtime's profile tells."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_attnround.graph.scratch import scratch
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session, run_on_samples


def profiled(model: ir.Model, feeds: Mapping[str, Array], runs: int = 1) -> list[dict[str, Any]]:
    """The events of some runs on one thread; none where the profile cannot be kept.

    With the session options that ONNX Runtime has by default, as files are run.
    Raises ``ModelError`` if ONNX Runtime refuses the model, ``CalibrationError`` if it fails.
    """
    with scratch(Path(tempfile.gettempdir())) as folder:
        profile = folder / "profile"
        session = open_session(model, threads=1, profile=profile, exact_sums=False)
        for _ in range(runs):
            run_on_samples(session, [], feeds)
        return _events(Path(session.end_profiling()))


def _events(profile: Path) -> list[dict[str, Any]]:
    """The events of a profile; none of one that a full disk has cut off.

    That is no reason to end here: what cannot be written is told where it is needed.
    """
    try:
        events: list[dict[str, Any]] = json.loads(profile.read_text())
    except (OSError, ValueError):
        return []
    return events
