"""Cut a block out of an ONNX graph and evaluate it with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import is_standard
from onnx_attnround.shadow.common import Inputs, Op, to_torch
from onnx_attnround.shadow.table import HOST_INPUTS, OPS

Hook = Callable[[str, Tensor], Tensor]
_OLDEST_OPSET = 7
_SKIP = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One node, ready to run; ``drop`` are the values that nobody needs after it."""

    label: str
    op: Op
    attributes: Mapping[str, Any]
    opset: int
    host: frozenset[int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    drop: tuple[str, ...]

    def run(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        arguments = self._on_one_device([values[n] if n else None for n in self.inputs])
        try:
            result = self.op(self.attributes, arguments, self.opset)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ModelError, RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise ModelError(f"{self.label}: {_line(error)}; leave it out of the block") from error
        found = result if isinstance(result, tuple) else (result,)
        if any(self.outputs[len(found) :]):
            raise ModelError(
                f"{self.label}: only {len(found)} of {len(self.outputs)} outputs can be computed; "
                "leave it out of the block"
            )
        return found

    def _on_one_device(self, arguments: list[Tensor | None]) -> Inputs:
        data = {i: t for i, t in enumerate(arguments) if t is not None and i not in self.host}
        device = next((t.device for t in data.values() if t.device.type != "cpu"), None)
        if device is None:
            return cast(Inputs, arguments)  # None only where an op calls optional()
        moved = [data[i].to(device) if i in data else t for i, t in enumerate(arguments)]
        return cast(Inputs, moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A block of an ONNX graph as a torch callable, differentiable wherever torch is.

    ``constants`` holds the initialisers (and Constant nodes) that the block
    reads, by value name, in their ONNX shapes and types; tensors of shape
    arithmetic (integers of rank 0 or 1) stay on the CPU, all others are on
    ``device``.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    device: torch.device
    steps: tuple[_Step, ...]

    def __call__(
        self,
        feeds: Mapping[str, Tensor],
        overrides: Mapping[str, Tensor] | None = None,
        hook: Hook | None = None,
    ) -> dict[str, Tensor]:
        """The block's outputs by name, for ``feeds`` in the shapes of the ONNX values.

        ``overrides`` replaces constants by name with tensors of the same shape,
        which may require grad. ``hook(name, tensor)`` sees every computed value
        (not feeds, not constants) and returns what the graph goes on with.
        Raises ``ModelError`` on a missing feed, an override that names no
        constant or has another shape, and a node that cannot be computed.
        """
        values = {**self.constants, **self._overrides(overrides or {}), **self._feeds(feeds)}
        for step in self.steps:
            for name, value in zip(step.outputs, step.run(values), strict=False):
                if name:
                    values[name] = hook(name, value) if hook else value
            for name in step.drop:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _feeds(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ModelError(
                f"block input '{missing[0]}' is missing: got {sorted(feeds)}; "
                f"feed {list(self.inputs)}"
            )
        return {name: _place(feeds[name], self.device) for name in self.inputs}

    def _overrides(self, overrides: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name, value in overrides.items():
            if name not in self.constants:
                raise ModelError(
                    f"override '{name}' is no constant of the block; "
                    f"use one of {sorted(self.constants)}"
                )
            if value.shape != self.constants[name].shape:
                raise ModelError(
                    f"override '{name}' has shape {list(value.shape)}, expected "
                    f"{list(self.constants[name].shape)}; reshape it"
                )
        return overrides


def unsupported(nodes: Iterable[ir.Node]) -> list[str]:
    """The op types among ``nodes`` that have no torch forward, sorted, once each.

    An op outside the default ONNX domain is named ``domain::op``.
    """
    return sorted({_op_name(node) for node in nodes if not _has_forward(node)})


def build_shadow(
    model: ir.Model | ir.Graph,
    inputs: Sequence[str],
    outputs: Sequence[str],
    device: str | torch.device = "cpu",
) -> Shadow:
    """The nodes between the values ``inputs`` and ``outputs`` as a :class:`Shadow`.

    Raises ``ModelError`` if a name is unknown, an output depends on a graph
    input that is not in ``inputs``, an op has no torch forward, a constant has
    an element type that torch lacks, or the opset is older than 7.
    """
    graph = model.graph if isinstance(model, ir.Model) else model
    nodes, constants = _block(graph, inputs, outputs)
    opset = _opset(graph)
    where = torch.device(device)
    return Shadow(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants={name: _place(_constant(v), where) for name, v in constants.items()},
        device=where,
        steps=_steps(nodes, opset, frozenset(inputs), {*outputs, *constants}),
    )


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    shape_like = tensor.dtype == torch.int64 and tensor.ndim <= 1
    return tensor.to("cpu" if shape_like else device)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _label(node: ir.Node) -> str:
    return f"node '{node.name or node.outputs[0].name}' ({_op_name(node)})"


def _has_forward(node: ir.Node) -> bool:
    return is_standard(node) and node.op_type in OPS


def _opset(graph: ir.Graph) -> int:
    version = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
    if version < _OLDEST_OPSET:
        raise ModelError(
            f"model has opset {version}, expected {_OLDEST_OPSET} or newer; "
            "convert it with onnx.version_converter"
        )
    return version


def _named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    computed = (value for node in graph for value in node.outputs)
    found = (*graph.inputs, *graph.initializers.values(), *computed)
    return {value.name: value for value in found if value.name}


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() if node is None else _op_name(node) == "Constant"


def _block(
    graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """The nodes that ``outputs`` need, in order, and the constants that they read."""
    known = _named_values(graph)
    for name in (*inputs, *outputs):
        if name not in known:
            raise ModelError(f"value '{name}' is not in the graph; name a node output or an input")
    needed: set[ir.Node] = set()
    constants: dict[str, ir.Value] = {}
    seen, stack = set(inputs), [known[name] for name in outputs]
    while stack:
        value = stack.pop()
        name, node = str(value.name), value.producer()
        if name in seen:
            continue
        seen.add(name)
        if _is_constant(value):
            constants[name] = value
        elif node is None:
            raise ModelError(
                f"block outputs {list(outputs)} depend on graph input '{name}', got inputs "
                f"{list(inputs)}; add it to them"
            )
        elif node not in needed:
            needed.add(node)
            stack.extend(v for v in node.inputs if v is not None and v.name)
    return [node for node in graph if node in needed], constants


def _attributes(node: ir.Node) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        is_tensor = attribute.type == ir.AttributeType.TENSOR
        values[name] = to_torch(attribute.value) if is_tensor else attribute.value
    return {**values, "num_outputs": len(node.outputs)}


def _constant(value: ir.Value) -> Tensor:
    node = value.producer()
    try:
        if node is not None:
            return OPS["Constant"](_attributes(node), (), 0)  # type: ignore[return-value]
        if value.const_value is None:
            raise ModelError("it has no data")
        return to_torch(value.const_value)
    except ModelError as error:
        raise ModelError(f"constant '{value.name}': {error}; leave it out of the block") from error


def _steps(
    nodes: Sequence[ir.Node], opset: int, fed: frozenset[str], kept: Iterable[str]
) -> tuple[_Step, ...]:
    for node in nodes:
        if not _has_forward(node):
            raise ModelError(f"{_label(node)} has no torch forward; leave it out of the block")
    alive = set(kept)
    steps: list[_Step] = []
    for node in reversed(nodes):
        step = _step(node, opset, fed, alive)
        alive.update(step.drop)
        steps.append(step)
    return tuple(reversed(steps))


def _step(node: ir.Node, opset: int, fed: frozenset[str], alive: set[str]) -> _Step:
    inputs = tuple(str(value.name) if value and value.name else _SKIP for value in node.inputs)
    names = (value.name or _SKIP for value in node.outputs)
    outputs = tuple(_SKIP if name in fed else name for name in names)
    try:
        attributes = _attributes(node)
    except ModelError as error:
        raise ModelError(f"{_label(node)}: {error}; leave it out of the block") from error
    return _Step(
        label=_label(node),
        op=OPS[node.op_type],
        attributes=attributes,
        opset=opset,
        host=HOST_INPUTS.get(node.op_type, frozenset()),
        inputs=inputs,
        outputs=outputs,
        drop=tuple({name for name in (*inputs, *outputs) if name and name not in alive}),
    )
