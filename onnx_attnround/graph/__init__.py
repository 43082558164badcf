"""ONNX files in and out: load, check, save, and the few edits every stage needs.

A model in memory is an ``onnx_ir.Model``. Weights in external data files stay
there, and are mapped for as long as somebody looks at their values. No function changes the
model that it is given, but for ``name_nodes`` and the target of
``copy_signature``.
"""

from __future__ import annotations

from onnx_attnround.graph.choices import (
    choices,
    draws,
    is_discrete,
    parted_choices,
    reads_of,
    take_choices,
)
from onnx_attnround.graph.constants import in_files
from onnx_attnround.graph.digest import digest_of, model_digest
from onnx_attnround.graph.editing import (
    attributes_of,
    copy_signature,
    forget_shapes,
    in_memory,
    input_specs,
    is_read_once,
    is_standard,
    name_nodes,
    only_reader,
    reason,
    tensor_value,
    through_proto,
    with_outputs,
)
from onnx_attnround.graph.loading import from_proto, load
from onnx_attnround.graph.opset import least_ir_version, raise_opset
from onnx_attnround.graph.saving import (
    check_output,
    fits_inline,
    parameters,
    save,
    serialised,
    write_atomic,
)
from onnx_attnround.graph.shares import outputs_of_shares

__all__ = [
    "attributes_of",
    "check_output",
    "choices",
    "copy_signature",
    "digest_of",
    "draws",
    "fits_inline",
    "forget_shapes",
    "from_proto",
    "in_files",
    "in_memory",
    "input_specs",
    "is_discrete",
    "is_read_once",
    "is_standard",
    "least_ir_version",
    "load",
    "model_digest",
    "name_nodes",
    "only_reader",
    "outputs_of_shares",
    "parameters",
    "parted_choices",
    "raise_opset",
    "reads_of",
    "reason",
    "save",
    "serialised",
    "take_choices",
    "tensor_value",
    "through_proto",
    "with_outputs",
    "write_atomic",
]
