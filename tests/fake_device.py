"""A device of torch in name alone, ``far``: its tensors mix with none on the CPU, as on a GPU.

What runs there keeps all its tensors on one device, or fails, and is computed by the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from onnx_attnround.runtime import device

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    reason = f"torch {torch.__version__} takes no device that is written in Python"
    pytest.skip(reason, allow_module_level=True)

NAME = "far"
_MOVES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._local_scalar_dense.default,
}


class Far(torch.Tensor):
    """A tensor on the device; ``near`` is what it stands for."""

    near: torch.Tensor
    operators = 0
    """How many have run there."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        """``near`` as it is called on the device."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )
        made.near = near
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on what the tensors stand for."""
    to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    Far.operators += 1
    known: dict[int, Far] = {}  # for an operator in place

    def near(value: Any) -> Any:
        if isinstance(value, Far):
            known[id(value.near)] = value
            return value.near
        if isinstance(value, torch.Tensor) and value.ndim and func not in _MOVES:
            raise RuntimeError(f"{func}: tensors on two devices, {NAME} and cpu")
        return type(value)(map(near, value)) if isinstance(value, list | tuple) else value

    def far(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return known[id(value)] if id(value) in known else Far(value)
        return type(value)(map(far, value)) if isinstance(value, list | tuple) else value

    given = {name: near(value) for name, value in kwargs.items()}
    made = func(*map(near, args), **(given | {"device": "cpu"} if to else given))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if to == "cpu" or (func in _MOVES and to is None and not isinstance(args[0], Far)):
        return made
    return far(made)


def _register() -> torch.library.Library:
    """Make the device known to torch: before the first backward pass, which looks for devices."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    return library


_LIBRARY = _register()  # which knows the operators for as long as it lives
DEVICE = torch.device(NAME, 0)


def run_on_far(
    run_on: Callable[..., list[device.Value]],
) -> Callable[..., list[device.Value]]:
    """``run_on`` with ONNX Runtime on the CPU in place of the device."""

    def run(
        where: torch.device, session: Any, names: Sequence[str], feeds: Mapping[str, device.Value]
    ) -> list[device.Value]:
        if where.type == "cpu":
            return run_on(where, session, names, feeds)
        near = {name: value.near for name, value in feeds.items() if isinstance(value, Far)}
        if len(near) < len(feeds):
            raise RuntimeError(f"fed from the CPU: {feeds.keys() - near.keys()}")
        made = run_on(device.CPU, session, names, near)
        return [Far(value) for value in made if isinstance(value, torch.Tensor)]

    return run
