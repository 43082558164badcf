"""Files out: each appears complete, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_attnround.errors import ModelError, OutputError
from onnx_attnround.graph.constants import constants, held
from onnx_attnround.graph.digest import model_digest
from onnx_attnround.graph.loading import parse
from onnx_attnround.graph.scratch import scratch

INLINE_LIMIT = 1_800_000_000
"""Bytes of constants above which they go to a file of their own (protobuf ends at 2 GiB)."""


def save(model: ir.Model, path: Path, *, source: Path | None = None) -> None:
    """Write ``model`` to ``path``, where it appears complete or not at all.

    Above ``INLINE_LIMIT`` the weights go to ``<path>.<hash>.data`` beside it, in place
    before the model is. So an older output has its own until the new one is there; then
    they are removed. The same model gives the same bytes.

    Raises:
        OutputError: ``path`` cannot be written, or is the file ``source`` that
            the model came from; nothing is left behind.
    """
    check_output(path, source)
    weights = None if fits_inline(model) else f"{path.name}.{model_digest(model)[:12]}.data"
    superseded = _data_of(path, source) - {weights}
    with _staged(path) as folder:
        if weights is None:
            with (folder / path.name).open("wb") as file:
                file.writelines(serialised(model))
        else:
            ir.save(model, folder / path.name, format="protobuf", external_data=weights)
    for name in superseded:
        with suppress(OSError):
            (path.parent / name).unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, where it appears complete or not at all.

    Raises:
        OutputError: ``path`` cannot be written; nothing is left behind.
    """
    check_output(path)
    with _staged(path) as folder:
        (folder / path.name).write_bytes(data)


def check_output(path: Path, source: Path | None = None) -> None:
    """Raise ``OutputError`` if ``path`` cannot be written or is a file of the model ``source``."""
    if source is not None and _same_file(path, source):
        raise OutputError(f"output '{path}' is the input model itself; choose another output file")
    if source is not None and path.exists() and _is_data_of(path, source):
        raise OutputError(
            f"output '{path}' holds weights of the input model; choose another output file"
        )
    if path.is_dir():
        raise OutputError(f"output '{path}' is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"output '{path}' is not a regular file; choose another output file")
    if not path.parent.is_dir():
        raise OutputError(f"folder '{path.parent}' of the output does not exist; create it first")
    try:
        with scratch(path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"folder '{path.parent}' is not writable: {error.strerror or error}; choose another "
            "output folder"
        ) from error


def serialised(model: ir.Model) -> Iterator[bytes]:
    """The model as one protobuf message, in pieces: the values of one constant at a time.

    The initializers come last in the graph, which is as good an order of the fields as any;
    those of the model are in theirs, without which OpenVINO does not know some models. The
    length of the graph has to be known before, so that each is serialised twice.
    """
    light, values = model.clone(), list(model.graph.initializers.values())
    stopgap = ir.tensor([0])  # in the place of each
    for value in light.graph.initializers.values():
        value.const_value = stopgap
    for value, tensor in constants(light):  # those of subgraphs stay where they are
        value.const_value = held(tensor)
    proto = ir.to_proto(light)
    del proto.graph.initializer[:]
    _drop_told(proto.graph, {value.name for value in values})
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    yield _fields(proto, later=False)
    length = len(graph) + sum(len(_initializer(value)) for value in values)
    yield _varint(onnx.ModelProto.GRAPH_FIELD_NUMBER << 3 | 2) + _varint(length)
    yield graph
    yield from map(_initializer, values)
    yield _fields(proto, later=True)


def _drop_told(proto: onnx.GraphProto, names: Collection[str | None]) -> None:
    """Leave out the types and shapes of the initializers ``names``: the tensors tell them."""
    kept = [
        info
        for info in proto.value_info
        if info.name not in names or info.doc_string or info.metadata_props
    ]
    del proto.value_info[:]
    proto.value_info.extend(kept)


def _fields(proto: onnx.ModelProto, *, later: bool) -> bytes:
    """The fields of a model behind its graph, or those before it."""
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    for field, _ in proto.ListFields():
        if (field.number > onnx.ModelProto.GRAPH_FIELD_NUMBER) != later:
            part.ClearField(field.name)
    data: bytes = part.SerializeToString(deterministic=True)
    return data


def _initializer(value: ir.Value) -> bytes:
    """One constant as a field of the message of its graph."""
    graph = onnx.GraphProto()
    if value.const_value is not None:
        field = graph.initializer.add()
        ir.serde.serialize_tensor_into(field, held(value.const_value))
        field.name = value.name
    data: bytes = graph.SerializeToString(deterministic=True)
    return data


def _varint(number: int) -> bytes:
    """A number as protobuf has it: seven bits a byte, the low ones first."""
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


def fits_inline(model: ir.Model, without: Collection[str] = ()) -> bool:
    """Whether the constants of the model, but for those ``without``, fit into one message."""
    tensors = (model.graph.initializers[name].const_value for name in without)
    left_out = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    in_graphs = sum(tensor.nbytes for _, tensor in constants(model))
    in_nodes = sum(
        attribute.as_tensor().nbytes
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    )
    return in_graphs + in_nodes - left_out <= INLINE_LIMIT


def parameters(model: ir.Model) -> int:
    """The number of elements of all initializers."""
    return sum(tensor.size for _, tensor in constants(model))


def _data_of(path: Path, source: Path | None) -> set[str]:
    """Files of weights, as ``save`` names them, that the model at ``path`` alone refers to."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    named = {file.name for file in path.parent.iterdir() if pattern.fullmatch(file.name)}
    return {
        name
        for name in named
        if _mentions(path, name) and not (source is not None and _mentions(source, name))
    }


def _is_data_of(path: Path, source: Path) -> bool:
    """Whether ``path`` is an external data file of the model ``source``."""
    if not _mentions(source, path.name):
        return False
    try:
        tensors = parse(source).graph.initializer
    except ModelError:  # which is told when it is loaded
        return False
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    locations = {entry.value for entry in entries if entry.key == "location"}
    return any(_same_file(path, source.parent / location) for location in locations)


def _mentions(file: Path, name: str) -> bool:
    """Whether ``name`` is among the bytes of ``file``, which are mapped: it may be large."""
    try:
        with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as mapped:
            return mapped.find(name.encode()) >= 0
    except (OSError, ValueError):  # there is none, or it is empty
        return False


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
            _move(files, path.parent)
            with suppress(OSError):  # not every system can flush a folder
                _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}; free some space or choose "
            "another folder"
        ) from error


def _move(files: Sequence[Path], folder: Path) -> None:
    """Move the files to ``folder``; if that fails before the last is there, none is."""
    new = [target for file in files if not (target := folder / file.name).exists()]
    try:
        for file in files:
            file.replace(folder / file.name)
    except BaseException:
        if files[-1].exists():
            for target in new:
                target.unlink(missing_ok=True)
        raise


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
