"""Per-sample gradients of any module's parameters, by running it again on what it got."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FLAT = -1
"""In the place of a dimension: several rows an example, next to each other."""

Leaves = list[Tensor]
Rebuild = Callable[[Leaves], Any]


def flatten(tree: Any) -> tuple[Leaves, Rebuild]:
    """Take the tensors out of tuples, lists and mappings.

    Returns:
        The tensors, and a function that puts others in their places.

    Example:
        >>> leaves, rebuild = flatten({"a": (torch.zeros(2), 3)})
        >>> rebuild([torch.ones(1)])
        {'a': (tensor([1.]), 3)}
    """
    leaves, spec = torch.utils._pytree.tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Leaves) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return torch.utils._pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in places], rebuild


def batch_dims(
    module: nn.Module, args: Any, kwargs: Any, b: int, rows: int = 0
) -> list[int | None]:
    """Find the dimension of the examples in each tensor that a module got.

    Args:
        module: The module.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        b: Number of examples.
        rows: How many rows its outputs have if several are an example's, else 0.

    Returns:
        For each tensor, in :func:`flatten`'s order, the dimension, or ``FLAT``; None where
        all examples share it.
    """
    if isinstance(module, nn.RNNBase):
        first = 0 if module.batch_first else 1
        states = len(flatten((args, kwargs))[0]) - 1
        return [first, *[1] * states]
    if isinstance(module, nn.MultiheadAttention):
        return _attention_dims(module, args, kwargs)
    tensors = flatten((args, kwargs))[0]
    if rows:
        return [FLAT if x.ndim and len(x) == rows else None for x in tensors]
    return [_guess_dim(tensor, b) for tensor in tensors]


def output_dims(module: nn.Module, outputs: Leaves, b: int) -> list[int | None]:
    """Find the dimension of the examples in each tensor that a module returned.

    Returns:
        For each tensor the dimension, or None if there is none; ``FLAT`` where none has
        one, and the examples can have several rows each.
    """
    if isinstance(module, nn.RNNBase):
        return [0 if module.batch_first else 1, *[1] * (len(outputs) - 1)]
    if isinstance(module, nn.MultiheadAttention):
        return [0 if module.batch_first else 1, *[0] * (len(outputs) - 1)]
    dims = [_guess_dim(tensor, b) for tensor in outputs]
    if any(dim is not None for dim in dims):
        return dims
    rows = len(outputs[0]) if outputs and outputs[0].ndim else 0
    if rows <= b or rows % b:
        return dims
    return [FLAT if x.ndim and len(x) == rows else None for x in outputs]


def _attention_dims(
    module: nn.MultiheadAttention, args: Any, kwargs: Any
) -> list[int | None]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    first = 0 if module.batch_first else 1
    known = {"query": first, "key": first, "value": first, "key_padding_mask": 0}
    names = [*list(bound)[: len(args)], *kwargs]
    values = [*args, *kwargs.values()]
    return [
        known.get(name)
        for name, value in zip(names, values, strict=True)
        if isinstance(value, Tensor)
    ]


def _guess_dim(tensor: Tensor, b: int) -> int | None:
    if tensor.ndim > 0 and tensor.shape[0] == b:
        return 0
    return 1 if tensor.ndim > 2 and tensor.shape[1] == b else None


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A call ``module(*args, **kwargs)``, and the gradients of what it returned."""

    inputs: Leaves
    """The tensors in ``(args, kwargs)``."""

    rebuild: Rebuild
    """Puts others in their places."""

    input_dims: list[int | None]
    """Their dimensions of examples."""

    b: int
    """Number of examples."""

    grads: dict[int, Tensor]
    """Gradients of its outputs, by position in :func:`flatten`'s order."""

    grad_dims: dict[int, int]
    """The dimensions of examples of its outputs, by position."""

    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    """Makes the autocast state of the call."""

    def gradients(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        rows: slice,
        *,
        loops: bool,
    ) -> dict[str, Tensor]:
        """Differentiate the outputs by parameters, for some examples each by itself.

        Args:
            module: The module.
            parameters: What to differentiate by, by the module's own names.
            rows: Which examples.
            loops: Whether to run them one by one; else ``vmap`` does.

        Returns:
            Gradients by the module's own names. Shapes ``(k, *shape)``.
        """
        places = list(self.grads)

        def outputs(
            values: Mapping[str, Tensor], tensors: Leaves
        ) -> tuple[Tensor, ...]:
            args, kwargs = self.rebuild(tensors)
            made = torch.func.functional_call(module, dict(values), args, kwargs)
            leaves = flatten(made)[0]
            return tuple(leaves[place] for place in places)

        form = _looped if loops else _vectorised
        dims = [self.grad_dims[place] for place in places]
        plain = {name: value.detach() for name, value in parameters.items()}
        with self.autocast():
            return form(
                outputs,
                plain,
                [
                    x if dim is None else _rows_of(x, dim, rows, self.b)
                    for x, dim in zip(self.inputs, self.input_dims, strict=True)
                ],
                self.input_dims,
                [
                    _rows_of(g, dim, rows, self.b)
                    for g, dim in zip(self.grads.values(), dims, strict=True)
                ],
                dims,
            )


