"""ONNX Runtime sessions: one place that opens them and words their errors."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as MissingKernel

from onnx_attnround.errors import (
    AttnRoundError,
    CalibrationError,
    ConfigError,
    ModelError,
    OutputError,
)
from onnx_attnround.graph import in_files, parameters, serialised
from onnx_attnround.graph.scratch import scratch

LARGE = 64 << 20
"""The parameters of a model above which sessions save memory rather than time."""

_FILES_BELOW = "session.model_external_initializers_file_folder_path"
_OPTIMISED_FILE = "session.optimized_model_external_initializers_file_name"
_FATAL = 4
"""The log level of fatal errors: others come as exceptions, and need not be told twice."""
_UNKNOWN_OP = "is not a registered function/op"
"""The words of ONNX Runtime for an operator that it does not know."""
_FUSED = re.compile(r'In Node, \("[^"]*", (QLinear\w+|QGemm|\w*Integer\w*|MatMulNBits),')
ort.set_default_logger_severity(_FATAL)

_CPU: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
_CUDA = (
    "CUDAExecutionProvider",
    {
        "use_tf32": "0",  # float32 as on the CPU
        "cudnn_conv_algo_search": "HEURISTIC",  # the sessions of a walk run a few batches each
        "arena_extend_strategy": "kSameAsRequested",  # PyTorch shares the memory
    },
)
_PROVIDERS = {"cpu": [_CPU], "cuda": [_CUDA, _CPU]}

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""The session option that says how MatMulNBits takes float activations.

By default, at level 4, it rounds them to 8 bits in blocks along the inputs; at level 1 it takes
them as they are.
"""

EXACT_SUMS = "session.x64quantprecision"
"""The session option that has x86-64 CPUs without VNNI add products of 8-bit codes in 32 bits.

Other CPUs do so without it. By default those add them two by two in 16 bits, and cut off what
does not fit.
"""

_exact: ContextVar[bool] = ContextVar("_exact", default=False)
_lean: ContextVar[bool] = ContextVar("_lean", default=False)
_libraries: ContextVar[tuple[str, ...]] = ContextVar("_libraries", default=())


@contextmanager
def custom_ops(libraries: Sequence[str]) -> Iterator[None]:
    """Every session opened within knows the operators of these shared libraries.

    Raises ``ConfigError`` if ONNX Runtime cannot load one.
    """
    options = ort.SessionOptions()
    for library in libraries:
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise ConfigError(
                f"cannot load the custom operator library '{library}': {first_line(error)}; "
                "give a shared library built for this version of ONNX Runtime"
            ) from error
    token = _libraries.set(tuple(libraries))
    try:
        yield
    finally:
        _libraries.reset(token)


@contextmanager
def lean_sessions(lean: bool) -> Iterator[None]:
    """If ``lean``, every session opened within is one as for a large model."""
    token = _lean.set(lean)
    try:
        yield
    finally:
        _lean.reset(token)


