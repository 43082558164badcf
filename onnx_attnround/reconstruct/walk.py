"""Walk float model and quantised prefix side by side, once, from layer to layer or by blocks.

At layer or block ``k`` the walk provides what it reads in the float model and in
the model whose earlier layers are already quantised. Only tensors that a later
piece reads are kept; the prefix is never run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import onnx_ir as ir
import onnxruntime as ort
import torch

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError
from onnx_attnround.graph import parted_choices, reads_of, take_choices
from onnx_attnround.reconstruct.activation_store import ActivationStore
from onnx_attnround.reconstruct.cuts import Piece, Ties, cut, cut_blocks, extract, raw_names
from onnx_attnround.records import Array, LayerPlan
from onnx_attnround.runtime.device import Value, open_device, placed, release, room_on, run_on
from onnx_attnround.runtime.session import open_session, told_as
from onnx_attnround.samples import Feeds, Samples
from onnx_attnround.samples.mask import counted, find_mask, tokens


@dataclass(frozen=True, slots=True)
class Place:
    """Where a walk computes, with how many threads, and where it keeps what is read later."""

    store: ActivationStore
    device: torch.device
    threads: int | None = None


@contextmanager
def open_place(config: QuantConfig) -> Iterator[Place]:
    """The device of ``config``, with a store as large as ``config`` and its memory allow."""
    device = open_device(config.device)
    with ActivationStore(room_on(device, config.activation_memory_mb << 20)) as store:
        yield Place(store, device, config.threads)


class _Padding:
    """Which tokens pad each batch: noted while the batches go by, for what is compared later."""

    def __init__(self, model: ir.Model) -> None:
        self._mask = find_mask(model)
        self._tokens: list[Array | None] = []

    def noted(self, batches: Iterator[Feeds]) -> Iterator[Feeds]:
        """The batches, as they are."""
        for feeds in batches:
            self._tokens.append(tokens(feeds, self._mask))
            yield feeds

    def cleared(self, values: torch.Tensor, batch: int) -> torch.Tensor:
        """A tensor of this batch, NaN at padded tokens, so that no sum counts them."""
        kept = counted(tuple(values.shape), self._tokens[batch])
        if kept is None or not values.is_floating_point():
            return values  # of integers a block has no loss
        return values.masked_fill(torch.from_numpy(~kept[..., None]).to(values.device), math.nan)


class Walk:
    """The two streams. Call ``advance(k)``, read ``inputs(k)``, quantise layer ``k``, and so on.

    ``quantised`` may be updated in place between the calls: piece ``k`` is
    extracted when it is reached. It is the walk's own: what it would choose or draw otherwise
    than the float model becomes an input of it, which the float stream provides.
    Without it, the float stream stands for both.
    """

    def __init__(
        self,
        model: ir.Model,
        quantised: ir.Model | None,
        layers: Sequence[LayerPlan],
        samples: Samples,
        batch_size: int,
        place: Place,
    ) -> None:
        names = [layer.node for layer in layers]
        self._layers = layers
        self._padding = _Padding(model)
        batches = self._padding.noted(samples.batches(batch_size))
        self._feeds = _placed(batches, place.device)
        taken: dict[str, str] = {}
        if quantised is not None:
            taken = take_choices(quantised, model, parted_choices(model, quantised))
        pieces = cut(model, names, ties=Ties(lends=set(taken.values())))
        lender = _Stream("float", model, pieces, place, taken)
        self._streams = [lender]
        if quantised is not None:
            ties = Ties.of(taken, pieces)
            pieces = cut(quantised, names, _added_codes(quantised, model), ties)
            self._streams.append(_Stream("quantised", quantised, pieces, place))
        self._batches = 0

    def advance(self, index: int) -> None:
        """Compute the input of layer ``index``, with layer ``index - 1`` as it is now."""
        if index == 0:
            self._batches = _start(self._streams, self._feeds)
            return
        for stream in self._streams:
            stream.advance(index, self._batches)
            stream.release(index)

    def inputs(self, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per batch the float input of layer ``index`` and that of the quantised prefix.

        The latter are codes where the tensor is quantised, but before its quantisation where
        its range is found in each run. Padded tokens are NaN in the
        former, so that the moments leave them out.
        """
        plain, quantised = self._streams[0], self._streams[-1]
        by_token = self._layers[index].is_matrix
        for batch in range(self._batches):
            x, v = plain.layer_input(index, batch), quantised.layer_input(index, batch)
            yield self._padding.cleared(x, batch) if by_token else x, v


