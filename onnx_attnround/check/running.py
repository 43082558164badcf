"""Running a file: it must load and run, and give what its nodes say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnx_attnround.check import plugin
from onnx_attnround.check.rules import Finding
from onnx_attnround.check.view import View
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import input_specs
from onnx_attnround.records import Array
from onnx_attnround.runtime import first_line, open_session

LEAST_SQNR = 3.0  # dB; below, the output of the optimised model is another one
ROUNDING = 1e-6  # relative: some roundings of float32, as fused sums differ from those of nodes
_WHOLE = "(model)"

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
        if view.target.runtime == "openvino" and plugin.available():
            found = plugin.run(plugin.compile_model(view.model), feed)
        else:
            found = _run_ort(view, view.model, feed, optimise=True)
    except ModelError as error:
        yield Finding(rule="does-not-run", node=_WHOLE, why=str(error), refused=True)
        return
    try:
        wanted = _run_ort(view, view.model, feed, optimise=False)
    except ModelError:  # some kernels exist only for what the optimiser makes
        return
    yield from _differences(view, feed, wanted, found)


def _differences(
    view: View, feed: Feed, wanted: Mapping[str, Array], found: Mapping[str, Array]
) -> Iterator[Finding]:
    """Outputs of the optimised model that are others than wanted, parted by what they hang on."""
    off = {name: sqnr for name, sqnr in _sqnrs(wanted, found).items() if sqnr < LEAST_SQNR}
    if not off:
        return
    rounded = _sqnrs(wanted, _run_ort(view, _rounded(view), feed, optimise=False))
    for name, sqnr in off.items():
        if rounded[name] < LEAST_SQNR:
            why = "it hangs on the last bits of float32: it is not known to be right"
            yield Finding(rule="chaotic-output", node=f"(output {name})", why=why, refused=False)
        else:
            why = f"the optimised model computes something else: {sqnr:.1f} dB from the nodes' own"
            yield Finding(rule="wrong-output", node=f"(output {name})", why=why, refused=True)


def _rounded(view: View) -> ir.Model:
    """A copy with the scales of its weights changed at random by some roundings."""
    copy, rng = View(view.model, view.target), np.random.default_rng(0)
    for link in copy.links:
        scale = link.node.inputs[1]
        if link.stored is not None and link.scale is not None and scale is not None:
            factors = 1 + ROUNDING * rng.uniform(-1, 1, link.scale.shape)
            scale.const_value = ir.tensor((link.scale * factors).astype(link.scale.dtype))
    return copy.model


def _run_ort(view: View, model: ir.Model, feed: Feed, *, optimise: bool) -> dict[str, Array]:
    """The outputs of ``model``, that of ``view`` or a copy, by name."""
    signed = view.target.runtime == "onnxruntime" and view.target.activation_signed
    session = open_session(model, optimise=optimise, signed_activations=signed)
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error


def _sqnrs(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, float]:
    return {name: _sqnr(values, found[name]) for name, values in wanted.items()}


def _sqnr(wanted: Array, found: Array) -> float:
    """Signal over error in dB; infinite for what is no tensor of floats, or is all zero."""
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f":
        return math.inf
    if wanted.shape != np.shape(found):
        return -math.inf
    reference = wanted.astype(np.float64)
    error = found.astype(np.float64) - reference
    finite = np.isfinite(reference)
    signal, noise = (float(np.square(part[finite]).sum()) for part in (reference, error))
    if math.isnan(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
