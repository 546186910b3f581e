"""Which parameters are differentiated, and what identifies a set of weights."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from trak._names import canonical_names
from trak._types import Gradients, GradWrt, Weights
from trak.errors import BatchError, GradientError, OptionError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Selection:
    """The parameters that are differentiated, in the model's order."""

    names: tuple[str, ...]
    """Names as ``model.named_parameters()`` gives them; a tied parameter's first name."""

    shapes: tuple[tuple[int, ...], ...]
    """Their shapes."""

    canonical: tuple[tuple[str, str], ...] = ()
    """Names with prefixes of wrappers, each with what it is without."""

    @property
    def identities(self) -> dict[str, str]:
        """What each name is in the store: the same for a model and for wrapped ones."""
        return {
            **dict(zip(self.names, self.names, strict=True)),
            **dict(self.canonical),
        }

    @property
    def grad_dim(self) -> int:
        """Number of gradient entries, ``d``."""
        return sum(math.prod(shape) for shape in self.shapes)

    def fingerprint(self) -> str:
        """Hash the names and shapes, for the store's manifest."""
        listing = "\n".join(
            f"{name} {list(shape)}"
            for name, shape in zip(self.identities.values(), self.shapes, strict=True)
        )
        return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut ``(b, d)`` gradients into parameters.

        Returns:
            One view of shape ``(b, *shape)`` for each parameter.

        Raises:
            GradientError: If they have another shape.
        """
        if flat.ndim != 2 or flat.shape[1] != self.grad_dim:
            raise GradientError(
                f"The gradient computer gave gradients of shape {tuple(flat.shape)}; "
                f"(b, {self.grad_dim}) is needed, a column for every entry of the "
                f"selected parameters."
            )
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = torch.split(flat, sizes, dim=1)
        return {
            name: piece.reshape(len(flat), *shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


def select_parameters(
    model: torch.nn.Module, grad_wrt: GradWrt | None = None
) -> Selection:
    """Choose the parameters to differentiate.

    Frozen parameters (``requires_grad=False``) are never chosen; a tied parameter is
    chosen once, under its first name.

    Args:
        model: The model.
        grad_wrt: None for all; or names and globs such as ``"encoder.*"``, with or
            without the prefixes of wrappers; or a predicate on (name, parameter).

    Returns:
        The selection, in the model's own order whatever the order of ``grad_wrt``.

    Raises:
        UnknownNameError: If a name or glob matches nothing.
        OptionError: If a name is that of a frozen parameter, a parameter is complex, or
            nothing at all is left to differentiate.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> select_parameters(model, ["1.*"]).names
        ('1.weight', '1.bias')
    """
    parameters = dict(model.named_parameters())
    if grad_wrt is None:
        chosen = set(parameters)
    elif callable(grad_wrt):
        chosen = {name for name, value in parameters.items() if grad_wrt(name, value)}
    else:
        chosen = _match(_patterns(grad_wrt), parameters)
    names = [
        n for n, value in parameters.items() if n in chosen and value.requires_grad
    ]
    if not names:
        raise OptionError(
            f"No parameter to differentiate: of the model's {len(parameters)} parameters, "
            f"grad_wrt chooses {len(chosen)}, and of those none has requires_grad=True."
            f"{_hint_at_adapters(model)}"
        )
    for name in names:
        if parameters[name].is_complex():
            raise OptionError(
                f"The parameter {name!r} is {parameters[name].dtype}; gradients are real "
                f"numbers here. Leave it out with grad_wrt, or hold its real and imaginary "
                f"parts in real parameters (torch.view_as_complex joins them)."
            )
    shapes = tuple(tuple(parameters[name].shape) for name in names)
    short = canonical_names(parameters)
    wrapped = tuple((name, short[name]) for name in names if short[name] != name)
    return Selection(tuple(names), shapes, wrapped)


def _hint_at_adapters(model: torch.nn.Module) -> str:
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return ""
    return (
        " Adapters of PEFT are frozen where they are loaded for inference: use "
        "PeftModel.from_pretrained(..., is_trainable=True), or call requires_grad_() on "
        "them."
    )


def _patterns(grad_wrt: object) -> list[str]:
    if isinstance(grad_wrt, str):
        return [grad_wrt]
    patterns = []
    for pattern in grad_wrt if isinstance(grad_wrt, Iterable) else [grad_wrt]:
        if not isinstance(pattern, str):
            raise OptionError(
                f"grad_wrt takes names, globs or a predicate; got {pattern!r} among them."
            )
        patterns.append(pattern)
    return patterns


def _match(
    patterns: Sequence[str], parameters: Mapping[str, torch.nn.Parameter]
) -> set[str]:
    chosen: set[str] = set()
    short = canonical_names(parameters)
    whole = {name: name for name in parameters} | {v: k for k, v in short.items()}
    for pattern in patterns:
        if pattern in whole:
            pattern = whole[pattern]
            if not parameters[pattern].requires_grad:
                raise OptionError(
                    f"grad_wrt names {pattern!r}, which is frozen; call requires_grad_() "
                    f"on it, or leave it out."
                )
            chosen.add(pattern)
            continue
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            matches = [whole[it] for it in fnmatch.filter(whole, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.3)
            known = (
                f"the closest are {close}" if close else f"such as {[*parameters][:3]}"
            )
            raise UnknownNameError(
                f"grad_wrt names {pattern!r}, which matches none of the model's "
                f"{len(parameters)} parameters; {known}."
            )
        chosen.update(matches)
    return chosen


def flatten_rows(grads: Gradients) -> Shaped[Tensor, "b d"]:
    """Flatten per-sample gradients to one row an example.

    Args:
        grads: ``{parameter: (b, *shape)}``, or ``(b, d)`` already.

    Returns:
        The gradients, concatenated in the mapping's order. Shape ``(b, d)``.

    Raises:
        BatchError: If the mapping is empty or its tensors differ in ``b``.

    Example:
        >>> flatten_rows({"w": torch.ones(2, 1, 2), "b": torch.zeros(2)})
        tensor([[1., 1., 0.],
                [1., 1., 0.]])
    """
    if isinstance(grads, Tensor):
        return grads.reshape(len(grads), math.prod(grads.shape[1:]))
    sizes = {len(grad) for grad in grads.values()}
    if len(sizes) != 1:
        raise BatchError(
            f"Per-sample gradients need one common number of rows; got {sorted(sizes)} "
            f"over {len(grads)} parameters."
        )
    b = sizes.pop()
    return torch.cat(
        [g.reshape(b, math.prod(g.shape[1:])) for g in grads.values()], dim=1
    )


def fingerprint(weights: Weights) -> str:
    """Hash named tensors by name, dtype, shape and bytes.

    Args:
        weights: A state dict.

    Returns:
        32 hexadecimal digits; equal for equal weights on any device, of a model and of
        the same model in a wrapper.
    """
    digest = hashlib.blake2b(digest_size=16)
    named = {name: key for key, name in canonical_names(weights).items()}
    for name in sorted(named):
        value = weights[named[name]].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_non_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds a NaN or an infinity, or None."""
    for name, value in weights:
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None
