"""Files out: each appears complete, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir as ir

from onnx_attnround.errors import OutputError
from onnx_attnround.graph.editing import in_memory
from onnx_attnround.scratch import scratch

INLINE_LIMIT = 1_800_000_000
"""Bytes of constants above which they go to a file of their own (protobuf ends at 2 GiB)."""


def save(model: ir.Model, path: Path, *, source: Path | None = None) -> None:
    """Write ``model`` to ``path``, where it appears complete or not at all.

    Above ``INLINE_LIMIT`` the weights go to ``<path>.data`` beside it, which is
    put in place just before the model. The same model gives the same bytes.

    Raises:
        OutputError: ``path`` cannot be written, or is the file ``source`` that
            the model came from; nothing is left behind.
    """
    check_output(path, source)
    with _staged(path) as folder:
        if fits_inline(model):
            data = ir.to_proto(in_memory(model)).SerializeToString(deterministic=True)
            (folder / path.name).write_bytes(data)
            return
        weights = f"{path.name}.data"
        if any(_same_file(Path(file), path.parent / weights) for file in _external_files(model)):
            raise OutputError(
                f"cannot write '{path}': its weights would overwrite '{weights}', which the "
                "input model reads; choose another output name"
            )
        ir.save(model, folder / path.name, format="protobuf", external_data=weights)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, where it appears complete or not at all.

    Raises:
        OutputError: ``path`` cannot be written; nothing is left behind.
    """
    check_output(path)
    with _staged(path) as folder:
        (folder / path.name).write_bytes(data)


def check_output(path: Path, source: Path | None = None) -> None:
    """Raise ``OutputError`` if ``path`` cannot be written or is the same file as ``source``."""
    if source is not None and _same_file(path, source):
        raise OutputError(f"output '{path}' is the input model itself; choose another output file")
    if path.is_dir():
        raise OutputError(f"output '{path}' is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"output '{path}' is not a regular file; choose another output file")
    if not path.parent.is_dir():
        raise OutputError(f"folder '{path.parent}' of the output does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"folder '{path.parent}' is not writable; choose another output folder")


def fits_inline(model: ir.Model) -> bool:
    """Whether the constants of the model fit into one protobuf file."""
    in_graphs = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    in_nodes = sum(
        attribute.as_tensor().nbytes
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    )
    return in_graphs + in_nodes <= INLINE_LIMIT


def _external_files(model: ir.Model) -> set[str]:
    return {
        value.const_value.path
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return False


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` whose files move there at the end, ``path`` itself last.

    Files are flushed to disk before they move; the folder vanishes in any case.
    """
    try:
        with scratch(path.parent) as folder:
            yield folder
            files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
            for file in files:
                _sync(file)
            for file in files:
                file.replace(path.parent / file.name)
            with suppress(OSError):  # not every system can flush a folder
                _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}; free some space or choose "
            "another folder"
        ) from error


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