@contextmanager
def walking(
    model: ir.Model,
    quantised: ir.Model | None,
    layers: Sequence[LayerPlan],
    samples: Samples,
    config: QuantConfig,
) -> Iterator[Walk]:
    """A walk from layer to layer at the place that ``config`` tells."""
    with open_place(config) as place:
        yield Walk(model, quantised, layers, samples, config.batch_size, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBatch:
    """One batch at a block: its inputs in both models, before quantisation, and float outputs.

    Tensors by their names in the float model, each ``[n, ...]``; the outputs are NaN at
    padded tokens.
    """

    plain: Mapping[str, Value]
    quantised: Mapping[str, Value]
    outputs: Mapping[str, Value]

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
        batch_size: int,
        place: Place,
    ) -> None:
        names = [[layer.node for layer in block] for block in blocks]
        self.samples = samples.count
        self.device = place.device
        self._padding = _Padding(model)
        self._feeds = _placed(self._padding.noted(samples.batches(batch_size)), place.device)
        self.model = model.clone()
        """The float model, with what it chooses and draws as inputs, as blocks read them."""
        nodes = parted_choices(model, quantised)
        self._taken = take_choices(self.model, model, nodes)
        taken = take_choices(quantised, model, nodes)
        ends = {v.name or "" for n in model.graph if n.name in nodes for v in reads_of(n)}
        pieces = cut_blocks(model, names, Ties(lends=set(taken.values()), ends=ends))
        self._pieces = cut_blocks(self.model, names, Ties.of(self._taken, pieces, ends))
        self._plain = _Stream("float", model, pieces, place, taken)
        pieces = cut_blocks(quantised, names, Ties.of(taken, pieces))
        self._quantised = _Stream("quantised", quantised, pieces, place)
        self._raw = raw_names(quantised)
        self.count = 0
        """How many batches there are, once ``advance(0)`` is done."""

    def advance(self, index: int) -> None:
        """Compute the inputs of block ``index``, and the float outputs that it is to reproduce."""
        if index == 0:
            self.count = _start((self._plain, self._quantised), self._feeds)
        else:
            self._quantised.advance(index, self.count)
            for stream in (self._plain, self._quantised):
                stream.release(index)
        self._plain.advance(index + 1, self.count)  # one block ahead: for the outputs

    def names(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inputs and the outputs of block ``index`` in the float model."""
        return self._pieces[index + 1].inputs, self._pieces[index + 1].outputs

    def batch(self, index: int, batch: int) -> BlockBatch:
        """One of the ``count`` batches at block ``index``, after ``advance(index)``."""
        inputs, outputs = self.names(index)
        quantised = {n: self._quantised.get(self._raw.get(n, n), batch) for n in inputs}
        return BlockBatch(
            plain={
                name: quantised[name] if name in self._taken else self._plain.get(name, batch)
                for name in inputs
            },
            quantised=quantised,
            outputs={
                name: self.cleared(values, batch) if isinstance(values, torch.Tensor) else values
                for name, values in ((name, self._plain.get(name, batch)) for name in outputs)
            },
        )

    def cleared(self, values: torch.Tensor, batch: int) -> torch.Tensor:
        """What the float model computes on a batch, NaN at tokens that are padding."""
        return self._padding.cleared(values, batch)


def _placed(batches: Iterator[Feeds], device: torch.device) -> Iterator[dict[str, Value]]:
    for feeds in batches:
        yield {name: placed(values, device) for name, values in feeds.items()}


def _start(streams: Sequence[_Stream], feeds: Iterator[dict[str, Value]]) -> int:
    """Run piece 0 of all streams in one pass over the samples; returns the number of batches."""
    runs = [stream.start() for stream in streams]
    batches = 0
    for batch, values in enumerate(feeds):
        for run in runs:  # the float stream is first, since it lends values to the other
            run(batch, values)
        batches = batch + 1
    for stream in streams:
        stream.release(0)
    return batches


class _Stream:
    """One model, its pieces and its live tensors in the store.

    ``lends`` are values that it computes for the stream ``quantised``, by their names there.
    """

    def __init__(
        self,
        label: str,
        model: ir.Model,
        pieces: Sequence[Piece],
        place: Place,
        lends: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._label = label
        self._model = model
        self._pieces = pieces
        self._place = place
        self._lent = {source: name for name, source in lends.items()}

    def layer_input(self, index: int, batch: int) -> torch.Tensor:
        """The tensor that the layer behind piece ``index`` reads."""
        (name,) = self._pieces[index].reads
        return cast(torch.Tensor, self.get(name, batch))  # no layer reads text

    def get(self, name: str, batch: int) -> Value:
        """A live tensor."""
        return self._place.store.get(f"{self._label}:{name}", batch)

    def start(self) -> Callable[[int, dict[str, Value]], None]:
        """A function to call with each batch of samples, which runs piece 0 on it."""
        piece = self._pieces[0]
        session = self._session(piece)
        kept = {name for later in self._pieces[1:] for name in later.inputs}
        kept |= {name for piece in self._pieces for name in piece.reads}

        def run(batch: int, feeds: dict[str, Value]) -> None:
            for name in feeds.keys() & kept:
                self._put(name, batch, feeds[name])
            if session is not None:
                given = {n: feeds[n] if n in feeds else self.get(n, batch) for n in piece.inputs}
                self._run(session, piece, batch, given)

        return run

    def advance(self, index: int, batches: int) -> None:
        piece = self._pieces[index]
        session = self._session(piece)
        if session is not None:
            for batch in range(batches):
                self._run(session, piece, batch, {n: self.get(n, batch) for n in piece.inputs})

    def release(self, index: int) -> None:
        """Forget the tensors that no piece behind ``index`` reads."""
        for name in self._pieces[index].released:
            self._place.store.release(f"{self._label}:{name}")

    def _session(self, piece: Piece) -> ort.InferenceSession | None:
        if not piece.computed:
            return None
        threads, device = self._place.threads, self._place.device
        release(device)
        return open_session(extract(self._model, piece), threads=threads, device=device.type)

    def _put(self, name: str, batch: int, value: Value) -> None:
        self._place.store.put(f"{self._label}:{name}", batch, value)

    def _run(
        self, session: ort.InferenceSession, piece: Piece, batch: int, feeds: Mapping[str, Value]
    ) -> None:
        with told_as(CalibrationError, f"ONNX Runtime failed on calibration batch {batch}"):
            results = run_on(self._place.device, session, piece.computed, feeds)
        for name, value in zip(piece.computed, results, strict=True):
            if name in piece.outputs:
                self._put(name, batch, value)
            if name in self._lent:
                self._place.store.put(f"quantised:{self._lent[name]}", batch, value)


def _added_codes(quantised: ir.Model, model: ir.Model) -> set[str]:
    """The integer tensors that stand for activations in ``quantised`` alone."""
    known = {value.name for node in model.graph for value in node.outputs}
    read = {
        node.inputs[0].name or ""
        for node in quantised.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    }
    return read - known
