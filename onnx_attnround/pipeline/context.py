"""What goes along through the stages of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from onnx_attnround.checkpoint import Checkpoint
from onnx_attnround.config import QuantConfig
from onnx_attnround.records import Event
from onnx_attnround.runtime.session import custom_ops, lean_sessions

OnEvent = Callable[[Event], None]

_LOGGER = logging.getLogger("onnx_attnround")


def logged(on_event: OnEvent) -> OnEvent:
    """``on_event``, and a record of each event: a stage on level INFO, a step on DEBUG."""

    def both(event: Event) -> None:
        if event.detail:
            _LOGGER.debug("%s %d/%d %s", event.stage, event.done, event.total, event.detail)
        elif not event.done:
            _LOGGER.info("%s", event.stage)
        on_event(event)

    return both


def log_notes(notes: Iterable[str]) -> None:
    """A record on level INFO for each note of a result."""
    for note in notes:
        _LOGGER.info("note: %s", note)


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
