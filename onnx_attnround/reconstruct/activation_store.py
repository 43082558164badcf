"""Where the live activations of the walk are kept: memory up to a budget, then a file."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from onnx_attnround.errors import OutputError
from onnx_attnround.graph.scratch import scratch
from onnx_attnround.runtime.device import Value, fetched, placed


@dataclass(slots=True)
class _Spilled:
    """A tensor that lies in a file of its own."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    device: torch.device


class ActivationStore:
    """Batches of named tensors; what exceeds ``budget`` bytes, of their device, goes to disk.

    Files are read with plain reads, never mapped: mapped pages would count as
    resident memory. A context manager; leaving it deletes the files.
    """

    def __init__(self, budget: int) -> None:
        self._free = budget
        self._held: dict[tuple[str, int], Value | _Spilled] = {}
        self._folder: Path | None = None
        self._open = ExitStack()
        self._written = 0

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.clear()
        self._open.close()

    def put(self, name: str, batch: int, values: Value) -> None:
        """Keep one batch; raises ``OutputError`` if the disk is full."""
        # Arrays of text, which torch does not have, cannot go into a raw file.
        if values.nbytes > self._free and isinstance(values, torch.Tensor):
            self._held[name, batch] = self._spill(values)
        else:
            self._free -= values.nbytes
            self._held[name, batch] = values

    def get(self, name: str, batch: int) -> Value:
        """The batch that ``put`` kept under this name."""
        held = self._held[name, batch]
        if isinstance(held, _Spilled):
            return placed(np.fromfile(held.path, held.dtype).reshape(held.shape), held.device)
        return held

    def release(self, name: str) -> None:
        """Forget all batches of a tensor."""
        for key in [key for key in self._held if key[0] == name]:
            held = self._held.pop(key)
            if isinstance(held, _Spilled):
                held.path.unlink()
            else:
                self._free += held.nbytes

    def _spill(self, tensor: torch.Tensor) -> _Spilled:
        values = fetched(tensor)
        try:
            if self._folder is None:
                self._folder = self._open.enter_context(scratch(Path(tempfile.gettempdir())))
            path = self._folder / f"{self._written}.bin"
            values.tofile(path)
        except OSError as error:
            raise OutputError(
                f"cannot keep activations on disk: {error}; free some disk space, set TMPDIR to a "
                "larger disk, or use fewer samples"
            ) from error
        self._written += 1
        return _Spilled(path, values.dtype, values.shape, tensor.device)
