"""The walk gives each layer what it reads in the models run whole, and keeps no more than that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from choosing_models import CHOOSING, choosing
from layered_models import LAYERED, layered, noise
from small_models import build

from onnx_attnround import qdq
from onnx_attnround.calibrate import calibrate
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError
from onnx_attnround.graph import input_specs, tensor_value, with_outputs
from onnx_attnround.ops import weight_matrix
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.bits import allocate
from onnx_attnround.reconstruct import walk
from onnx_attnround.reconstruct.activation_store import ActivationStore
from onnx_attnround.reconstruct.cuts import cut, raw_names
from onnx_attnround.reconstruct.layerwise import round_plain
from onnx_attnround.reconstruct.walk import BlockBatch, BlockWalk, Place, Walk
from onnx_attnround.records import Array, LayerRounding, QuantParams, QuantPlan
from onnx_attnround.runtime.device import CPU, fetched, run_on
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import Samples, open_samples

SAMPLES, BATCH = 10, 4


class Setup:
    """A model, its plan, and a quantised copy to walk beside it."""

    def __init__(self, model: ir.Model, **options: Any) -> None:
        config = QuantConfig(weight_bits=4, **options)
        self.model = model
        self.feeds = noise(model, SAMPLES, seed=1)
        self.samples: Samples = open_samples(self.feeds, input_specs(model))
        self.plan: QuantPlan = make_plan(model, config, quantise_activations=True)
        matrices = {
            layer.node: weight_matrix(layer, tensor_value(model, layer.weight))
            for layer in self.plan.layers
        }
        allocation = allocate(self.plan.layers, matrices.__getitem__, config)
        self.params: Mapping[str, QuantParams] = {}
        if self.plan.activations:
            self.params = calibrate(
                model,
                self.plan.activations,
                self.samples,
                QuantConfig(observer="minmax", batch_size=BATCH, threads=1),
                same_range=self.plan.same_range,
                on_event=lambda event: None,
            ).params
        self.roundings = round_plain(model, self.plan, self.params, allocation)
        self.quantised = qdq.insert(model, self.plan, self.params, self.roundings, "int8")

    def walk(self, store: ActivationStore) -> Walk:
        return Walk(
            self.model,
            self.quantised,
            self.plan.layers,
            self.samples,
            BATCH,
            Place(store, CPU, 1),
        )

    def reads(self) -> tuple[list[str], list[str]]:
        """What each layer reads in the float model, and in the quantised one."""
        packed = {
            node.outputs[0].name: node.inputs[0].name
            for node in self.quantised.graph
            if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
        }
        nodes = {node.name: node for node in self.quantised.graph}
        reads = [nodes[layer.node].inputs[0].name for layer in self.plan.layers]
        return [layer.x for layer in self.plan.layers], [packed.get(x, x) for x in reads]


def whole(model: ir.Model, names: list[str], samples: Samples) -> list[dict[str, Array]]:
    """The named tensors, batch by batch, from a model that is run whole."""
    inputs = {value.name for value in model.graph.inputs}
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    session = open_session(with_outputs(model, computed), threads=1) if computed else None
    result = []
    for batch in samples.batches(BATCH):
        values: dict[str, Array] = dict(batch)
        if session is not None:
            wanted = {value.name for value in session.get_inputs()}
            fed = {name: value for name, value in batch.items() if name in wanted}
            values |= dict(zip(computed, session.run(computed, fed), strict=True))
        result.append(values)
    return result


def other(rounding: LayerRounding) -> LayerRounding:
    """A rounding that the walk cannot have seen before it comes to the layer."""
    codes = np.clip(rounding.codes + 1, rounding.spec.qmin, rounding.spec.qmax)
    bias = None if rounding.bias is None else rounding.bias + np.float32(0.05)
    return replace(rounding, codes=codes.astype(np.int8), bias=bias)


@cache
def setup_of(name: str, act_bits: int) -> Setup:
    return Setup(layered(name), act_bits=act_bits)


@pytest.mark.parametrize("act_bits", [4, 8, 16, 32])
@pytest.mark.parametrize("name", LAYERED)
def test_layers_read_what_they_read_in_the_models_run_whole(name: str, act_bits: int) -> None:
    setup = Setup(layered(name), act_bits=act_bits)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        for index, layer in enumerate(setup.plan.layers):
            it.advance(index)
            seen.append(list(it.inputs(index)))
            changed = other(setup.roundings[layer.node])
            qdq.update_layer(setup.quantised, layer, changed, setup.params, setup.plan)
    plain, reads = setup.reads()
    expected = whole(setup.model, plain, setup.samples)
    final = whole(setup.quantised, reads, setup.samples)
    for index, batches in enumerate(seen):
        assert len(batches) == len(expected)
        for (x, v), whole_x, whole_v in zip(batches, expected, final, strict=True):
            np.testing.assert_allclose(x, whole_x[plain[index]], rtol=1e-5, atol=1e-6)
            wanted = whole_v[reads[index]]
            assert fetched(v).dtype == wanted.dtype
            if act_bits < 32:
                np.testing.assert_array_equal(v, wanted)
            else:
                np.testing.assert_allclose(v, wanted, rtol=1e-5, atol=1e-5)


def test_codes_are_what_the_layers_of_these_models_read() -> None:
    """The test above would say little if no activation were quantised."""
    for name in LAYERED:
        plain, reads = setup_of(name, 8).reads()
        assert set(plain) <= set(setup_of(name, 8).params)
        assert set(reads).isdisjoint(plain)


class Watched(ActivationStore):
    """A store that knows what it holds."""

    def __init__(self, budget: int = 1 << 20) -> None:
        super().__init__(budget)
        self.names: set[str] = set()

    def put(self, name: str, batch: int, values: Array) -> None:
        self.names.add(name)
        super().put(name, batch, values)

    def release(self, name: str) -> None:
        self.names.discard(name)
        super().release(name)


def reads_of(node: ir.Node) -> list[ir.Value]:
    """What a node and the nodes of its subgraphs read."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    nodes = (node, *(inner for graph in graphs for inner in graph.all_nodes()))
    return [value for each in nodes for value in each.inputs if value is not None]


