"""A run, which its steps pass on, and the loop that goes on where an earlier run was cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from onnx_attnround.checkpoint import TAKEN, Checkpoint
from onnx_attnround.config import QuantConfig
from onnx_attnround.records import Event, OnEvent
from onnx_attnround.runtime.session import custom_ops, lean_sessions

T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """The settings of a run, whom it tells of its progress, and what it collects on its way.

    ``notes`` and ``seconds``, by stage, grow; ``checkpoint`` holds what an earlier run
    has finished.
    """

    config: QuantConfig
    on_event: OnEvent = lambda event: None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def part(self, config: QuantConfig, label: str) -> Run:
        """A run with other settings that goes on from this one, its stages named by ``label``."""

        def tell(event: Event) -> None:
            self.on_event(replace(event, stage=f"{event.stage} {label}".rstrip()))

        checkpoint = self.checkpoint.part(label) if label else self.checkpoint
        return Run(config, tell, list(self.notes), dict(self.seconds), checkpoint)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and announce it."""
        start = time.perf_counter()
        self.on_event(Event(stage=name, done=0, total=1))
        lean = self.config.memory_limit is not None
        with custom_ops(self.config.custom_op_library), lean_sessions(lean):
            yield
        self.seconds[name] = time.perf_counter() - start


class Units:
    """The layers or blocks that a stage does one after the other, each of them once.

    The results of those that the work dir holds are taken from there.
    """

    def __init__(self, run: Run, stage: str, count: int) -> None:
        self._run, self._stage = run, stage
        self._kept: list[Any] = [run.checkpoint.get(stage, unit) for unit in range(count)]

    @property
    def missing(self) -> list[int]:
        """The numbers of the units that are yet to be done."""
        return [unit for unit, result in enumerate(self._kept) if result is None]

    def walk(
        self,
        advance: Callable[[int], None],
        make: Callable[[int], T],
        take_up: Callable[[int, T], str],
    ) -> None:
        """Do all units in order.

        ``advance`` brings a walk to a unit; it is called of all up to the last that is missing,
        since each piece of a walk starts from the one before. ``make`` gives the result of a
        missing one, which is put into the work dir. ``take_up`` is given the result of every
        unit, and returns what to say of it.
        """
        last = max(self.missing, default=-1)
        for unit, kept in enumerate(self._kept):
            if unit <= last:
                advance(unit)
            if kept is None:
                result = make(unit)
                self._run.checkpoint.put(result, self._stage, unit)
                detail = take_up(unit, result)
            else:
                detail = take_up(unit, kept) + TAKEN
            total = len(self._kept)
            self._run.on_event(
                Event(stage=self._stage, done=unit + 1, total=total, detail=detail)
            )
