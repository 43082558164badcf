"""ONNX files in: what is read has been checked."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnx_attnround.errors import ModelError
from onnx_attnround.graph.constants import FileTensor
from onnx_attnround.graph.editing import name_nodes, reason


def load(path: Path) -> ir.Model:
    """The checked model in ``path``, every node with a unique name.

    Raises:
        ModelError: the file or its external data is missing, unreadable,
            truncated or outside the model's folder, or is not valid ONNX.
    """
    proto = parse(path)
    try:
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_external(tensor, path)
        _check(proto, path)
        model = ir.from_proto(proto)
        for tensor in _inline_tensors(model):
            _check_size(tensor)
    except (onnx.checker.ValidationError, ir.serde.SerdeError, ValueError) as error:
        raise ModelError(
            f"'{path}' is not a valid ONNX model: {reason(error)}; export it again"
        ) from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = FileTensor.of(value.const_value, path.parent.resolve())
    name_nodes(model)
    return model


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
        raise ModelError(
            f"'{path}' is not an ONNX file, or is truncated; download or export it again"
        ) from error
    if not proto.HasField("graph"):
        raise ModelError(f"'{path}' holds no graph, so it is not a model; export it again")
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(
            f"sparse initializer '{name}' of '{path}' is not supported; store it as dense tensor"
        )
    return proto


def _check(proto: onnx.ModelProto, path: Path) -> None:
    """The check of onnx, but for two faults of exporters and converters that runtimes forgive.

    Some inputs and outputs may have no shape (which need one, ``input_specs`` says), and
    nodes may stand before those whose outputs they read: ``proto`` then gets them in order.
    """
    ends = (*proto.graph.input, *proto.graph.output)
    tensors = [end.type.tensor_type for end in ends if end.type.HasField("tensor_type")]
    shapeless = [tensor for tensor in tensors if not tensor.HasField("shape")]
    external = any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer
    )
    if external or not (_put_in_order(proto.graph) or shapeless):
        onnx.checker.check_model(str(path))
        return
    for tensor in shapeless:
        tensor.shape.SetInParent()
    onnx.checker.check_model(proto)
    for tensor in shapeless:
        tensor.ClearField("shape")


def _put_in_order(graph: onnx.GraphProto) -> bool:
    """Move nodes behind those whose outputs they read; whether that was needed and can be."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    read = {
        i: {maker[name] for name in _reads(node) if name in maker}
        for i, node in enumerate(graph.node)
    }
    if all(max(makers, default=-1) < i for i, makers in read.items()):
        return False
    try:
        order = list(TopologicalSorter(read).static_order())
    except CycleError:
        return False
    nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What the node reads, and what the nodes in its subgraphs do."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


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
    """Raise ``ModelError`` unless the tensor's data lie in a file below the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    file = folder / location
    where = f"external data '{location}' of tensor '{tensor.name}' in '{path}'"
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
        raise ModelError(f"{where} is outside the model's folder; put the file beside the model")
    if not file.is_file():
        raise ModelError(f"{where} does not exist; put the file beside the model")
    status = file.stat()
    if status.st_nlink > 1:
        raise ModelError(
            f"{where} has {status.st_nlink} hard links, which onnx refuses to read; copy the file"
        )
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if status.st_size < end:
        raise ModelError(
            f"{where} has {status.st_size} bytes, expected at least {end}; "
            "download or export it again"
        )