def _rows_of(tensor: Tensor, dim: int, rows: slice, b: int) -> Tensor:
    """Take some examples; of several rows each in a dimension of their own."""
    if dim == FLAT:
        dim, tensor = 0, tensor.reshape(b, len(tensor) // b, *tensor.shape[1:])
    return tensor.narrow(dim, rows.start, rows.stop - rows.start)


def _vectorised(
    outputs: Callable[[Mapping[str, Tensor], Leaves], tuple[Tensor, ...]],
    parameters: dict[str, Tensor],
    tensors: Leaves,
    dims: list[int | None],
    grads: Leaves,
    grad_dims: list[int],
) -> dict[str, Tensor]:
    def one(tensors: Leaves, grads: Leaves) -> dict[str, Tensor]:
        tensors = [
            x if dim is None or dim == FLAT else x.unsqueeze(dim)
            for x, dim in zip(tensors, dims, strict=True)
        ]
        grads = [
            g if dim == FLAT else g.unsqueeze(dim)
            for g, dim in zip(grads, grad_dims, strict=True)
        ]
        _, pull, *_ = torch.func.vjp(
            lambda values: outputs(values, tensors), parameters
        )
        pulled: dict[str, Tensor] = pull(tuple(grads))[0]
        return pulled

    places = [0 if dim == FLAT else dim for dim in dims]
    grad_places = [max(dim, 0) for dim in grad_dims]
    vectorised = torch.func.vmap(
        one, in_dims=(places, grad_places), randomness="different"
    )
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # The fused kernels of attention are run example by example under vmap; those of
        # experts too, but they have no other form.
        warnings.filterwarnings("ignore", "There is a performance drop")
        made: dict[str, Tensor] = vectorised(tensors, grads)
    return made


def _looped(
    outputs: Callable[[Mapping[str, Tensor], Leaves], tuple[Tensor, ...]],
    parameters: dict[str, Tensor],
    tensors: Leaves,
    dims: list[int | None],
    grads: Leaves,
    grad_dims: list[int],
) -> dict[str, Tensor]:
    b = grads[0].shape[max(grad_dims[0], 0)]
    made = {name: x.new_zeros(b, *x.shape) for name, x in parameters.items()}
    for i in range(b):
        leaves = {name: x.clone().requires_grad_() for name, x in parameters.items()}
        row = [
            x if dim is None else _row(x, dim, i)
            for x, dim in zip(tensors, dims, strict=True)
        ]
        along = [_row(g, dim, i) for g, dim in zip(grads, grad_dims, strict=True)]
        with torch.enable_grad():
            found = outputs(leaves, row)
        pulled = torch.autograd.grad(
            found, [*leaves.values()], along, allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(leaves, pulled, strict=True):
            made[name][i] = grad
    return made


def _row(tensor: Tensor, dim: int, i: int) -> Tensor:
    return tensor[i] if dim == FLAT else tensor.narrow(dim, i, 1)
