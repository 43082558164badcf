"""Deployment targets as data: what a runtime wants of a QDQ file.

A target is a literal of ``TARGETS``, or a TOML file with the fields of
``Target`` that starts from one of them: ``base = "ort"``, and what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from onnx_attnround.errors import ConfigError
from onnx_attnround.settings import first_mistake, read_toml, unknown

WeightStorage = Literal["packed", "packed2", "int8", "int4"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "qnn"]
Placement = Literal["regions", "inputs", "everything"]
BlockSize = Literal[16, 32, 64, 128, 256]
INT16_MAX = (1 << 15) - 1
BLOCK_SIZES: tuple[BlockSize, ...] = get_args(BlockSize)


def _known(ops: frozenset[str]) -> frozenset[str]:
    import onnx.defs  # takes a while: --help needs no check

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    if unknown := sorted(ops - known):
        raise ValueError(f"ONNX has no op {', '.join(unknown)}")
    return ops


Ops = Annotated[frozenset[str], AfterValidator(_known)]
ActivationBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The rules of one runtime.

    ``runtime`` says whose rules a finished file is checked against.

    Activations are signed or not, symmetric or not, of one of
    ``activation_bits``, and their range is at least ``least_range`` wide.
    ``placement`` says which get Q/DQ: ``regions``, all that lies between
    integer layers; ``inputs``, what layers read, and the shortcut of a residual
    Add; ``everything``, each float tensor of the graph. ``quantised_outputs``
    says whether graph outputs may have Q/DQ. The outputs of ``unit_range`` ops
    have the full range of the op, whatever was observed.

    ``weighted`` are the ops with a constant weight that run in integer when
    their activations are quantised; ``arithmetic`` ops do if all their data
    inputs and their output are; ``movement`` ops pass codes through, so that
    input and output share scale and zero point; ``absorbed`` activations
    vanish into the Q behind them, and are left out of the file with
    ``drop_absorbed``. ``clipped_lines`` are arithmetic too, written as a Q of the line's own
    scale and zero point, which clips it. ``float_output`` ops need no Q on their output.

    Weights of ``per_tensor`` ops have one scale, others one per channel.
    ``weight_storages`` are the forms that weights of up to 4 bits may have, the
    usual one first. ``int32_bias`` says whether a bias is stored as int32 at
    sx*sw. ``max_opset`` is the newest opset that the runtime reads.

    ``tables`` says whether tables that are looked up may be integers, turned into floats
    by plain arithmetic.

    ``dynamic`` says whether a MatMul runs in integer where DynamicQuantizeLinear makes its
    codes, of a range that is found in each run.

    ``int16_pairs`` says whether some CPU that the files run on adds pairs of products of
    8-bit codes in 16 bits: what does not fit there is cut off, and no error is raised.

    Under float activations the weights of Gemm and MatMul may have a scale for each
    block of inputs, of one of ``block_sizes`` (none: not at all), stored in one of
    ``block_storages``; without ``int8`` there they have up to 4 bits. A last block may
    be short with ``short_blocks``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    runtime: Runtime
    activation_signed: bool
    activation_symmetric: bool
    activation_bits: frozenset[ActivationBits]
    least_range: float = 0.0
    placement: Placement
    quantised_outputs: bool
    unit_range: Ops = frozenset()
    weighted: Ops
    arithmetic: Ops
    movement: Ops
    absorbed: Ops
    drop_absorbed: bool = False
    clipped_lines: Ops = frozenset()
    tables: bool = False
    dynamic: bool = False
    float_output: Ops
    float_input: Ops = frozenset()
    per_tensor: Ops = frozenset()
    weight_storages: Annotated[tuple[WeightStorage, ...], Field(min_length=1)]
    int32_bias: bool
    block_sizes: frozenset[BlockSize] = frozenset()
    block_storages: tuple[WeightStorage, ...] = ()
    short_blocks: bool = False
    max_opset: int | None = None
    int16_pairs: bool = False

    def code_limit(self, highest: int) -> int | None:
        """The magnitude of weight codes up to which pairs of products are added exactly.

        ``highest`` is the highest code of the activations, as the kernel has them: without
        sign. ``None`` where pairs are added in 32 bits. The limit holds for any two codes, so
        that it does not matter in which order a kernel packs them.
        """
        return INT16_MAX // (2 * highest) if self.int16_pairs else None

    def storages(self, *, blocks: bool) -> tuple[WeightStorage, ...]:
        """The forms that weights of up to 4 bits may have, the usual one first."""
        return self.block_storages if blocks else self.weight_storages

    def plain(self) -> dict[str, Any]:
        """The fields as JSON has them, in an order that is always the same."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: sorted(v) if isinstance(v, frozenset) else v for key, v in values.items()}


