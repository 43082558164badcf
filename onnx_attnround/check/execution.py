"""Running a file: it must load and run, and compute what its nodes say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import onnx_ir as ir

from onnx_attnround.check import openvino_session
from onnx_attnround.check.rules import Finding
from onnx_attnround.check.view import DEQUANTISE, QUANTISE, View
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import choices, input_specs, take_choices, with_outputs
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import (
    ACCURACY_LEVEL,
    EXACT_SUMS,
    exact_activations,
    open_session,
    told_as,
)

LEAST_SQNR = 3.0
"""The SQNR in dB below which the optimised model computes another output than the nodes say."""

ROUNDING = 1e-6
"""Some roundings of float32, relative: by so much fused sums may differ from those of nodes."""

RUNS = 3
"""The runs whose scales are changed by so much, to see how outputs vary with last bits."""

FACTOR = 2.0
"""The ratio to these runs, of magnitudes and of squared distances, that passes for one of them."""
_WHOLE = "(model)"
DOES_NOT_RUN = "does-not-run"
NAN_IS_ROUNDED = "nan-is-rounded"

Feed = Mapping[str, Array]


def made_up_feed(model: ir.Model) -> dict[str, Array] | None:
    """One sample of noise, zeros for integers; ``None`` where a shape must be known."""
    feed: dict[str, Array] = {}
    rng = np.random.default_rng(0)
    for spec in input_specs(model):
        if any(size is None for size in spec.shape[1:]):
            return None
        shape = [size or 1 for size in spec.shape]
        noise = rng.normal(size=shape) if spec.dtype.kind == "f" else np.zeros(shape)
        feed[spec.name] = np.asarray(noise, spec.dtype)
    return feed


def find_faults(view: View, feed: Feed) -> Iterator[Finding]:
    """Whether the runtime, as it optimises the model, computes what the nodes say."""
    try:
        found = _run_optimised(view, feed)
    except ModelError as error:
        yield Finding(rule=DOES_NOT_RUN, node=_WHOLE, why=str(error), refused=True)
        return
    try:
        wanted = _run_ort(view, view.model, feed, optimise=False)
        if _off(wanted, found) and (tied := _on_same_choices(view, feed)):
            view, feed = tied
            found = _run_optimised(view, feed)
            wanted = _run_ort(view, view.model, feed, optimise=False)
        if _off(wanted, found) and (finite := _without_nan(view, feed)) is not None:
            if not finite:
                why = "each sample makes NaN, to which runtimes give what code they like"
                yield Finding(rule=NAN_IS_ROUNDED, node=_WHOLE, why=why, refused=False)
                return
            feed = finite
            found = _run_optimised(view, feed)
            wanted = _run_ort(view, view.model, feed, optimise=False)
    except ModelError:  # some kernels exist only for what the optimiser makes
        return
    yield from _differences(view, feed, wanted, found)


def find_cut_off_sums(view: View, feed: Feed) -> Iterator[Finding]:
    """Whether this CPU by default cuts sums off that it has whole by a session option."""
    try:
        usual, again = (
            _run_ort(view, view.model, feed, optimise=True, exact_sums=False) for _ in range(2)
        )
        exact = _run_ort(view, view.model, feed, optimise=True)
    except ModelError:  # of which ``find_faults`` tells
        return
    repeated = _sqnrs(usual, again)  # infinite but where each run is another
    for name, sqnr in _sqnrs(exact, usual).items():
        if math.isfinite(sqnr) and repeated[name] == math.inf:
            why = (
                f"{sqnr:.1f} dB from what CPUs with VNNI compute, for this one cuts sums off at "
                f"16 bits: set the session option {EXACT_SUMS} to 1"
            )
            yield Finding(rule="sums-cut-off", node=f"(output {name})", why=why, refused=False)


def _on_same_choices(view: View, feed: Feed) -> tuple[View, Feed] | None:
    """A copy that is fed with what the model chooses or draws as its nodes say, if it does any."""
    codes = {node.name or "" for node in view.model.graph if node.op_type == DEQUANTISE}
    copy = view.model.clone()
    taken = take_choices(copy, view.model, choices(copy.graph, codes))
    if not taken:
        return None
    lent = with_outputs(view.model, list(taken.values()))
    values = _run_ort(view, lent, feed, optimise=False)
    given = {name: values[source] for name, source in taken.items()}
    return View(copy, view.target), {**feed, **given}


def _without_nan(view: View, feed: Feed) -> Feed | None:
    """The samples, in rows of ``feed``, of which no Q reads NaN; ``None`` if there is no NaN.

    Such are positions that are masked throughout, behind their Softmax. ONNX does not say
    which code NaN has.
    """
    main = view.model.graph
    read = {link.node.inputs[0] for link in view.links if link.node.op_type == QUANTISE}
    names = [value.name or "" for node in main for value in node.outputs if value in read]
    if not names:
        return None
    values = _run_ort(view, with_outputs(view.model, names), feed, optimise=False)
    sizes = {np.shape(array)[:1] for array in feed.values()}
    rows = sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 1
    bad = np.zeros(rows, bool)
    for name in names:
        found = np.isnan(values[name])
        in_rows = found.ndim > 0 and len(found) == rows
        bad |= found.reshape(rows, -1).any(1) if in_rows else found.any()
    if not bad.any():
        return None
    return {} if bad.all() else {name: array[~bad] for name, array in feed.items()}


def _differences(
    view: View, feed: Feed, wanted: Mapping[str, Array], found: Mapping[str, Array]
) -> Iterator[Finding]:
    """A finding on each output of the optimised model that differs, with its cause."""
    off = _off(wanted, found)
    if off and view.target.runtime == "onnxruntime":
        with exact_activations():
            exact = _sqnrs(wanted, _run_ort(view, view.model, feed, optimise=True))
        for name in [name for name in off if exact[name] >= LEAST_SQNR]:
            why = (
                f"{off.pop(name):.1f} dB from what the nodes say, for MatMulNBits rounds the float "
                f"activations in blocks: set the session option {ACCURACY_LEVEL} to 1"
            )
            yield Finding(
                rule="activations-rounded", node=f"(output {name})", why=why, refused=False
            )
    if not off:
        return
    runs = [wanted, *(_run_ort(view, model, feed, optimise=False) for model in _rounded(view))]
    for name, sqnr in off.items():
        if _is_one_of(found[name], [run[name] for run in runs]):
            why = "it depends on the last bits of float32: it is not known to be right"
            yield Finding(rule="chaotic-output", node=f"(output {name})", why=why, refused=False)
        else:
            why = f"the optimised model computes something else: {sqnr:.1f} dB from the nodes' own"
            yield Finding(rule="wrong-output", node=f"(output {name})", why=why, refused=True)


def _is_one_of(found: Array, runs: Sequence[Array]) -> bool:
    """Whether ``found`` could be one more of ``runs``, which differ by roundings alone.

    Then it is finite, of their shape, about of their size, and about as close to one of them
    as they are to each other. Distances alone do not tell zeros from an even
    distribution: both are as far from one that has a single peak.
    """
    alike = [
        run.astype(np.float64)
        for run in runs
        if run.shape == found.shape and np.isfinite(run).all() and np.isfinite(found).all()
    ]
    sums = [float(np.abs(run).sum()) for run in alike]
    size = float(np.abs(found).sum(dtype=np.float64))
    near = min((_square(found - run) for run in alike), default=math.inf)
    apart = max((_square(one - other) for one, other in combinations(alike, 2)), default=0.0)
    as_large = any(total / FACTOR <= size <= total * FACTOR for total in sums)
    return as_large and near <= apart * FACTOR


def _rounded(view: View) -> Iterator[ir.Model]:
    """A copy, time and again with the scales of its weights changed at random by some roundings."""
    copy, rng = View(view.model, view.target), np.random.default_rng(0)
    for _ in range(RUNS):
        for link in copy.links:
            graph, scale = link.node.graph, link.scale
            if link.stored is not None and scale is not None and graph is not None:
                node = ir.node("Constant", [], {"value": ir.tensor(_some_roundings(scale, rng))})
                graph.insert_before(link.node, node)
                link.node.replace_input_with(1, node.outputs[0])
        yield copy.model


def _some_roundings(scale: Array, rng: np.random.Generator) -> Array:
    """The scales changed by some roundings of float32, in 16 bits by one step or two."""
    step = max(ROUNDING, float(np.finfo(scale.dtype).eps))
    change = step * rng.uniform(1, 2, scale.shape) * rng.choice((-1, 1), scale.shape)
    return np.asarray(scale * (1 + change), scale.dtype)


def _run_optimised(view: View, feed: Feed) -> Mapping[str, Array]:
    if view.target.runtime == "openvino" and openvino_session.available():
        return openvino_session.run(openvino_session.compile_model(view.model), feed)
    return _run_ort(view, view.model, feed, optimise=True)


def _run_ort(
    view: View, model: ir.Model, feed: Feed, *, optimise: bool, exact_sums: bool = True
) -> dict[str, Array]:
    """The outputs of ``model``, that of ``view`` or a copy, by name."""
    signed = view.target.runtime == "onnxruntime" and view.target.activation_signed
    session = open_session(
        model, optimise=optimise, signed_activations=signed, exact_sums=exact_sums
    )
    names = [output.name for output in session.get_outputs()]
    with told_as(ModelError, "ONNX Runtime cannot run the model"):
        return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _off(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, float]:
    """The SQNR of each output that is another one than wanted."""
    return {name: sqnr for name, sqnr in _sqnrs(wanted, found).items() if sqnr < LEAST_SQNR}


def _sqnrs(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, float]:
    return {name: _sqnr(values, found[name]) for name, values in wanted.items()}


def _sqnr(wanted: Array, found: Array) -> float:
    """Signal over error in dB; infinite for what is no tensor of floats, or is all zero."""
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f":
        return math.inf
    if wanted.shape != np.shape(found):
        return -math.inf
    finite = np.isfinite(wanted)
    reference = wanted[finite].astype(np.float64)
    signal, noise = _square(reference), _square(found[finite] - reference)
    if not math.isfinite(noise):
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal and noise else math.inf


def _square(values: Array) -> float:
    with np.errstate(over="ignore"):
        return float(np.square(values).sum())
