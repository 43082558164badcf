"""Walk float model and quantised prefix side by side, once, from layer to layer.

At layer ``k`` the walk provides what the layer reads in the float model and in
the model whose earlier layers are already quantised. Only tensors that a later
stage reads are kept; the prefix is never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, LayerPlan
from onnx_attnround.runtime import first_line, open_session
from onnx_attnround.samples import Samples
from onnx_attnround.stages import Stage, cut, extract
from onnx_attnround.store import ActivationStore


class Walk:
    """The two streams. Call ``advance(k)``, read ``inputs(k)``, quantise layer ``k``, and so on.

    ``quantised`` may be updated in place between the calls: stage ``k`` is
    extracted when it is reached. Without it, the float stream stands for both.
    """

    def __init__(
        self,
        model: ir.Model,
        quantised: ir.Model | None,
        layers: Sequence[LayerPlan],
        samples: Samples,
        *,
        batch_size: int,
        store: ActivationStore,
        threads: int | None,
    ) -> None:
        names = [layer.node for layer in layers]
        self._samples = samples
        self._batch_size = batch_size
        self._streams = [_Stream("float", model, cut(model, names), store, threads)]
        if quantised is not None:
            stages = cut(quantised, names, _added_codes(quantised, model))
            self._streams.append(_Stream("quantised", quantised, stages, store, threads))
        self._batches = 0

    def advance(self, index: int) -> None:
        """Compute what layer ``index`` reads, from what layer ``index - 1`` now is."""
        if index == 0:
            self._start()
            return
        for stream in self._streams:
            stream.advance(index, self._batches)

    def _start(self) -> None:
        """Read the samples once; only inputs that a later stage reads are kept."""
        runs = [stream.start() for stream in self._streams]
        for batch, feeds in enumerate(self._samples.batches(self._batch_size)):
            for run in runs:
                run(batch, feeds)
            self._batches = batch + 1

    def inputs(self, index: int) -> Iterator[tuple[Array, Array]]:
        """Per batch the float input of layer ``index`` and that of the quantised prefix.

        The latter are codes where the tensor is quantised.
        """
        plain, quantised = self._streams[0], self._streams[-1]
        for batch in range(self._batches):
            yield plain.layer_input(index, batch), quantised.layer_input(index, batch)


class _Stream:
    """One model, its stages and its live tensors in the store."""

    def __init__(
        self,
        label: str,
        model: ir.Model,
        stages: Sequence[Stage],
        store: ActivationStore,
        threads: int | None,
    ) -> None:
        self._label = label
        self._model = model
        self._stages = stages
        self._store = store
        self._threads = threads

    def layer_input(self, index: int, batch: int) -> Array:
        return self._get(self._stages[index].reads, batch)

    def _get(self, name: str, batch: int) -> Array:
        return self._store.get(f"{self._label}:{name}", batch)

    def start(self) -> Callable[[int, dict[str, Array]], None]:
        """What to call with each batch of samples: runs stage 0 on it."""
        stage = self._stages[0]
        session = self._session(stage)
        kept = {name for later in self._stages[1:] for name in later.inputs}
        kept |= {later.reads for later in self._stages}

        def run(batch: int, feeds: dict[str, Array]) -> None:
            for name in feeds.keys() & kept:
                self._put(name, batch, feeds[name])
            if session is not None:
                self._run(session, stage, batch, feeds)

        return run

    def advance(self, index: int, batches: int) -> None:
        stage = self._stages[index]
        session = self._session(stage)
        if session is not None:
            for batch in range(batches):
                self._run(session, stage, batch, {n: self._get(n, batch) for n in stage.inputs})
        for name in stage.released:
            self._store.release(f"{self._label}:{name}")

    def _session(self, stage: Stage) -> ort.InferenceSession | None:
        if not stage.outputs:
            return None
        return open_session(extract(self._model, stage), threads=self._threads)

    def _put(self, name: str, batch: int, values: Array) -> None:
        self._store.put(f"{self._label}:{name}", batch, np.ascontiguousarray(values))

    def _run(
        self, session: ort.InferenceSession, stage: Stage, batch: int, feeds: dict[str, Array]
    ) -> None:
        try:
            results = session.run(list(stage.outputs), {n: feeds[n] for n in stage.inputs})
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise CalibrationError(
                f"ONNX Runtime failed on calibration batch {batch}: {first_line(error)}"
            ) from error
        for name, values in zip(stage.outputs, results, strict=True):
            self._put(name, batch, values)


def _added_codes(quantised: ir.Model, model: ir.Model) -> set[str]:
    """The integer tensors that stand for activations in ``quantised`` alone."""
    known = {value.name for node in model.graph for value in node.outputs}
    read = {
        node.inputs[0].name or ""
        for node in quantised.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    }
    return read - known