def still_needed(model: ir.Model, layers: list[str], index: int) -> set[str]:
    """Tensors that layer ``index`` reads, or a node that must wait for a layer from it on."""
    waiting: dict[ir.Node, None] = {}
    for node in model.graph:
        if node.name in layers[index:] or any(v.producer() in waiting for v in reads_of(node)):
            waiting[node] = None
    names: set[str] = set()
    leading: set[ir.Node | None] = set()
    for node in reversed(list(model.graph)):
        if node.name not in layers and node not in leading:
            continue
        leading.update(value.producer() for value in reads_of(node))
        for value in reads_of(node) if node in waiting else []:
            producer = value.producer()
            unpacked = producer is not None and producer.op_type == "DequantizeLinear"
            names.add((producer.inputs[0] if unpacked else value).name or "")
    return names


@pytest.mark.parametrize("act_bits", [8, 32])
@pytest.mark.parametrize("name", LAYERED)
def test_only_what_is_still_read_is_kept(name: str, act_bits: int) -> None:
    setup = setup_of(name, act_bits)
    layers = [layer.node for layer in setup.plan.layers]
    models = {"float": setup.model, "quantised": setup.quantised}
    with Watched() as store:
        it = setup.walk(store)
        for index in range(len(layers)):
            it.advance(index)
            held = {tuple(held.split(":", 1)) for held in store.names}
            allowed = {(k, n) for k, m in models.items() for n in still_needed(m, layers, index)}
            assert held <= allowed
            assert {kind for kind, _ in held} == set(models)


@pytest.mark.parametrize("name", LAYERED)
def test_each_piece_runs_once_per_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(name, 8)
    runs: Counter[Any] = Counter()

    def counting(device: Any, session: Any, names: Any, feeds: Any) -> Any:
        runs[session] += 1
        return run_on(device, session, names, feeds)

    monkeypatch.setattr(walk, "run_on", counting)
    layers = [layer.node for layer in setup.plan.layers]
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        for index in range(len(layers)):
            it.advance(index)
    batches = len(list(setup.samples.batches(BATCH)))
    codes = setup.reads()[1]
    pieces = (*cut(setup.model, layers), *cut(setup.quantised, layers, codes))
    assert list(runs.values()) == [batches] * sum(bool(piece.outputs) for piece in pieces)


