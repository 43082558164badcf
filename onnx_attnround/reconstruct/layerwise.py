"""Round every layer along the walk, each against what the quantised prefix really feeds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from onnx_attnround import qdq
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run, Units
from onnx_attnround.numerics import TINY, decibels
from onnx_attnround.ops import weight_matrix, weight_tensor
from onnx_attnround.qdq.arithmetic import dynamically, spread
from onnx_attnround.reconstruct.shared_weights import Batches, moments_ahead, one_bias
from onnx_attnround.reconstruct.walk import walking
from onnx_attnround.records import (
    Array,
    BitAllocation,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    QuantSpec,
    readers_of,
)
from onnx_attnround.rounding.cross_validation import (
    choose_ridge,
    correct,
    mean_error,
    towards,
)
from onnx_attnround.rounding.methods import Solution, solve
from onnx_attnround.rounding.moments import Moments, collect
from onnx_attnround.rounding.objective import objective, plain_objective
from onnx_attnround.runtime.device import CPU, fetched, open_device
from onnx_attnround.samples import Samples

INT32_HEADROOM = 2.0**30
"""The steps that a bias may be long: half of the range of int32, so that it can be corrected."""

SINGLE_THREAD_BELOW = 1 << 18
"""Layers of fewer weights are rounded on one thread: more would cost more than they give."""


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """One layer as the methods see it: weight ``[g, o, d]``, bias ``[g, o]`` or ``None``.

    No scale, ``[g, o]``, may be below ``scale_floor``, or the bias would leave int32.
    """

    plan: LayerPlan
    spec: QuantSpec
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale_floor: torch.Tensor

    @property
    def shared_axes(self) -> tuple[int, ...]:
        """The axes of ``[g, o]`` along which the weight has one scale."""
        if self.spec.axis is None:
            return (0, 1)
        # ConvTranspose: the channel axis of the weight does not tell groups apart
        return (0,) if self.plan.op_type == "ConvTranspose" else ()

    def rounding(
        self,
        solution: Solution,
        bias: torch.Tensor | None,
        error: Callable[[torch.Tensor], torch.Tensor],
        power: float,
    ) -> LayerRounding:
        """The record of a solution.

        ``error`` gives the error power of the layer's output, per row, for a change ``[g, o, d]``
        of the weight. It is recorded as a share of ``power``, as a rule the output's variance.
        """
        scale, power = self._scales(solution.scale), max(power, TINY)
        change = solution.codes * solution.scale - self.weight
        return LayerRounding(
            weight=self.plan.weight,
            spec=self.spec,
            codes=weight_tensor(self.plan, fetched(solution.codes.to(torch.int8))),
            scale=scale,
            zero_point=np.zeros(scale.shape, np.int8),
            bias=self.written(bias),
            mse_nearest=float(error(solution.nearest - self.weight).sum()) / power,
            mse_final=float(error(change).sum()) / power,
            changed=solution.changed,
        )

    @staticmethod
    def written(bias: torch.Tensor | None) -> Array | None:
        """A bias ``[g, o]`` as :class:`LayerRounding` has it."""
        return None if bias is None else fetched(bias.reshape(-1)).astype(np.float32)

    def _scales(self, scale: torch.Tensor) -> Array:
        """The scales of a solution as :class:`LayerRounding` has them."""
        if self.spec.block_size:
            return weight_tensor(self.plan, fetched(scale[..., :: self.spec.block_size]))
        shared = tuple(0 if axis in self.shared_axes else slice(None) for axis in (0, 1))
        values = fetched(scale[(*shared, 0)])
        return values.reshape(-1) if values.ndim else values


def round_plain(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    allocation: BitAllocation,
) -> dict[str, LayerRounding]:
    """Nearest rounding of every layer on the error of its weights, without calibration."""
    roundings: dict[str, LayerRounding] = {}
    groups = readers_of(plan.layers, allocation.bits)
    for planned in plan.layers:
        bits, group = allocation.bits[planned.node], groups[planned.node]
        layer = open_layer(model, planned, params, bits, readers=group)
        if planned is not group[0]:
            known = roundings[group[0].node]
            roundings[planned.node] = replace(known, bias=layer.written(layer.bias))
            continue
        problem = plain_objective(
            layer.weight, layer.spec, scale_floor=layer.scale_floor, shared_axes=layer.shared_axes
        )
        with torch_threads(layer, None):
            solution = solve(problem, "nearest", steps=0, seed=0)
        roundings[layer.plan.node] = layer.rounding(
            solution,
            layer.bias,
            lambda change: change.square().sum(-1),
            float(layer.weight.square().sum()),
        )
    return roundings


def round_layers(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    allocation: BitAllocation,
    samples: Samples,
    run: Run,
) -> dict[str, LayerRounding]:
    """Round layer after layer, in graph order, on the objective of ``rounding/moments.py``.

    Returns one rounding per node name. Deterministic for the same inputs and device.
    """
    config = run.config
    # The walk needs a whole quantised model from the start: rounded to nearest, and stored as int8,
    # in which each layer can be replaced in place once it is rounded.
    roundings = round_plain(model, plan, params, allocation)
    quantised = qdq.insert(model, plan, params, roundings, "int8")
    units = Units(run, "round", len(plan.layers))
    readers = _Readers(model, plan, params, allocation, samples, config)
    readers.look_ahead([plan.layers[index].node for index in units.missing])

    def take_up(index: int, rounding: LayerRounding) -> str:
        planned = plan.layers[index]
        roundings[planned.node] = rounding
        qdq.update_layer(quantised, planned, rounding, params, plan)
        return _outcome(planned, rounding)

    with walking(model, quantised, plan.layers, samples, config) as walk:

        def make(index: int) -> LayerRounding:
            layer = readers.open(plan.layers[index])
            with torch_threads(layer, config.threads):
                return readers.round(layer, walk.inputs(index), roundings, index)

        units.walk(walk.advance, make, take_up)
    return roundings


class _Readers:
    """Rounds layers one after the other, but a weight that several of them read once."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        params: Mapping[str, QuantParams],
        allocation: BitAllocation,
        samples: Samples,
        config: QuantConfig,
    ) -> None:
        self._model, self._params, self._bits = model, params, allocation.bits
        self._samples, self._config = samples, config
        self._device = open_device(config.device)
        self._groups = readers_of(plan.layers, allocation.bits)
        self._ahead: dict[str, Moments] = {}

    def look_ahead(self, nodes: Sequence[str]) -> None:
        """Collect what the later readers of the weights of ``nodes`` read in the float model."""
        firsts = {node for node in nodes if self._groups[node][0].node == node}
        groups = [self._groups[node] for node in self._groups if node in firsts]

        def moments(planned: LayerPlan, batches: Batches) -> Moments:
            params = self._params.get(planned.x)
            dynamic = params is not None and params.spec.dynamic
            alone = ((x, x if dynamic else _codes_of(x, params)) for x, _ in batches)
            layer, group = self.open(planned), self._groups[planned.node]
            with torch_threads(layer, self._config.threads):
                return self._moments(layer, alone, len(group))

        self._ahead = moments_ahead(self._model, groups, self._samples, self._config, moments)

    def open(self, planned: LayerPlan) -> OpenLayer:
        """One of the layers."""
        bits, group = self._bits[planned.node], self._groups[planned.node]
        return open_layer(self._model, planned, self._params, bits, self._device, group)

    def round(
        self, layer: OpenLayer, batches: Batches, known: Mapping[str, LayerRounding], index: int
    ) -> LayerRounding:
        """Round a layer; in ``known`` those before it are, the others as without calibration."""
        group = self._groups[layer.plan.node]
        first, own_bias = group[0], not one_bias(self._model, group, self._params)
        if layer.plan is not first and not own_bias:
            return known[first.node]
        moments = self._moments(layer, batches)
        result = known[layer.plan.node]  # nearest rounding, which stays where sums overflow
        if layer.plan is first and moments.finite:
            pooled = moments
            if first.node in self._ahead:
                pooled = moments.mixed(self._ahead.pop(first.node), 1 - 1 / len(group))
            result = round_layer(layer, pooled, self._config, index) if pooled.finite else result
        elif layer.plan is not first:
            result = replace(known[first.node], bias=result.bias)
        alone = len(group) == 1 or not own_bias
        return result if alone or not moments.finite else follow(layer, moments, result)

    def _moments(self, layer: OpenLayer, batches: Batches, readers: int = 1) -> Moments:
        """The moments that the layer is rounded on, of fewer rows where ``readers`` add theirs."""
        group, params = self._groups[layer.plan.node], self._params
        own_bias = len(group) == 1 or not one_bias(self._model, group, params)
        count = self._samples.count * readers
        return moments_of(
            layer,
            batches,
            count,
            params.get(layer.plan.x),
            correlations=self._config.method != "nearest",
            own_bias=own_bias,
        )


