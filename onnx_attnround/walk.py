"""Walk float model and quantised prefix side by side, once, from layer to layer or by blocks.

At layer or block ``k`` the walk provides what it reads in the float model and in
the model whose earlier layers are already quantised. Only tensors that a later
stage reads are kept; the prefix is never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import Array, LayerPlan
from onnx_attnround.runtime import first_line, open_session
from onnx_attnround.samples import Samples
from onnx_attnround.stages import Stage, cut, cut_blocks, extract, raw_names
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
        self._feeds = samples.batches(batch_size)
        self._streams = [_Stream("float", model, cut(model, names), store, threads)]
        if quantised is not None:
            stages = cut(quantised, names, _added_codes(quantised, model))
            self._streams.append(_Stream("quantised", quantised, stages, store, threads))
        self._batches = 0

    def advance(self, index: int) -> None:
        """Compute what layer ``index`` reads, from what layer ``index - 1`` now is."""
        if index == 0:
            self._batches = _start(self._streams, self._feeds)
            return
        for stream in self._streams:
            stream.advance(index, self._batches)
            stream.release(index)

    def inputs(self, index: int) -> Iterator[tuple[Array, Array]]:
        """Per batch the float input of layer ``index`` and that of the quantised prefix.

        The latter are codes where the tensor is quantised.
        """
        plain, quantised = self._streams[0], self._streams[-1]
        for batch in range(self._batches):
            yield plain.read(index, batch)[0], quantised.read(index, batch)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBatch:
    """One batch at a block: its inputs in both models, before quantisation, and float outputs.

    Tensors by their names in the float model, each ``[n, ...]``.
    """

    plain: Mapping[str, Array]
    quantised: Mapping[str, Array]
    outputs: Mapping[str, Array]

    @property
    def samples(self) -> int:
        """How many samples the batch holds."""
        return next((len(values) for values in self.outputs.values() if values.ndim), 1)


class BlockWalk:
    """The two streams from block to block: ``advance(k)``, ``batches(k)``, quantise, and so on.

    The float stream is one block ahead, for the outputs that block ``k`` is to reproduce.
    """

    def __init__(
        self,
        model: ir.Model,
        quantised: ir.Model,
        blocks: Sequence[Sequence[LayerPlan]],
        samples: Samples,
        *,
        batch_size: int,
        store: ActivationStore,
        threads: int | None,
    ) -> None:
        names = [[layer.node for layer in block] for block in blocks]
        self.samples = samples.count
        self._feeds = samples.batches(batch_size)
        self._stages = cut_blocks(model, names)
        self._plain = _Stream("float", model, self._stages, store, threads)
        self._quantised = _Stream(
            "quantised", quantised, cut_blocks(quantised, names), store, threads
        )
        self._raw = raw_names(quantised)
        self.count = 0
        """How many batches there are, once ``advance(0)`` is done."""

    def advance(self, index: int) -> None:
        """Compute what block ``index`` reads and is to reproduce, from what the last one now is."""
        if index == 0:
            self.count = _start((self._plain, self._quantised), self._feeds)
        else:
            self._quantised.advance(index, self.count)
            for stream in (self._plain, self._quantised):
                stream.release(index)
        self._plain.advance(index + 1, self.count)

    def names(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inputs and the outputs of block ``index`` in the float model."""
        return self._stages[index + 1].inputs, self._stages[index + 1].outputs

    def batch(self, index: int, batch: int) -> BlockBatch:
        """One of the ``count`` batches at block ``index``, after ``advance(index)``."""
        inputs, outputs = self.names(index)
        return BlockBatch(
            plain={name: self._plain.get(name, batch) for name in inputs},
            quantised={n: self._quantised.get(self._raw.get(n, n), batch) for n in inputs},
            outputs={name: self._plain.get(name, batch) for name in outputs},
        )


def _start(streams: Sequence[_Stream], feeds: Iterator[dict[str, Array]]) -> int:
    """Read the samples once, keep what later stages read of them; the number of batches."""
    runs = [stream.start() for stream in streams]
    batches = 0
    for batch, values in enumerate(feeds):
        for run in runs:
            run(batch, values)
        batches = batch + 1
    return batches


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

    def read(self, index: int, batch: int) -> list[Array]:
        """What the layer or block behind stage ``index`` reads."""
        return [self.get(name, batch) for name in self._stages[index].reads]

    def get(self, name: str, batch: int) -> Array:
        """A live tensor."""
        return self._store.get(f"{self._label}:{name}", batch)

    def start(self) -> Callable[[int, dict[str, Array]], None]:
        """What to call with each batch of samples: runs stage 0 on it."""
        stage = self._stages[0]
        session = self._session(stage)
        kept = {name for later in self._stages[1:] for name in later.inputs}
        kept |= {name for stage in self._stages for name in stage.reads}

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
                self._run(session, stage, batch, {n: self.get(n, batch) for n in stage.inputs})

    def release(self, index: int) -> None:
        """Forget what no stage behind ``index`` reads."""
        for name in self._stages[index].released:
            self._store.release(f"{self._label}:{name}")

    def _session(self, stage: Stage) -> ort.InferenceSession | None:
        if not stage.outputs:
            return None
        return open_session(extract(self._model, stage), threads=self._threads)

    def _put(self, name: str, batch: int, values: Array) -> None:
        self._store.put(f"{self._label}:{name}", batch, np.require(values, requirements=("C", "W")))

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