@contextmanager
def exact_activations() -> Iterator[None]:
    """Every session opened within takes float activations as they are, also in MatMulNBits."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def open_session(
    model: ir.Model | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    optimised_model: Path | None = None,
    optimise: bool = True,
    signed_activations: bool = False,
    exact_sums: bool = True,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """A session on ``model``; raises ``ModelError`` if ONNX Runtime refuses it.

    ``OutputError`` if there is no room on disk for the weights of a large one,
    ``ConfigError`` if ONNX Runtime cannot use the ``device``, ``cpu`` or ``cuda``.
    ``threads`` bounds the threads inside an op (default: all cores);
    ``optimised_model`` is where ONNX Runtime writes the graph that it runs, with
    ``optimise`` false as it is given. ``signed_activations`` are fused, as they
    are by default on ARM alone. Without ``exact_sums`` products are added as this CPU does by
    default, else as CPUs with VNNI do. ``profile`` is what the name of a file begins with that
    ``end_profiling`` fills.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads or 0
    # Waiting threads that spin cost CPU time that other work on the machine could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _exact.get():
        options.add_session_config_entry(ACCURACY_LEVEL, "1")
    for library in _libraries.get():
        options.register_custom_ops_library(library)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if signed_activations:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    asked = exact_sums and not signed_activations  # whose kernels are exact by themselves
    options.add_session_config_entry(EXACT_SUMS, "1" if asked else "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimised_model is not None:
        options.optimized_model_filepath = str(optimised_model)
    try:
        if isinstance(model, Path):
            return _session(str(model), options, device)
        if _lean.get() or parameters(model) > LARGE:
            return _large_session(model, options, device)
        return _session(b"".join(serialised(model)), options, device)
    except AttnRoundError:
        raise
    except Exception as error:  # protobuf and ONNX Runtime raise a dozen unrelated types here
        why = first_line(error)
        raise ModelError(f"ONNX Runtime cannot load the model: {why}{_remedy(why)}") from error


def _remedy(why: str) -> str:
    """A remedy for some reasons why ONNX Runtime does not load a model."""
    if _UNKNOWN_OP in why:
        return "; name its library as `custom_op_library`"
    if _FUSED.search(why):
        return "; `exclude` that node, or choose another `target`"
    return ""


def _session(
    source: str | bytes, options: ort.SessionOptions, device: str
) -> ort.InferenceSession:
    providers = _PROVIDERS[device]
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except (MissingKernel, Fail):
        # With the option, ONNX Runtime has no operators on signed codes, which are exact
        # without it, and cannot give several readers of one weight its codes without signs.
        if options.get_session_config_entry(EXACT_SUMS) == "0":
            raise
        options.add_session_config_entry(EXACT_SUMS, "0")
        session = ort.InferenceSession(source, options, providers=providers)
    if (wanted := providers[0][0]) not in session.get_providers():  # it falls back in silence
        raise ConfigError(
            f"option `device`: got {device}, and ONNX Runtime {ort.__version__} cannot start its "
            f"{wanted}; install onnxruntime-gpu, with CUDA and cuDNN of the version that it is "
            "built for, or take `device` cpu"
        )
    return session


def _large_session(
    model: ir.Model, options: ort.SessionOptions, device: str
) -> ort.InferenceSession:
    """A session that maps the constants of ``model`` from files, those in memory from a new one.

    That file is deleted at once: what is mapped stays. Nodes run close to those that read
    what they make, and memory is given back, so that not all weights are dequantised at
    a time.
    """
    options.enable_cpu_mem_arena = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if options.optimized_model_filepath:
        name = f"{Path(options.optimized_model_filepath).name}.data"
        options.add_session_config_entry(_OPTIMISED_FILE, name)
    try:
        with scratch(Path(tempfile.gettempdir())) as folder:
            light, root = in_files(model, folder)
            options.add_session_config_entry(_FILES_BELOW, str(root))
            return _session(ir.to_proto(light).SerializeToString(), options, device)
    except OSError as error:
        raise OutputError(
            f"cannot keep weights in a file: {error.strerror or error}; free some disk space, or "
            "set TMPDIR to a larger disk"
        ) from error


def run_on_samples(
    session: ort.InferenceSession, names: Sequence[str], feeds: Mapping[str, Any]
) -> list[Any]:
    """The values ``names`` for a batch of samples, all outputs where there are no names.

    Raises ``CalibrationError`` if ONNX Runtime fails on the samples.
    """
    remedy = ": check that they are what the model expects"
    with told_as(CalibrationError, "ONNX Runtime failed on the calibration samples", remedy):
        return list(session.run(list(names) or None, dict(feeds)))


@contextmanager
def told_as(error: type[AttnRoundError], what: str, remedy: str = "") -> Iterator[None]:
    """While open, a failure of ONNX Runtime becomes ``error``: ``what``, its cause, ``remedy``.

    Not so a lack of memory, for which the command line has a remedy.
    """
    try:
        yield
    except Exception as cause:  # ONNX Runtime raises a dozen unrelated types here
        if type(cause).__name__ == "OutOfMemoryError":  # of torch, which is imported late
            raise
        raise error(f"{what}: {first_line(cause)}{remedy}") from cause


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, without the places in ONNX Runtime's sources."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"/onnxruntime_src/\S+:\d+ [^(\n]*(\([^()\n]*\)( const)? )?", "", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), repr(error))
