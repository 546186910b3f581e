"""Text that identifies a value across processes: no addresses, no hash randomization."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCALARS = (bool, int, float, complex, str, bytes, type(None), types.EllipsisType)


def fingerprint(value: Any) -> str:
    """Describe a value so that two processes agree exactly if the value is the same.

    Numbers and strings are written out; tensors are hashed with their dtype and shape;
    functions are hashed with their bytecode, constants, defaults, closure and the
    globals they read, recursively. Of any other object only the class counts. Bytecode
    depends on the Python version, so a function's text does as well.

    Args:
        value: Anything.

    Returns:
        The description, on one line.

    Example:
        >>> fingerprint({"scale": 2.0, "names": ("a", None)})
        "{'names': ('a', None), 'scale': 2.0}"
        >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
        False
    """
    return _describe(value, frozenset())


def hash_tensor(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and bytes.

    Returns:
        For example ``float32[3, 4]:0123456789abcdef``.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)}:{_digest(flat.numpy().data)}"


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _describe(value: Any, seen: frozenset[int]) -> str:  # noqa: C901  one case a type
    match value:
        case Enum() | type() | types.BuiltinFunctionType() | types.ModuleType():
            return _name(value)
        case np.generic():
            return _describe(value.item(), seen)
        case np.ndarray() if value.dtype != object:
            return hash_tensor(torch.from_numpy(np.ascontiguousarray(value)))
        case Tensor():
            return hash_tensor(value)
        case _ if isinstance(value, _SCALARS):
            return repr(value)
        case torch.dtype() | torch.device():
            return str(value)
    if id(value) in seen:  # a recursive function, or a container that holds itself
        return "..."
    seen |= {id(value)}
    match value:
        case types.FunctionType():
            return f"{value.__qualname__}:{_digest(_function(value, seen).encode())}"
        case types.MethodType():
            return f"{_describe(value.__func__, seen)} of {_name(type(value.__self__))}"
        case types.CodeType():
            return _code(value, seen)
        case functools.partial():
            parts = (value.func, value.args, value.keywords)
            return f"partial{_describe(parts, seen)}"
        case _:
            return _container(value, seen)


def _container(value: Any, seen: frozenset[int]) -> str:
    match value:
        case Mapping():
            items = [
                f"{_describe(key, seen)}: {_describe(entry, seen)}"
                for key, entry in value.items()
            ]
            return f"{{{', '.join(sorted(items))}}}"
        case set() | frozenset():
            return f"{{{', '.join(sorted(_describe(entry, seen) for entry in value))}}}"
        case list() | tuple():
            entries = ", ".join(_describe(entry, seen) for entry in value)
            return f"[{entries}]" if isinstance(value, list) else f"({entries})"
        case _:
            return _name(type(value))


def _name(value: Any) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    return str(getattr(value, "__qualname__", value.__name__))


def _function(function: types.FunctionType, seen: frozenset[int]) -> str:
    parts = [
        _code(function.__code__, seen),
        _describe(function.__defaults__, seen),
        _describe(function.__kwdefaults__, seen),
    ]
    parts += [f"{name}={_describe(entry, seen)}" for name, entry in _captured(function)]
    return "\n".join(parts)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    variables = inspect.getclosurevars(function)
    yield from sorted(variables.nonlocals.items())
    for name, value in sorted(variables.globals.items()):
        # A library's function is identified by its name: its code is not the user's.
        foreign = getattr(value, "__module__", None) != function.__module__
        is_function = isinstance(value, types.FunctionType)
        yield name, value.__qualname__ if is_function and foreign else value


def _code(code: types.CodeType, seen: frozenset[int]) -> str:
    constants = ", ".join(_describe(constant, seen) for constant in code.co_consts)
    return f"{code.co_code.hex()} {code.co_names} ({constants})"
