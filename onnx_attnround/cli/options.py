"""The options of the command line, and what becomes of them: the config, and ``Options``.

What is slow to import is imported when it is needed, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from onnx_attnround.cli.run import Options
from onnx_attnround.config import QuantConfig, read_config
from onnx_attnround.targets import BLOCK_SIZES, TARGETS, WeightStorage

EPILOG = "\n\n".join((
    "Examples:",
    "onnx-attnround in.onnx out.onnx --calib samples.npz",
    "onnx-attnround in.onnx out.onnx --calib photos/ --preprocess imagenet",
    "onnx-attnround in.onnx out.onnx --calib c.npz --mean-bits 4 --min-sqnr 20",
    "onnx-attnround in.onnx out.onnx --calib c.npz --mean-bits 3,4,6",
    "onnx-attnround in.onnx --weight-bits 4 --exclude '/head/*' --dry-run",
    "onnx-attnround --check quantised.onnx --target tensorrt",
    "Exit codes: 0 done, 1 failed, 2 usage, 3 gate missed, 130 interrupted.",
))  # fmt: skip

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _choices(key: str) -> tuple[Any, ...]:
    return get_args(QuantConfig.model_fields[key].annotation)


def _setting(key: str, help: str, *, panel: str, choices: Sequence[Any] = ()) -> Any:
    """The option for a key of ``QuantConfig``: it tells the default, and is ``None`` if unset."""
    default = QuantConfig.model_fields[key].default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    listed = f": {', '.join(map(str, choices))}." if choices else ""
    told = f" Default: {default}." if default not in (None, "") else ""
    return typer.Option(help=f"{help}{listed}{told}", rich_help_panel=panel)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"onnx-attnround {metadata.version('onnx-attnround')}")
    except metadata.PackageNotFoundError:
        typer.echo("onnx-attnround, version unknown: run from its sources, not installed")
    raise typer.Exit


_DATA, _BITS, _HOW, _OUT = "Samples", "Bits", "Method and target", "Run and result"


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def command(  # noqa: PLR0913, PLR0917 - the declaration of the command line
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model to quantise.")],
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where the quantised model goes.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Calibration samples, unlabelled: .npz with input names as keys, .npy, an image, "
            "a folder of these, or of ONNX test_data_set_*. Without: test_data_set_* beside IN "
            "with 16 samples or more, else weights only.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="How images become inputs: imagenet, cifar10, unit, tf, or a TOML file.",
            metavar="NAME|FILE",
            rich_help_panel=_DATA,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="Samples to verify on, as for --calib; an .npz with `labels` adds top-1.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    samples: Annotated[
        int | None, _setting("samples", "Calibration samples used at most.", panel=_DATA)
    ] = None,
    batch_size: Annotated[
        int | None, _setting("batch_size", "Samples run at a time.", panel=_DATA)
    ] = None,
    weight_bits: Annotated[
        int | None, _setting("weight_bits", "Bits of the weights, 2 to 8.", panel=_BITS)
    ] = None,
    act_bits: Annotated[
        int | None,
        _setting(
            "act_bits",
            "Bits of the activations, 32 leaves them in float",
            panel=_BITS,
            choices=_choices("act_bits"),
        ),
    ] = None,
    mean_bits: Annotated[
        str | None,
        _setting(
            "mean_bits",
            "Mixed precision: mean bits per weight, each layer's chosen among --bit-choices. "
            "Several, as in 3,4,6: a file for each, OUT with .w3 and so on, and what they cost.",
            panel=_BITS,
        ),
    ] = None,
    bit_choices: Annotated[
        str | None, _setting("bit_choices", "Bits that --mean-bits chooses among.", panel=_BITS)
    ] = None,
    allocator: Annotated[
        str | None,
        _setting(
            "allocator",
            "What --mean-bits goes by: coding-length of the weights, or gram, errors measured on "
            "the calibration samples",
            panel=_BITS,
            choices=_choices("allocator"),
        ),
    ] = None,
    first_last_bits: Annotated[
        int | None,
        _setting(
            "first_last_bits",
            "Bits of the first and the last layers, at least --weight-bits without --mean-bits.",
            panel=_BITS,
        ),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        _setting(
            "embedding_bits",
            "Bits of tables that are looked up, such as embeddings: 8, with a scale for each row; "
            "4, with one for each 32 entries; 32 leaves them float.",
            panel=_BITS,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        _setting(
            "block_size",
            "Weights only (--act-bits 32): Gemm and MatMul get a scale for each run of so many "
            "inputs, not one per channel",
            panel=_BITS,
            choices=BLOCK_SIZES,
        ),
    ] = None,
    method: Annotated[
        str | None,
        _setting("method", "How weights are rounded", panel=_HOW, choices=_choices("method")),
    ] = None,
    reconstruct: Annotated[
        str | None,
        _setting(
            "reconstruct",
            "What is matched to the float model: each layer, or then each block too, with "
            "activations quantised in the loop, which takes some five times as long",
            panel=_HOW,
            choices=_choices("reconstruct"),
        ),
    ] = None,
    observer: Annotated[
        str | None,
        _setting(
            "observer", "How activation ranges are found", panel=_HOW, choices=_choices("observer")
        ),
    ] = None,
    target: Annotated[
        str | None,
        _setting(
            "target", "The runtime to write for", panel=_HOW, choices=(*TARGETS, "or a TOML file")
        ),
    ] = None,
    weight_storage: Annotated[
        str | None,
        _setting(
            "weight_storage",
            "How weights of up to 4 bits are stored, by default as the target wants",
            panel=_HOW,
            choices=get_args(WeightStorage),
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        _setting("include", "Only nodes whose name fits this glob; repeatable.", panel=_HOW),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        _setting("exclude", "No nodes whose name fits this glob; repeatable.", panel=_HOW),
    ] = None,
    custom_op_library: Annotated[
        list[str] | None,
        _setting(
            "custom_op_library",
            "Shared library with operators that the model uses; repeatable.",
            panel=_OUT,
        ),
    ] = None,
    seed: Annotated[int | None, _setting("seed", "Seed of all randomness.", panel=_OUT)] = None,
    device: Annotated[
        str | None,
        _setting(
            "device",
            "Where layers are rounded: cpu, or cuda, a GPU of NVIDIA",
            panel=_OUT,
            choices=_choices("device"),
        ),
    ] = None,
    threads: Annotated[
        int | None, _setting("threads", "CPU threads. Default: all cores.", panel=_OUT)
    ] = None,
    memory_limit: Annotated[
        str | None,
        _setting(
            "memory_limit",
            "Memory of the process, such as 4GB: fewer samples at a time, more on disk.",
            panel=_OUT,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of settings, named as here with _ for -; options given here win.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be quantised, and judge the samples given; write nothing.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check the quantised model IN against the rules of --target, run it on --calib "
            "or noise where its runtime is installed, and list what breaks or does not fuse; "
            "exit code 1 if it is refused.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    work_dir: Annotated[
        Path | None,
        _setting(
            "work_dir",
            "Keep what is finished in this folder until OUT is written: the same command then "
            "goes on where it was cut off, to the same bytes. Runs may share it.",
            panel=_OUT,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write all figures to this .json file.", rich_help_panel=_OUT),
    ] = None,
    min_sqnr: Annotated[
        float | None,
        _setting("min_sqnr", "Gate: least SQNR of any output, in dB.", panel=_OUT),
    ] = None,
    max_drop: Annotated[
        float | None,
        _setting(
            "max_drop",
            "Gate: most points of top-1 lost; without labels, points of disagreement with float.",
            panel=_OUT,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_OUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also print every layer, and tracebacks of errors.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version.",
            rich_help_panel=_OUT,
        ),
    ] = False,
) -> tuple[Options, dict[str, Any]]:
    """Quantise the ONNX model IN after training, and write it to OUT with Q/DQ nodes."""
    options = Options(
        given=_given(ctx),
        model=model,
        output=output,
        calib=calib,
        preprocess=preprocess,
        evaluation=evaluation,
        config_file=config,
        report=report,
        dry_run=dry_run,
        check=check,
        quiet=quiet,
        verbose=verbose,
    )
    return options, ctx.params


def _given(ctx: typer.Context) -> frozenset[str]:
    """The parameters that the command line holds, options by their long name."""
    sources = {p.opts[0]: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    return frozenset(
        name for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )


def configured(options: Options, given: dict[str, Any]) -> tuple[Options, QuantConfig]:
    """The file's settings, overridden by the options given; of several mean bits the first.

    Where there are several, all of them go into the options.
    """
    settings = {} if options.config_file is None else read_config(options.config_file)
    for key in QuantConfig.model_fields:
        if (value := given.get(key)) not in (None, [], ()):
            settings[key] = value.split(",") if key in ("bit_choices", "mean_bits") else value
    match settings.get("mean_bits"):
        case [single]:
            settings["mean_bits"] = single
        case [first, *_] as means:
            settings["mean_bits"] = first
            options = replace(options, mean_bits=tuple(means))
    return options, QuantConfig.parse(settings)