@pytest.mark.parametrize("name", ["residual", "branches"])
def test_a_walk_from_disk_gives_the_same(name: str) -> None:
    setup = setup_of(name, 8)
    results = []
    for budget in (0, 1 << 20):
        with ActivationStore(budget) as store:
            it = setup.walk(store)
            for index in range(len(setup.plan.layers)):
                it.advance(index)
                parts = [part for pair in it.inputs(index) for part in pair]
                results.append([part.numpy().tobytes() for part in parts])
    half = len(results) // 2
    assert results[:half] == results[half:]


def test_samples_are_read_once() -> None:
    setup = setup_of("two inputs", 8)
    reads: list[int] = []

    class Counted(Samples):
        def __init__(self) -> None:
            self.count = setup.samples.count

        def batches(self, batch_size: int) -> Any:
            reads.append(batch_size)
            return setup.samples.batches(batch_size)

    with ActivationStore(1 << 20) as store:
        it = Walk(setup.model, setup.quantised, setup.plan.layers, Counted(),
                  3, Place(store, CPU, 1))  # fmt: skip
        for index in range(len(setup.plan.layers)):
            it.advance(index)
            assert sum(len(x) for x, _ in it.inputs(index)) == SAMPLES
    assert reads == [3]


def test_values_of_unknown_type_are_walked() -> None:
    setup = Setup(build(LAYERED["chain"]))
    assert setup.model.graph.node("Relu_0").outputs[0].type is None
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        for index in range(len(setup.plan.layers)):
            it.advance(index)
        x, v = next(it.inputs(2))
    assert x.shape == v.shape == (BATCH, 4)


def test_a_model_that_holds_quantised_tensors_of_its_own() -> None:
    """Its codes are not the walk's: the layer reads what they stand for."""
    setup = Setup(
        build("""g (float[N,4] x) => (float[N,3] y)
            <float[4,4] w0, float[4,3] w1, float s = {0.05}, uint8 z = {128}>
            { a = MatMul(x, w0)  q = QuantizeLinear(a, s, z)  d = DequantizeLinear(q, s, z)
              y = MatMul(d, w1) }"""),
        act_bits=32,
    )
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        it.advance(0)
        it.advance(1)
        pairs = list(it.inputs(1))
    for (x, v), plain, final in zip(
        pairs,
        whole(setup.model, ["d"], setup.samples),
        whole(setup.quantised, ["d"], setup.samples),
        strict=True,
    ):
        assert x.dtype == v.dtype == torch.float32
        np.testing.assert_allclose(x, plain["d"], atol=1e-6)
        np.testing.assert_allclose(v, final["d"], atol=1e-6)


