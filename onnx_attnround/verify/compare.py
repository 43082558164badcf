"""Outputs, layers and top-1 of the two models, compared in streaming sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.errors import CalibrationError, OutputError
from onnx_attnround.graph import input_specs, outputs_of_shares
from onnx_attnround.records import Array, LayerPlan
from onnx_attnround.samples import Samples
from onnx_attnround.samples.mask import find_mask, tokens, without_padding, zero_padding
from onnx_attnround.verify.collapse import LEAST_DB, collapse
from onnx_attnround.verify.results import Accuracy, OutputComparison
from onnx_attnround.verify.runs import BATCH, Feed, Models, Outputs, Step, sample_count
from onnx_attnround.verify.shared import Pair, open_comparison, open_shared
from onnx_attnround.verify.slices import Details

LAYER_SAMPLES = 64
"""The samples on which layers are compared."""

LAYER_BATCH = 8
"""The most samples of a run: the outputs of all layers of a batch are held at once."""

LAYER_BYTES = 64 << 20
"""The most bytes of these outputs, in both models, unless those of one sample take more."""


def compare_outputs(
    run: Pair, feeds: Iterator[Feed], float_model: ir.Model, labels: Array | None, step: Step
) -> tuple[int, dict[str, OutputSums], Accuracy | None]:
    """One pass of both models: samples seen, sums per graph output, and top-1.

    Padded tokens are left out where an input of ``float_model`` tells of them.
    """
    mask, shares = find_mask(float_model), outputs_of_shares(float_model)
    done, sums, correct = 0, dict[str, OutputSums](), np.zeros(3, np.int64)
    for feed in feeds:
        expected, got = run(feed)
        for name, value in expected.items():
            total = sums.setdefault(name, OutputSums(name, one_kind=name in shares))
            total.add(value, got[name], tokens(feed, mask), sample_count(feed))
        if labels is not None:
            wanted = labels[done : done + sample_count(feed)]
            first, second = (_correct(outputs, expected, wanted) for outputs in (expected, got))
            correct += [first.sum(), second.sum(), (first != second).sum()]
        done += sample_count(feed)
        step("outputs", sample_count(feed))
    right = [int(count) for count in correct]
    top1 = Accuracy(
        samples=done, float_correct=right[0], quantised_correct=right[1], flipped=right[2]
    )
    return done, sums, None if labels is None else top1


def compare_layers(
    models: Models,
    layers: Sequence[LayerPlan],
    samples: Samples,
    threads: int | None,
    step: Step,
) -> dict[str, float]:
    """SQNR in dB by node name, of the layers whose output both graphs still name."""
    known = [{value.name for node in model.graph for value in node.outputs} for model in models]
    found = {layer.y: layer.node for layer in layers if all(layer.y in names for names in known)}
    if not found:
        return {}
    run, sums = open_shared(models, list(found), threads), dict[str, Sums]()
    mask = find_mask(models[0])
    size = _affordable(run(next(samples.batches(1))))
    for feed in batches(samples, size, LAYER_SAMPLES):
        expected, got = run(feed)
        for name, value in expected.items():
            sums.setdefault(name, Sums(name)).add(value, got[name], tokens(feed, mask))
        step("layers", sample_count(feed))
    return {found[name]: total.sqnr_db for name, total in sums.items()}


def output_sqnr(
    float_model: ir.Model,
    quantised: ir.Model,
    samples: Samples,
    threads: int | None,
    limit: int | None = None,
) -> float:
    """SQNR in dB of the worst float output; errors as :func:`verify`.

    Over all ``samples``, or the first ones up to ``limit``.
    """
    _, sums, _ = compare_outputs(
        open_comparison((float_model, quantised), threads).run,
        batches(samples, BATCH, limit),
        float_model,
        labels=None,
        step=lambda detail, count: None,
    )
    compared = [total for total in sums.values() if total.comparable and total.floating]
    return min((total.sqnr_db for total in compared), default=math.inf)


def _affordable(found: tuple[Outputs, Outputs]) -> int:
    """How many samples' layers to hold at once, from what those of one are."""
    used = sum(int(value.nbytes) for outputs in found for value in outputs.values())
    return max(1, min(LAYER_BATCH, LAYER_BYTES // max(used, 1)))


def check_labels(labels: Array | None, evaluation: Samples | None, model: ir.Model) -> None:
    """Raise ``CalibrationError`` unless there is one integer label per evaluation sample.

    A static batch of the model may leave a last, incomplete batch of labels unused.
    """
    if labels is None:
        return
    if evaluation is None:
        raise CalibrationError(
            "labels without evaluation samples: give both in one file (`evaluation`)"
        )
    batch = next((spec.shape[0] for spec in input_specs(model) if spec.shape), None) or 1
    integers = labels.ndim == 1 and labels.dtype.kind in "iu"
    if not integers or not 0 <= len(labels) - evaluation.count < batch:
        raise CalibrationError(
            f"labels: got {labels.dtype} of shape {list(labels.shape)}, expected integers of shape "
            f"[{evaluation.count}], one per evaluation sample; correct the `evaluation` file"
        )


def batches(samples: Samples, size: int, limit: int | None) -> Iterator[Feed]:
    """Batches of ``size`` (or the model's static batch) until ``limit`` samples are out."""
    done = 0
    for feed in samples.batches(size):
        yield feed
        done += sample_count(feed)
        if limit is not None and done >= limit:
            return


class Sums:
    """Streaming sums over the batches of one tensor.

    ``comparable`` turns false if the tensor does not hold numbers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.comparable = self.floating = True
        self.signal = self.noise = self.worst = 0.0
        self.agreeing = self.judged = 0

    def add(self, expected: Any, got: Any, mask: Array | None = None, samples: int = 1) -> None:
        """Add one batch of so many ``samples``, at the tokens of ``mask`` if it has tokens.

        Raises ``OutputError`` on another shape, or NaN/Inf in ``got`` alone.
        """
        self.comparable = isinstance(expected, np.ndarray) and expected.dtype.kind in "biuf"
        if not self.comparable:
            return
        if expected.shape != got.shape:
            raise OutputError(
                f"tensor '{self.name}' of the quantised model: got shape {list(got.shape)}, "
                f"expected {list(expected.shape)} as in the float model; please report this"
            )
        self.floating = expected.dtype.kind == "f"
        rows = without_padding(expected, mask), without_padding(got, mask)
        self._add_error(*rows)
        self._add_agreement(expected, got)
        self._add_samples(zero_padding(expected, mask), zero_padding(got, mask), samples)

    def _add_samples(self, expected: Array, got: Array, samples: int) -> None:
        """Take in what is told of each sample, with padded tokens 0; here nothing is."""

    def _add_error(self, expected: Array, got: Array) -> None:
        finite, sound = np.isfinite(expected), np.isfinite(got)
        if not (finite.all() and sound.all()):
            if broken := int(np.count_nonzero(finite & ~sound)):
                raise OutputError(
                    f"tensor '{self.name}' of the quantised model: got {broken} NaN or infinite "
                    f"elements of {got.size}, expected finite as in the float model; "
                    "`exclude` the layers before it"
                )
            expected, got = np.where(finite, expected, 0), np.where(finite, got, 0)
        self._add_finite(expected, got)

    def _add_finite(self, expected: Array, got: Array) -> None:
        reference = expected.astype(np.float64).ravel()
        error = got.astype(np.float64).ravel() - reference
        self.signal += float(reference @ reference)
        self.noise += float(error @ error)
        self.worst = max(self.worst, float(np.abs(error).max(initial=0.0)))

    def _add_agreement(self, expected: Array, got: Array) -> None:
        if _class_scores(expected):
            expected, got = expected.argmax(axis=1), got.argmax(axis=1)
        elif self.floating:
            return
        self.agreeing += int(np.count_nonzero(expected == got))
        self.judged += expected.size

    @property
    def sqnr_db(self) -> float:
        """Signal over noise, in dB."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


class OutputSums(Sums):
    """The same for an output of the model, with figures of its slices, maybe of ``one_kind``."""

    def __init__(self, name: str, *, one_kind: bool = False) -> None:
        super().__init__(name)
        self._details = Details(one_kind=one_kind)
        self._powers: list[Array] = []

    def _add_samples(self, expected: Array, got: Array, samples: int) -> None:
        if not self.floating:
            return
        whole = expected.ndim > 0 and len(expected) % samples == 0
        shape = (samples if whole and expected.size else 1, -1)
        reference = np.where(np.isfinite(expected), expected, 0).astype(np.float64)
        error = np.where(np.isfinite(expected), got, 0) - reference
        powers = [np.square(values).reshape(shape).sum(1) for values in (reference, error)]
        self._powers.append(np.stack(powers))

    @property
    def sqnr_error_db(self) -> float | None:
        """The standard error of the SQNR in dB; ``None`` of a single sample, and without noise.

        To first order, ``log Σ s - log Σ n`` over samples has that of the mean of
        ``s / mean(s) - n / mean(n)``.
        """
        powers = np.concatenate([np.empty((2, 0)), *self._powers], 1)
        count = powers.shape[1]
        if count < 2 or not powers.any(1).all():
            return None
        means = powers.mean(1, keepdims=True)
        signal, noise = powers / means
        deviation = float(np.std(signal - noise, ddof=1))
        return 10 / math.log(10) * deviation / math.sqrt(count)

    def _add_finite(self, expected: Array, got: Array) -> None:
        super()._add_finite(expected, got)
        if self.floating:
            self._details.add(expected, got)

    def result(self) -> OutputComparison:
        """The figures over all batches so far."""
        found = OutputComparison(
            name=self.name,
            sqnr_db=self.sqnr_db if self.floating else None,
            sqnr_error_db=self.sqnr_error_db,
            max_abs_error=self.worst,
            agreeing=self.agreeing,
            judged=self.judged,
        )
        if not self.floating:
            return found
        found = replace(
            found,
            worst_slices=self._details.worst_slices(),
            correlation=self._details.correlation,
            frozen=self._details.frozen,
            lost_extreme=self._details.lost_extreme(),
        )
        return replace(found, collapsed=collapse(found, self._details.drowned_slice(LEAST_DB)))


def _class_scores(value: Any) -> bool:
    """Whether a model's output may hold one column per class."""
    is_matrix = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 2
    return bool(is_matrix and value.shape[1] > 1)


def _correct(outputs: Outputs, expected: Outputs, labels: Array) -> Array:
    """Which rows of the first output with class scores have their maximum at the label."""
    name = next((name for name, value in expected.items() if _class_scores(value)), None)
    if name is None:
        raise CalibrationError(
            f"labels: no output of {', '.join(expected)} holds class scores "
            "(float, rank 2, more than one column); give `evaluation` without labels"
        )
    scores = outputs[name]
    if len(scores) != len(labels):
        raise CalibrationError(
            f"labels: output '{name}' has {len(scores)} rows for {len(labels)} samples, expected "
            "one each; give `evaluation` as a batch of samples, or without labels"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        raise CalibrationError(
            f"labels: got values {labels.min()} to {labels.max()}, expected 0 to "
            f"{scores.shape[1] - 1}, the columns of output '{name}'; correct the `evaluation` file"
        )
    right: Array = scores.argmax(axis=1) == labels
    return right
