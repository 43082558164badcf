"""From a float model to a checked QDQ file: the stages, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_attnround import graph, qdq
from onnx_attnround.calibrate import left_out_note
from onnx_attnround.check import Checked, check
from onnx_attnround.checkpoint import check_work_dir, open_checkpoint
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.errors import GateError, OutputError
from onnx_attnround.ops import weight_matrix
from onnx_attnround.pipeline.activations import (
    plan_parted,
    ranges_of,
    with_dynamic_ranges,
    with_float_tensors,
)
from onnx_attnround.pipeline.log import log_notes, logged
from onnx_attnround.pipeline.memory_limit import within_limit
from onnx_attnround.pipeline.notes import few_rows, larger_note, stored_note, taken, unblocked
from onnx_attnround.pipeline.open_inputs import (
    check_samples,
    keep_apart,
    open_calibration,
    open_evaluation,
)
from onnx_attnround.pipeline.open_model import ModelSource, open_model, source_of
from onnx_attnround.pipeline.pace import with_pace
from onnx_attnround.pipeline.prepared import Loaded, Prepared
from onnx_attnround.pipeline.proof import (
    CHECKED_SAMPLES,
    advice,
    checked_output,
    compare,
    rounded_note,
)
from onnx_attnround.pipeline.smoothing import smooth_model
from onnx_attnround.plan.bits import allocate, measures, moves_wide
from onnx_attnround.plan.dynamic import can_be_dynamic, with_dynamic
from onnx_attnround.records import (
    Array,
    BitAllocation,
    BlockRounding,
    LayerErrors,
    LayerRounding,
    OnEvent,
    QuantParams,
    QuantPlan,
)
from onnx_attnround.report.result import QuantizeResult
from onnx_attnround.runtime.footprint import affordable_batch
from onnx_attnround.runtime.session import custom_ops
from onnx_attnround.samples import Samples, open_samples
from onnx_attnround.samples.preprocess import Preprocess, Transform
from onnx_attnround.simplify import simplify
from onnx_attnround.targets import WeightStorage, get_target
from onnx_attnround.verify import (
    check_gates,
    check_labels,
    output_sqnr,
    slower_note,
)
from onnx_attnround.version import version


def make_plan(
    model: ModelSource,
    config: QuantConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[QuantPlan, BitAllocation]:
    """What :func:`quantize` would quantise given samples, and with how many bits; runs nothing."""
    config = QuantConfig.of(config, **settings)
    simplified, _ = simplify(open_model(model))
    simplified, plan = plan_parted(simplified, config, quantise_activations=True)
    if config.activations == "dynamic":
        plan = with_dynamic(plan, can_be_dynamic(simplified, plan))
    return plan, _allocate(simplified, plan, config, None)


def quantize(
    model: ModelSource,
    calibration: object = None,
    config: QuantConfig | Mapping[str, Any] | None = None,
    *,
    output: Path | str | None = None,
    evaluation: object = None,
    preprocess: Preprocess | str | Transform | None = None,
    on_event: OnEvent = lambda event: None,
    **settings: Any,
) -> QuantizeResult:
    """Quantise a float model to standard QDQ, verify it, and write it to ``output``.

    ``settings`` are keys of ``QuantConfig``, ``weight_bits=4`` for one; ``config`` may
    hold them too, as a config or a mapping, and those given here override it.

    ``model`` is a path, the bytes of a file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.

    ``calibration`` is anything that ``samples.open_samples`` reads: a path, an
    array, a mapping of input names to arrays, a list, a ``DataLoader`` or another
    iterable of samples or batches, with labels or without. Without it, ONNX
    ``test_data_set_*`` beside the model are used, if they hold 16 samples or more; else
    only weights are quantised, to nearest. ``evaluation`` are samples to verify on, in
    the same forms; an .npz or a mapping may hold ``labels`` for top-1, and a tuple may end in them.
    ``preprocess`` turns images into inputs: a ``Preprocess``, the name of one, or a file. A
    function instead makes inputs of each item of an iterable.

    Raises an :class:`AttnRoundError` (``errors.py``) on any bad input; a missed
    gate raises ``GateError`` with the result as its ``result``, and leaves no file.
    """
    config = QuantConfig.of(config, **settings)
    run = Run(config, logged(on_event))
    if output is not None:
        graph.check_output(path_of(output), source_of(model))
    given = load(run, model, calibration, evaluation, preprocess)
    if config.until is not None or config.size is not None:
        from onnx_attnround.pipeline.goal import reach  # made of the stages below

        return reach(run, given, output)
    run, prepared = prepare(run, given)
    result = finish(run, prepared, output)
    run.checkpoint.remove()
    return result


def check_model(
    model: ModelSource,
    config: QuantConfig | Mapping[str, Any] | None = None,
    calibration: object = None,
    *,
    preprocess: Preprocess | str | Transform | None = None,
    **settings: Any,
) -> Checked:
    """Check a quantised model of any origin against the rules of ``config.target``.

    It is run on the first samples of ``calibration``, if given; else on noise,
    where its shapes are known. Raises ``ModelError`` if the file cannot be read.
    """
    config = QuantConfig.of(config, **settings)
    loaded = open_model(model)
    with custom_ops(config.custom_op_library):
        feed = None
        if calibration is not None:
            specs = graph.input_specs(loaded)
            samples = open_samples(calibration, specs, limit=config.samples, preprocess=preprocess)
            feed = next(samples.batches(CHECKED_SAMPLES))
        return check(loaded, get_target(config.target), feed)


def load(
    run: Run,
    model: ModelSource,
    calibration: object,
    evaluation: object,
    preprocess: Preprocess | str | Transform | None,
) -> Loaded:
    """Open model and samples, and judge whether they are what the config needs."""
    source = source_of(model)
    if run.config.device != "cpu":
        from onnx_attnround.runtime.device import open_device  # with torch: takes a second

        open_device(run.config.device)  # judges whether there is one
    if run.config.work_dir is not None:
        check_work_dir(run.config.work_dir)
    with run.stage("load"):
        original = open_model(model)
        samples = open_calibration(source, calibration, original, preprocess, run.config, run.notes)
        held_out, labels = open_evaluation(evaluation, original, preprocess, run.notes)
        check_labels(labels, held_out, original)
        check_samples(run.config, samples, held_out)
        samples, held_out, basis = keep_apart(samples, held_out, run.config, run.notes)
        run.notes += run.config.idle()
        if samples is None and run.config.device != "cpu":
            run.notes.append("option `device` has no effect: there are no samples")
    return Loaded(
        source=source,
        original=original,
        samples=samples,
        evaluation=held_out,
        labels=labels,
        basis=basis,
    )


def prepare(run: Run, given: Loaded, errors: LayerErrors | None = None) -> tuple[Run, Prepared]:
    """The stages that do not depend on the bits of the layers; the run with its work dir.

    Its settings are those that its memory limit has room for. ``errors`` are those of the
    layers, where they are known.
    """
    samples = given.samples
    if run.config.work_dir is not None and samples is not None:
        with run.stage("resume"):
            checkpoint = open_checkpoint(run.config.work_dir, given.original, samples, run.config)
            run = replace(run, checkpoint=checkpoint)
    run, given, simplified, plan = planned(run, given)
    samples = given.samples
    simplified, plan, observers = smooth_model(run, simplified, plan, samples)
    with run.stage("calibrate"):
        ranges = ranges_of(run, simplified, plan, samples, observers)
        run.notes += left_out_note(ranges)
        simplified, plan, ranges, floats = with_float_tensors(
            run, simplified, plan, ranges, samples
        )
        plan, ranges = with_dynamic_ranges(run, simplified, plan, ranges, samples, observers)
    if plan.dynamic:
        given = _in_batches(given, 1)  # as its range is found over all of a batch
        samples = given.samples
    with run.stage("pace"):
        simplified, plan, ranges = with_pace(run, (simplified, plan, ranges), samples)
    if samples is not None and run.config.method != "nearest":
        run.notes += few_rows(plan, ranges, samples.count)
    errors = errors or _measure(run, simplified, plan, samples)
    return run, Prepared(
        given=given, simplified=simplified, plan=plan, ranges=ranges, errors=errors, floats=floats
    )


def planned(run: Run, given: Loaded) -> tuple[Run, Loaded, ir.Model, QuantPlan]:
    """Settings and samples within the memory limit, the simplified model, and its plan."""
    with run.stage("simplify"):
        simplified, changes = simplify(given.original)
        run.notes += changes
    with run.stage("plan"):
        quantise_activations = given.samples is not None
        simplified, plan = plan_parted(
            simplified, run.config, quantise_activations=quantise_activations
        )
        run, given = _within_limit(run, given, simplified, plan)
        return run, _in_room(given, simplified), simplified, plan


def finish(run: Run, prepared: Prepared, output: Path | str | None) -> QuantizeResult:
    """The stages from the bits of ``run.config`` on; raises ``GateError`` as :func:`quantize`."""
    return conclude(run, prepared, make(run, prepared), output)


def conclude(
    run: Run, prepared: Prepared, result: QuantizeResult, output: Path | str | None
) -> QuantizeResult:
    """What was made, with advice where that is due, held against the gates and written."""
    found = result.ranges.params, result.roundings, result.verification
    result = replace(result, advice=advice(run, prepared, *found))
    log_notes(result.notes)
    _check_gates(result, run.config)
    if output is not None:
        graph.save(result.model, Path(output), source=prepared.given.source)
    return result


def make(run: Run, prepared: Prepared) -> QuantizeResult:
    """A file with the bits of ``run.config``, checked and verified, not yet judged or written."""
    plan = prepared.plan
    config = run.config
    allocation = allocate_bits(prepared, config)
    with run.stage("round"):
        roundings = _round(run, prepared, allocation)
    roundings, params, blocks = _refine(run, prepared, roundings)
    run.notes += unblocked(plan, roundings, config.block_size)
    run.notes += stored_note(plan)
    with run.stage("write"):
        quantised, notes = written(prepared, params, roundings, config, allocation)
        run.notes += notes
    with run.stage("check"):
        checked = checked_output(quantised, plan, prepared.given.judged_on)
    with run.stage("verify"):
        verification = compare(run, prepared, quantised)
        run.notes += rounded_note(run, prepared, quantised, checked)
    if verification is not None:
        run.notes += verification.notes
        run.notes += larger_note(verification, prepared.given.original, quantised)
    if verification is not None and plan.target.runtime == "onnxruntime":
        run.notes += slower_note(verification.latency, checked.fusion)
    return QuantizeResult(
        model=quantised,
        config=config,
        plan=plan,
        fitted=prepared.given.samples.count if prepared.given.samples else 0,
        ranges=replace(prepared.ranges, params=params),
        allocation=allocation,
        roundings=roundings,
        blocks=blocks,
        checked=checked,
        verification=verification,
        notes=(*run.notes, *taken(run)),
        seconds=run.seconds,
        source=prepared.given.source,
    )


def allocate_bits(prepared: Prepared, config: QuantConfig) -> BitAllocation:
    """The bits of all layers."""
    return _allocate(prepared.simplified, prepared.plan, config, prepared.errors)


def written(
    prepared: Prepared,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    config: QuantConfig,
    allocation: BitAllocation,
) -> tuple[ir.Model, list[str]]:
    """The quantised model, with the record of how it was made, and notes."""
    plan = prepared.plan
    model = qdq.insert(prepared.simplified, plan, params, roundings, storage_of(plan, config))
    qdq.fold_weights(model, plan)
    notes = qdq.store_once(model, plan)
    graph.forget_shapes(model, prepared.given.original)
    _add_provenance(model, config, allocation)
    return model, notes


def storage_of(plan: QuantPlan, config: QuantConfig) -> WeightStorage:
    """How weights of up to 4 bits are stored: as asked, else as the target wants."""
    return config.weight_storage or plan.target.storages(blocks=config.block_size is not None)[0]


def path_of(output: object) -> Path:
    """The file to write; raises ``OutputError`` for what is no path."""
    if not isinstance(output, str | PathLike):
        raise OutputError(f"the output is of type {type(output).__name__}, expected a path")
    return Path(output)


def _within_limit(
    run: Run, given: Loaded, simplified: ir.Model, plan: QuantPlan
) -> tuple[Run, Loaded]:
    """The run with settings that its memory limit has room for, and samples in such batches."""
    if (limit := run.config.memory_limit) is None:
        return run, given
    models = given.original, simplified
    config = within_limit(limit, run.config, models, plan, given.samples or given.judged_on)
    return replace(run, config=config), _in_batches(given, config.batch_size)


def _in_batches(given: Loaded, most: int) -> Loaded:
    """What was loaded, its samples no more than ``most`` at a time."""
    return replace(
        given,
        samples=given.samples and given.samples.at_most(most),
        evaluation=given.evaluation and given.evaluation.at_most(most),
    )


def _in_room(given: Loaded, simplified: ir.Model) -> Loaded:
    """The samples in batches whose activations do not take too much memory."""
    judged = given.samples or given.judged_on
    return given if judged is None else _in_batches(given, affordable_batch(simplified, judged))


def _allocate(
    model: ir.Model, plan: QuantPlan, config: QuantConfig, errors: LayerErrors | None
) -> BitAllocation:
    layers = {layer.node: layer for layer in plan.layers}

    def matrix(node: str) -> Array:
        return weight_matrix(layers[node], graph.tensor_value(model, layers[node].weight))

    return allocate(plan.layers, matrix, config, errors)


def _measure(
    run: Run, model: ir.Model, plan: QuantPlan, samples: Samples | None
) -> LayerErrors | None:
    """The errors of the layers by their bits, if the choice of these asks for them."""
    if samples is None or not (measures(run.config) or moves_wide(plan.layers, run.config)):
        return None
    from onnx_attnround.reconstruct import sensitivity  # with torch: takes a second

    every = measures(run.config)
    with run.stage("measure"):
        find = sensitivity.layer_errors if every else sensitivity.errors_alone
        return find(model, plan, samples, run)


def _round(run: Run, prepared: Prepared, allocation: BitAllocation) -> dict[str, LayerRounding]:
    # With torch, which takes a second.
    from onnx_attnround.reconstruct.layerwise import round_layers, round_plain

    model, plan, params = prepared.simplified, prepared.plan, prepared.ranges.params
    samples = prepared.given.samples
    if samples is None:
        return round_plain(model, plan, params, allocation)
    return round_layers(model, plan, params, allocation, samples, run)


def _refine(
    run: Run, prepared: Prepared, roundings: dict[str, LayerRounding]
) -> tuple[dict[str, LayerRounding], Mapping[str, QuantParams], tuple[BlockRounding, ...]]:
    """Roundings, activation parameters and records of the blocks, refined where that is asked.

    What was refined is kept if the model's outputs gain over all samples: each block
    gains on its own outputs, yet the errors of several may add up behind them.
    """
    params, samples = prepared.ranges.params, prepared.given.samples
    if samples is None or run.config.reconstruct == "layer":
        return roundings, params, ()
    from onnx_attnround.reconstruct.blockwise import refine_blocks

    model, plan = prepared.simplified, prepared.plan
    with run.stage("refine"):
        refined = refine_blocks(model, plan, params, roundings, samples, run)
        before, after = (
            output_sqnr(model, qdq.insert(model, plan, *made, "int8"), samples, run.config.threads)
            for made in ((params, roundings), (refined.params, refined.roundings))
        )
    run.notes += [
        f"block {block.nodes[0]} … {block.nodes[-1]}: {block.summary}"
        for block in refined.blocks
        if block.skipped
    ]
    if after < before:
        run.notes.append(
            f"blocks: kept as they were rounded layer by layer, since refined they took the "
            f"outputs from {before:.1f} dB to {after:.1f} dB"
        )
        return roundings, params, ()
    return refined.roundings, refined.params, tuple(refined.blocks)


def _add_provenance(model: ir.Model, config: QuantConfig, allocation: BitAllocation) -> None:
    model.metadata_props["onnx_attnround.version"] = version()
    model.metadata_props["onnx_attnround.config"] = config.model_dump_json(
        exclude={"custom_op_library", "work_dir", "memory_limit"}  # of the machine it was made on
    )
    model.metadata_props["onnx_attnround.bits"] = " ".join(
        f"{node}={bits}" for node, bits in allocation.bits.items()
    )


def _check_gates(result: QuantizeResult, config: QuantConfig) -> None:
    if result.verification is None:
        return
    try:
        check_gates(result.verification, config)
    except GateError as error:
        error.result = result
        raise
