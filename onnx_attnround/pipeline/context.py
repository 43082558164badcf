"""What goes along through the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from onnx_attnround.checkpoint import Checkpoint
from onnx_attnround.config import QuantConfig
from onnx_attnround.records import Event
from onnx_attnround.runtime.session import custom_ops, lean_sessions

OnEvent = Callable[[Event], None]


@dataclass(slots=True)
class Run:
    """What a run collects on its way."""

    config: QuantConfig
    on_event: OnEvent
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and announce it."""
        start = time.perf_counter()
        self.on_event(Event(stage=name, done=0, total=1))
        lean = self.config.memory_limit is not None
        with custom_ops(self.config.custom_op_library), lean_sessions(lean):
            yield
        self.seconds[name] = time.perf_counter() - start
