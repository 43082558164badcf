"""ONNX models in, from files or memory: what is read has been checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnx_attnround.errors import ModelError
from onnx_attnround.graph.constants import FileTensor, constants
from onnx_attnround.graph.editing import name_nodes, reason
from onnx_attnround.graph.forgiven import is_external, presentable, put_right, tensors

_ORT_FORMAT = b"ORTM"
"""The identifier of ONNX Runtime's own format, in bytes 4 to 8 of a FlatBuffer."""


def load(path: Path) -> ir.Model:
    """The checked model in ``path``, every node with a unique name.

    Raises:
        ModelError: the file or its external data is missing, unreadable,
            truncated or outside the model's folder, or is not valid ONNX.
    """
    proto = parse(path)
    for external in filter(is_external, tensors(proto)):
        _check_external(external, path)
    model = _checked(proto, f"'{path}'", path)
    _map_files(model, path.parent.resolve())
    name_nodes(model)
    return model


def from_proto(proto: onnx.ModelProto | bytes) -> ir.Model:
    """The checked model of a message or its bytes, every node with a unique name.

    ``proto`` stays as it is. Raises ``ModelError`` if it is not valid ONNX, or if its
    weights lie in other files, whose place only a path would tell.
    """
    copy = onnx.ModelProto()
    try:
        copy.MergeFromString(proto if isinstance(proto, bytes) else proto.SerializeToString())
    except DecodeError as error:
        raise ModelError(
            f"{len(proto)} bytes are not an ONNX model; give those of a whole .onnx file"
            if isinstance(proto, bytes)
            else f"the model cannot be copied: {reason(error)}; give the path of its file"
        ) from error
    _check_graph(copy, "the model")
    for external in filter(is_external, tensors(copy)):
        raise ModelError(
            f"tensor '{external.name}' of the model lies in another file; give the path of the "
            "model, or load it with its external data"
        )
    model = _checked(copy, "the model", None)
    name_nodes(model)
    return model


def _checked(proto: onnx.ModelProto, label: str, path: Path | None) -> ir.Model:
    """The model of ``proto``, which may be rewritten; raises ``ModelError``."""
    try:
        _check(proto, path)
        model = ir.from_proto(proto)
        for tensor in _inline_tensors(model):
            _check_size(tensor)
    except (onnx.checker.ValidationError, ir.serde.SerdeError, ValueError) as error:
        raise ModelError(
            f"{label} is not a valid ONNX model: {reason(error)}; export it again"
        ) from error
    return model


def _map_files(model: ir.Model, folder: Path) -> None:
    """Let constants in other files be read from there, wherever the process stands.

    What ``_check_external`` let pass is read where its links end: onnx-ir follows none that
    leaves the folder.
    """

    def mapped(tensor: ir.ExternalTensor) -> FileTensor:
        file = (folder / tensor.location).resolve()
        return FileTensor.of(tensor, file.parent, file.name)

    for value, tensor in constants(model):
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = mapped(tensor)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
                continue
            if isinstance(tensor := attribute.as_tensor(), ir.ExternalTensor):
                node.attributes.add(ir.AttrTensor(attribute.name, mapped(tensor)))


def parse(path: Path) -> onnx.ModelProto:
    """The model in ``path`` as it is, without its external data; raises ``ModelError``."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"model '{path}' {what}; give the path of an ONNX file")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(
            f"cannot read model '{path}': {error.strerror}; check its permissions"
        ) from error
    except (DecodeError, UnicodeDecodeError) as error:  # the latter from protobuf in pure Python
        raise ModelError(_not_onnx(path)) from error
    _check_graph(proto, f"'{path}'")
    return proto


def _check_graph(proto: onnx.ModelProto, label: str) -> None:
    """Raise ``ModelError`` for a message without a graph, or with what is not supported."""
    if not proto.HasField("graph"):
        raise ModelError(f"{label} holds no graph, so it is not a model; export it again")
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(
            f"sparse initializer '{name}' of {label} is not supported; store it as dense tensor"
        )


def _not_onnx(path: Path) -> str:
    """What is wrong with a file that is no protobuf message."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[4:] == _ORT_FORMAT:
        return (
            f"'{path}' is in ONNX Runtime's own format (.ort), which holds no model to quantise; "
            "give the ONNX file that it was made from"
        )
    return f"'{path}' is not an ONNX file, or is truncated; download or export it again"


def _check(proto: onnx.ModelProto, path: Path | None) -> None:
    """The check of onnx, but for what runtimes forgive; ``proto`` may be rewritten.

    Without anything of that kind the file in ``path`` is checked, whatever its size.
    """
    rewritten = put_right(proto)
    with presentable(proto) as hides:
        onnx.checker.check_model(proto if rewritten or hides or path is None else str(path))


def _inline_tensors(model: ir.Model) -> Iterator[ir.TensorProtoTensor]:
    """The constants that lie in the file itself."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    constants = [value.const_value for value in values]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                constants.append(attribute.as_tensor())
    yield from (tensor for tensor in constants if isinstance(tensor, ir.TensorProtoTensor))


def _check_size(tensor: ir.TensorProtoTensor) -> None:
    """Raise ``ValueError`` if there is more data than the shape says, which onnx lets pass."""
    raw = tensor.raw
    if isinstance(raw, onnx.TensorProto) and not raw.HasField("raw_data"):
        tensor.numpy()  # says so itself
    elif isinstance(raw, onnx.TensorProto) and len(raw.raw_data) != tensor.nbytes:
        raise ValueError(
            f"tensor '{tensor.name}' has {len(raw.raw_data)} bytes of data, expected "
            f"{tensor.nbytes} for shape {list(tensor.shape)}"
        )


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Raise ``ModelError`` unless the tensor's data lie in a file below the model's folder.

    A link may lead below the folder of the file that the model is a link to, as download
    caches have it; ONNX Runtime follows the same links and no others.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    file = folder / location
    where = f"external data '{location}' of tensor '{tensor.name}' in '{path}'"
    inside = any(file.resolve().is_relative_to(each) for each in (folder, path.resolve().parent))
    if not location or Path(location).is_absolute() or not inside:
        raise ModelError(f"{where} is outside the model's folder; put the file beside the model")
    if not file.is_file():
        raise ModelError(f"{where} does not exist; put the file beside the model")
    status = file.stat()
    if status.st_nlink > 1:
        raise ModelError(
            f"{where} has {status.st_nlink} hard links, which onnx refuses to read; copy the file"
        )
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError as error:
        raise ModelError(
            f"'{path}' is not a valid ONNX model: {where}: {error}; export it again"
        ) from error
    if status.st_size < end:
        raise ModelError(
            f"{where} has {status.st_size} bytes, expected at least {end}; "
            "download or export it again"
        )