def moments_of(
    layer: OpenLayer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    count: int,
    params: QuantParams | None,
    *,
    correlations: bool = True,
    own_bias: bool = True,
) -> Moments:
    """The moments that ``layer`` is rounded on: centred where a bias takes up the mean error.

    ``batches``, ``count`` and ``correlations`` as in :func:`moments.collect`, ``params`` those
    of the input, if it is quantised; of a dynamic range the batches have it as it is before.
    A bias that is not the layer's own takes up the error of others, too. Where the streams
    differ in their rows, the float one stands for both.
    """
    dynamic = params is not None and params.spec.dynamic

    def read(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        same = v.shape == x.shape
        return v if same and not dynamic else _codes_of(v if same else x, params)

    same_rows = ((x, read(x, v)) for x, v in batches)
    return collect(
        layer.plan,
        layer.weight,
        same_rows,
        count,
        None if dynamic else params,
        centred=layer.bias is not None and own_bias,
        correlations=correlations,
    )


def _codes_of(x: torch.Tensor, params: QuantParams | None) -> torch.Tensor:
    """What a layer reads if nothing is quantised but its input ``x``: codes as floats.

    Of a dynamic range, values.
    """
    if params is None:
        return x
    if params.spec.dynamic:
        values: torch.Tensor = dynamically(x)
        return values
    codes = (x / float(params.scale)).round() + float(params.zero_point)
    return codes.clamp(params.spec.qmin, params.spec.qmax)


def torch_threads(layer: OpenLayer, limit: int | None) -> AbstractContextManager[None]:
    """One thread for a small layer, else all that torch or ``limit`` allows."""
    return threads_limited(1 if layer.weight.numel() < SINGLE_THREAD_BELOW else limit)


@contextmanager
def threads_limited(limit: int | None) -> Iterator[None]:
    """While open, torch has at most ``limit`` threads; as many as usual if it is ``None``."""
    usual = torch.get_num_threads()
    torch.set_num_threads(limit or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def round_layer(
    layer: OpenLayer, moments: Moments, config: QuantConfig, index: int
) -> LayerRounding:
    """Round one layer by the method of ``config``; its bias takes up the mean error.

    What holds on samples that it was not fitted on decides how much is learned, and
    whether anything is (``cross_validation.py``).
    """
    method = config.method
    problem = objective(
        layer.weight,
        moments,
        layer.spec,
        scale_floor=layer.scale_floor,
        shared_axes=layer.shared_axes,
    )
    if method != "nearest":
        correction = correct(moments)
        ridge = choose_ridge(problem, moments, correction)
        if ridge is None:
            method = "nearest"
        else:
            gram = moments.gram.ridged(ridge)
            problem = towards(problem, gram, correction.whole)
    solution = solve(problem, method, steps=config.steps, seed=config.seed + index)
    delta = solution.codes * solution.scale - layer.weight
    bias = None if layer.bias is None else layer.bias + mean_error(layer.weight, delta, moments)
    return layer.rounding(solution, bias, moments.error, float(moments.signal.sum()))


def follow(layer: OpenLayer, moments: Moments, rounding: LayerRounding) -> LayerRounding:
    """``rounding``, which another reader of the weight has, with bias and errors of ``layer``."""
    shape, spec = rounding.codes.shape, rounding.spec
    scales = np.broadcast_to(spread(rounding.scale, shape, spec), shape)
    codes, scale = (
        torch.from_numpy(weight_matrix(layer.plan, values).astype(np.float32)).to(layer.weight)
        for values in (rounding.codes, scales)
    )
    nearest = (layer.weight / scale).round().clamp(spec.qmin, spec.qmax)
    plain, delta = (each * scale - layer.weight for each in (nearest, codes))
    bias = None if layer.bias is None else layer.bias + mean_error(layer.weight, delta, moments)
    power = max(float(moments.signal.sum()), TINY)
    return replace(
        rounding,
        bias=layer.written(bias),
        mse_nearest=float(moments.error(plain).sum()) / power,
        mse_final=float(moments.error(delta).sum()) / power,
    )


def _outcome(layer: LayerPlan, rounding: LayerRounding) -> str:
    nearest, final = decibels(rounding.mse_nearest), decibels(rounding.mse_final)
    return f"{layer.node}  {rounding.spec.bits} bits  {nearest:.1f} dB → {final:.1f} dB"


def open_layer(
    model: ir.Model,
    plan: LayerPlan,
    params: Mapping[str, QuantParams],
    bits: int,
    device: torch.device = CPU,
    readers: Sequence[LayerPlan] = (),
) -> OpenLayer:
    """The layer, its weight and bias from ``model`` on ``device``, to be rounded to ``bits``.

    Its scales will serve all ``readers`` of the weight, so that no bias of theirs may leave int32.
    """
    matrix = weight_matrix(plan, _constant(model, plan.weight))
    weight = torch.from_numpy(matrix.copy()).to(device)
    bias = _bias(model, plan, weight)
    floor = weight.new_full(weight.shape[:2], torch.finfo(torch.float32).tiny)
    for reader in readers or (plan,):
        held = _bias(model, reader, weight)
        if held is not None and reader.x in params and not params[reader.x].spec.dynamic:
            step = float(params[reader.x].scale) * INT32_HEADROOM
            floor = torch.maximum(floor, held.abs() / step)
    layer = OpenLayer(plan, plan.spec_of(bits), weight, bias, floor)
    if layer.shared_axes:
        floor = floor.amax(layer.shared_axes, keepdim=True).expand_as(floor)
    return replace(layer, scale_floor=floor)


def _bias(model: ir.Model, plan: LayerPlan, weight: torch.Tensor) -> torch.Tensor | None:
    """The bias as ``[g, o]``; zeros where the op could have one, for it to be corrected."""
    shape = weight.shape[:2]
    if not plan.takes_bias:
        return None
    if plan.bias is None:
        return weight.new_zeros(shape)
    row = torch.from_numpy(_constant(model, plan.bias).astype(np.float32)).reshape(-1)
    return row.to(weight.device).expand(shape.numel()).reshape(shape).clone()


def _constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    if tensor is None:
        raise KeyError(name)
    values: Array = tensor.numpy()
    return values