def test_a_failing_node_is_one_line_with_the_batch() -> None:
    model = build("""
        g (float[N,4] x, int64[N,1] at) => (float[N,3] y) <float[4,4] w0, float[1,3] w1>
        { a = MatMul(x, w0)  b = GatherElements<axis=1>(a, at)  y = MatMul(b, w1) }""")
    setup = Setup(model)
    bad = np.zeros((6, 1), np.int64)
    bad[5] = 9
    setup.samples = open_samples({"x": np.zeros((6, 4), np.float32), "at": bad}, input_specs(model))
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        it.advance(0)
        with pytest.raises(CalibrationError, match="failed on calibration batch 1: ") as caught:
            it.advance(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("act_bits", [4, 8, 32])
@pytest.mark.parametrize("name", LAYERED)
def test_blocks_read_what_they_read_in_the_models_run_whole(name: str, act_bits: int) -> None:
    """The inputs of both models before quantisation, and the float model's outputs.

    Without quantised activations ONNX Runtime makes MatMulNBits of some layers in one run
    and not in the other, which computes less exactly.
    """
    tolerance = 1e-4 if act_bits < 32 else 1e-2
    setup = Setup(layered(name), act_bits=act_bits)
    layers = setup.plan.layers
    blocks = [layers[i : i + 2] for i in range(0, len(layers), 2)]
    raw = raw_names(setup.quantised)
    seen: list[list[BlockBatch]] = []
    with Watched() as store:
        it = BlockWalk(
            setup.model, setup.quantised, blocks, setup.samples,
            BATCH, Place(store, CPU, 1),
        )  # fmt: skip
        for index, block in enumerate(blocks):
            it.advance(index)
            seen.append([it.batch(index, batch) for batch in range(it.count)])
            for layer in block:
                changed = other(setup.roundings[layer.node])
                qdq.update_layer(setup.quantised, layer, changed, setup.params, setup.plan)
    names = sorted({n for batches in seen for n in (*batches[0].plain, *batches[0].outputs)})
    expected = whole(setup.model, names, setup.samples)
    inputs = sorted({raw.get(n, n) for batches in seen for n in batches[0].plain})
    final = whole(setup.quantised, inputs, setup.samples)
    for batches in seen:
        for batch, plain, quantised in zip(batches, expected, final, strict=True):
            for found in (batch.plain, batch.outputs):
                for key, values in found.items():
                    np.testing.assert_allclose(values, plain[key], rtol=1e-5, atol=1e-5)
            for key, values in batch.quantised.items():
                wanted = quantised[raw.get(key, key)]
                np.testing.assert_allclose(values, wanted, rtol=tolerance, atol=tolerance)


def float_values(x: torch.Tensor, params: QuantParams | None) -> torch.Tensor:
    """What codes stand for."""
    if params is None:
        return x
    return (x.float() - float(params.zero_point)) * float(params.scale)


@pytest.mark.parametrize("act_bits", [8, 32])
@pytest.mark.parametrize("name", CHOOSING)
def test_both_streams_have_the_rows_and_draws_of_the_float_model(name: str, act_bits: int) -> None:
    """Else what the last layer reads would differ by almost as much as it is itself.

    Ranges come of other draws than the walk's, so that some of these are cut off.
    """
    setup = Setup(choosing(name), act_bits=act_bits)
    with Watched() as store:
        it = setup.walk(store)
        for index, layer in enumerate(setup.plan.layers):
            it.advance(index)
            signal = noise = 0.0
            for x, v in it.inputs(index):
                assert x.shape == v.shape
                error = x - float_values(v, setup.params.get(layer.x))
                signal += float(x.square().sum())
                noise += float(error.square().sum())
            assert noise < 0.4 * signal
        held = {tuple(held.split(":", 1)) for held in store.names}
        reads = setup.reads()
        assert held <= {("float", reads[0][-1]), ("quantised", reads[1][-1])}


@pytest.mark.parametrize("name", CHOOSING)
def test_blocks_have_the_rows_and_draws_of_the_float_model(name: str) -> None:
    setup = Setup(choosing(name))
    blocks = [[layer] for layer in setup.plan.layers]
    with ActivationStore(1 << 20) as store:
        it = BlockWalk(
            setup.model, setup.quantised, blocks, setup.samples,
            BATCH, Place(store, CPU, 1),
        )  # fmt: skip
        for index in range(len(blocks)):
            it.advance(index)
            for number in range(it.count):
                batch = it.batch(index, number)
                assert batch.plain.keys() == batch.quantised.keys()
                for key, values in batch.plain.items():
                    assert values.shape == batch.quantised[key].shape
                    if not values.is_floating_point():
                        torch.testing.assert_close(values, batch.quantised[key])


def test_what_is_drawn_is_drawn_once() -> None:
    """Two pieces read the noise, and the draws of a float model are not those of another run."""
    setup = Setup(build("""g (float[N,4] x) => (float[N,4] y) <float[4,4] v, float[4,4] w>
        { n = RandomNormal<shape=[1,4]>()  a = Add(x, n)  b = MatMul(a, v)  c = Sub(b, b)
          d = Add(c, n)  y = MatMul(d, w) }"""), act_bits=32)  # fmt: skip
    with ActivationStore(1 << 20) as store:
        it = setup.walk(store)
        it.advance(0)
        first = [(x, v) for x, v in it.inputs(0)]
        it.advance(1)
        second = list(it.inputs(1))
    for (x, v), (later, other), feeds in zip(
        first, second, setup.samples.batches(BATCH), strict=True
    ):
        drawn = x - torch.from_numpy(feeds["x"])
        torch.testing.assert_close(v, x)
        torch.testing.assert_close(later, drawn, atol=1e-5, rtol=0)
        torch.testing.assert_close(other, drawn, atol=1e-5, rtol=0)
