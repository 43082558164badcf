"""The log of a run, by ``logging``, for programs that listen to it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from onnx_attnround.records import Event, OnEvent

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