_MATRIX = frozenset({"Conv", "Gemm", "MatMul"})
_MOVEMENT = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"}
    | {"DepthToSpace", "MaxPool", "Pad", "Resize"}
)

_ORT = Target(
    name="ort",
    runtime="onnxruntime",
    activation_signed=False,
    activation_symmetric=False,
    activation_bits=frozenset({2, 3, 4, 5, 6, 7, 8, 16}),
    placement="regions",
    quantised_outputs=True,
    tables=True,
    dynamic=True,
    weighted=_MATRIX,
    arithmetic=frozenset(
        {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
    ),
    clipped_lines=frozenset({"HardSigmoid"}),
    movement=_MOVEMENT,
    absorbed=frozenset({"Relu", "Clip"}),
    float_output=frozenset({"Gemm", "MatMul"}),
    weight_storages=("packed", "packed2", "int8", "int4"),
    int32_bias=True,
    block_sizes=frozenset(BLOCK_SIZES),
    block_storages=("packed", "packed2", "int8", "int4"),
    short_blocks=True,
    int16_pairs=True,  # x86-64 with AVX2 and without VNNI
)

# ARM kernels multiply signed by signed; the zero point stays free, so that a Q absorbs a Relu.
# They add in 32 bits, but files for them are made and tried on x86-64, where pairs may saturate.
_ORT_ARM = replace(_ORT, name="ort-arm", activation_signed=True)

# It moves a DQ behind a Pad and then pads with code 0, also where that is not the zero point.
_OPENVINO = replace(
    _ORT,
    name="openvino",
    runtime="openvino",
    dynamic=False,
    activation_bits=frozenset({8}),
    quantised_outputs=False,
    clipped_lines=frozenset(),
    movement=_MOVEMENT - {"Pad"},
    float_output=_MATRIX,
    float_input=frozenset({"Pad"}),
    weight_storages=("packed", "int8", "int4"),
    int32_bias=False,
    block_storages=("packed", "int8", "int4"),
    short_blocks=False,  # a last block that is not full does not load
)

_TENSORRT = Target(
    name="tensorrt",
    runtime="tensorrt",
    activation_signed=True,
    activation_symmetric=True,
    activation_bits=frozenset({8}),
    placement="inputs",
    quantised_outputs=False,
    weighted=_MATRIX | {"ConvTranspose"},
    arithmetic=frozenset(),
    movement=frozenset(),
    absorbed=frozenset({"Relu", "Clip"}),
    float_output=_MATRIX | {"ConvTranspose"},
    weight_storages=("int8",),
    int32_bias=False,
    block_sizes=frozenset({64, 128}),
    block_storages=("int4",),
    max_opset=25,
)

_QNN = Target(
    name="qnn",
    runtime="qnn",
    activation_signed=False,
    activation_symmetric=False,
    activation_bits=frozenset({8, 16}),
    least_range=1e-4,
    placement="everything",
    quantised_outputs=True,
    unit_range=frozenset({"Sigmoid", "Tanh"}),
    weighted=_MATRIX | {"ConvTranspose"},
    arithmetic=frozenset(
        {"Add", "Sub", "Mul", "Div", "Concat", "Max", "Min", "PRelu", "Where"}
    ),
    movement=_MOVEMENT,
    absorbed=frozenset({"Relu", "Clip"}),
    drop_absorbed=True,
    float_output=frozenset(),
    per_tensor=frozenset({"Gemm", "MatMul"}),
    weight_storages=("int8", "int4"),
    int32_bias=True,
    max_opset=21,
    int16_pairs=True,  # not on the device, but where ONNX Runtime tries its files on x86-64
)

TARGETS: dict[str, Target] = {
    target.name: target for target in (_ORT, _ORT_ARM, _TENSORRT, _OPENVINO, _QNN)
}


def get_target(choice: str | Target) -> Target:
    """The target of that name, or in that TOML file; raises ``ConfigError``."""
    if isinstance(choice, Target):
        return choice
    if choice.endswith(".toml"):
        return _read(Path(choice))
    if choice not in TARGETS:
        raise ConfigError(unknown("target", choice, TARGETS, "'") + ", or a .toml file")
    return TARGETS[choice]


def _read(path: Path) -> Target:
    given = read_toml(path, "target")
    base = given.pop("base", None)
    if base is not None and base not in TARGETS:
        raise ConfigError(f"target '{path}': " + unknown("base", str(base), TARGETS, "'"))
    inherited = {} if base is None else TARGETS[base].plain()
    try:
        return TypeAdapter(Target).validate_python({**inherited, "name": path.stem, **given})
    except ValidationError as error:
        keys = ["base", *(field.name for field in fields(Target))]
        mistake = first_mistake(error, "key", keys)
        remedy = "" if base else f"; a `base` among {', '.join(TARGETS)} has all that is not given"
        raise ConfigError(f"target '{path}': {mistake}{remedy}") from error
