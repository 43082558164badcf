"""Activation ranges: the one streaming pass over the samples that feeds the observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.calibrate.observers import OBSERVERS, Observer
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError, ModelError
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, Event, QuantParams, QuantSpec, TensorStats
from onnx_attnround.runtime.session import first_line, open_session
from onnx_attnround.samples import Feeds, Samples

__all__ = ["OBSERVERS", "Calibration", "Observer", "calibrate"]

ACTIVATION_BYTES = 256 << 20
"""Bound on the activations that one run may return, where the model's batch is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Statistics of each observed tensor, and the parameters of each quantised one."""

    stats: Mapping[str, TensorStats]
    params: Mapping[str, QuantParams]


def calibrate(
    model: ir.Model,
    activations: Mapping[str, QuantSpec],
    samples: Samples,
    config: QuantConfig,
    *,
    same_range: Mapping[str, str],
    on_event: Callable[[Event], None],
) -> Calibration:
    """Observe the tensors of ``activations`` over all ``samples``, in one pass.

    A tensor in ``same_range`` is not observed: it gets the parameters of the
    tensor at the end of its chain. ``config`` tells the observer, the device, and
    how many samples to run at a time at most. Raises
    ``CalibrationError`` if ONNX Runtime fails on a sample or a tensor holds NaN
    or Inf, ``ModelError`` if a tensor is unknown.
    """
    roots = {name: _root(name, same_range) for name in (*activations, *same_range)}
    specs: dict[str, QuantSpec] = {}
    for name, root in roots.items():
        spec = activations.get(root, activations.get(name))
        if spec is not None:
            specs.setdefault(root, spec)
    observers = {root: OBSERVERS[config.observer]() for root in specs}
    exposed, constants = _exposed(model, list(specs))
    session = open_session(exposed, threads=config.threads, device=config.device)
    for name, value in _runs(session, list(specs), constants, samples, config.batch_size, on_event):
        _observe(observers[name], name, value)
    params = {
        root: params_from_range(spec, *observers[root].range(spec)) for root, spec in specs.items()
    }
    return Calibration(
        stats={root: observers[root].stats(root) for root in specs},
        params={name: params[root] for name, root in roots.items() if root in specs},
    )


def _observe(observer: Observer, name: str, value: Array) -> None:
    if value.dtype.kind != "f":
        raise ModelError(
            f"tensor '{name}' is {value.dtype}, expected a float tensor: exclude its node"
        )
    try:
        observer.update(value)
    except CalibrationError as error:
        raise CalibrationError(
            f"tensor '{name}' {error} on the calibration samples: "
            "check the samples' preprocessing, or exclude its node"
        ) from error


def _root(name: str, same_range: Mapping[str, str]) -> str:
    seen = {name}
    while name in same_range:
        name = same_range[name]
        if name in seen:
            raise ModelError(f"tensor '{name}' shares its range with itself: exclude its node")
        seen.add(name)
    return name


def _runs(
    session: ort.InferenceSession,
    names: list[str],
    constants: Mapping[str, Array],
    samples: Samples,
    batch_size: int,
    on_event: Callable[[Event], None],
) -> Iterator[tuple[str, Array]]:
    """Each named tensor's value, batch after batch; constants come once."""
    fed = {value.name for value in session.get_inputs()} & set(names)
    fetched = [name for name in names if name not in fed and name not in constants]
    for name in constants:
        yield name, constants[name]
    size = _affordable(session, fetched, samples, batch_size)
    done = 0
    for feeds in samples.batches(size):
        yield from ((name, feeds[name]) for name in fed)
        yield from _run(session, fetched, feeds)
        rows = min((len(feed) for feed in feeds.values() if feed.ndim), default=1)
        done = min(done + rows, samples.count)
        on_event(Event(stage="calibrate", done=done, total=samples.count, detail="samples"))


def _run(
    session: ort.InferenceSession, names: list[str], feeds: Feeds
) -> Iterator[tuple[str, Array]]:
    try:
        values = session.run(names or None, feeds)  # that the model takes the samples is certain
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise CalibrationError(
            f"ONNX Runtime failed on the calibration samples: {first_line(error)}: "
            "check that they are what the model expects"
        ) from error
    yield from zip(names, values, strict=False)  # without names, nothing


def _affordable(
    session: ort.InferenceSession, names: list[str], samples: Samples, batch_size: int
) -> int:
    """``batch_size``, lowered until the activations of one run stay below the bound."""
    first = next(samples.batches(1))
    used = sum(value.nbytes for _, value in _run(session, names, first))
    return max(1, min(batch_size, ACTIVATION_BYTES // max(used, 1)))


def _exposed(model: ir.Model, names: list[str]) -> tuple[ir.Model, dict[str, Array]]:
    """A copy of ``model`` with the named tensors as outputs, and those that are constants."""
    exposed = model.clone()
    graph = exposed.graph
    computed = {value.name: value for node in graph for value in node.outputs}
    given = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants: dict[str, Array] = {}
    for name in names:
        constant = graph.initializers[name].const_value if name in graph.initializers else None
        if constant is not None:
            constants[name] = constant.numpy()
        elif name in computed and name not in given:
            graph.outputs.append(computed[name])
        elif name not in given:
            raise ModelError(f"tensor '{name}' is not in the graph: simplify the model again")
    return exposed, constants
