"""Which entry of a checkpoint is which of a model: wrappers, tied weights, adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trak._names import canonical_names
from trak.errors import CheckpointError

_INSIDE = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""Where wrappers hold the model."""


def fit(model: torch.nn.Module, checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    """Find a checkpoint's entry for every entry of a model's state dict.

    Prefixes that wrappers put before names do not matter, on either side. Where weights
    are tied, one of them is enough. Where the model has adapters of PEFT, theirs are
    enough, with or without the adapter's name, and the rest stays what it is.

    Args:
        model: The model.
        checkpoint: A state dict.

    Returns:
        The entries by the model's own names.

    Raises:
        CheckpointError: If names or shapes do not fit.
    """
    own = model.state_dict()
    # In order: names as they are; without prefixes; and then without those of adapters.
    exact = {key: key for key in own}, {key: key for key in checkpoint}
    short = canonical_names(own), _canonical(checkpoint)
    aliases = _aliases(own)
    found = _match(*exact, aliases) or _match(*short, aliases)
    if found is None:
        adapters = adapter_names(model, own)
        if adapters and checkpoint:
            names = {**short[0], **adapters}
            base = [key for key in own if key not in adapters]
            found = _match(names, short[1], aliases, spared=base)
    if found is None:
        raise CheckpointError(_explain(model, own, checkpoint, aliases))
    fitted = {key: checkpoint[name] for key, name in found.items()}
    for key, value in fitted.items():
        if isinstance(own[key], Tensor) and _shape(value) != own[key].shape:
            raise CheckpointError(
                f"the checkpoint's {found[key]!r} has shape {_shape(value) or ()}, the "
                f"model's {tuple(own[key].shape)}."
            )
    return fitted


def check_ties(model: torch.nn.Module, fitted: Mapping[str, Any]) -> None:
    """Refuse different values for weights that are one in the model.

    Args:
        model: The model.
        fitted: What :func:`fit` returned; finite.

    Raises:
        CheckpointError: If there are such.
    """
    for key, first in _aliases(model.state_dict()).items():
        one, other = fitted.get(first), fitted.get(key)
        if one is None or other is None or one is other:
            continue
        if not torch.equal(one, other):
            raise CheckpointError(
                f"{first!r} and {key!r} are one parameter of the model, and the "
                f"checkpoint has different values for them; untie them in the model, as "
                f"they were in training."
            )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _canonical(checkpoint: Mapping[Any, Any]) -> dict[Any, str]:
    if all(isinstance(key, str) for key in checkpoint):
        return dict(canonical_names(checkpoint))
    return {key: str(key) for key in checkpoint}


def _match(
    ours: Mapping[str, str],
    theirs: Mapping[Any, str],
    aliases: Mapping[str, str],
    spared: Iterable[str] = (),
) -> dict[str, Any] | None:
    """Match entries by name.

    Args:
        ours: A name for every key of the model.
        theirs: A name for every key of the checkpoint.
        aliases: Keys of tied weights, each with the first that is the same.
        spared: Keys that may be missing.

    Returns:
        The checkpoint's key for the model's; None if one is left over or missing.
    """
    by_name = {name: key for key, name in theirs.items()}
    found = {key: by_name[name] for key, name in ours.items() if name in by_name}
    if len(set(found.values())) < len(theirs):
        return None
    present = {aliases.get(key, key): source for key, source in found.items()}
    may_lack = set(spared)
    for key in ours:
        if key in found:
            continue
        first = aliases.get(key, key)
        if first in present:
            found[key] = present[first]
        elif key not in may_lack:
            return None
    return found


def _aliases(own: Mapping[str, Any]) -> dict[str, str]:
    """Find entries of a state dict that are the same memory as an earlier one.

    Returns:
        The first key of each such group, by its keys.
    """
    firsts: dict[tuple[object, ...], str] = {}
    groups: dict[str, str] = {}
    for key, value in own.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            continue
        if value.is_meta or value.numel() == 0:
            continue
        where = value.data_ptr(), value.dtype, value.shape, value.stride()
        first = firsts.setdefault((*where, value.device), key)
        if first != key:
            groups[first] = groups[key] = first
    return groups


def adapter_names(model: torch.nn.Module, own: Mapping[str, Any]) -> dict[str, str]:
    """Find what PEFT calls the active adapter's weights in a file.

    Args:
        model: The model, perhaps wrapped.
        own: Its state dict.

    Returns:
        The name, without prefixes, of each such key of ``own``; empty where the model has
        no adapters.
    """
    inner, prefix = _without_wrappers(model)
    config = getattr(inner, "peft_config", None)
    if not isinstance(config, Mapping) or not config:
        return {}
    from peft import get_peft_model_state_dict

    active = getattr(inner, "active_adapter", None)
    name = active if isinstance(active, str) else next(iter(config))
    tensors = {key.removeprefix(prefix): value for key, value in own.items()}
    keys = {id(value): prefix + key for key, value in tensors.items()}
    saved = get_peft_model_state_dict(
        inner, tensors, adapter_name=name, save_embedding_layers=False
    )
    short = canonical_names(saved)
    return {keys[id(v)]: short[key] for key, v in saved.items() if id(v) in keys}


def _without_wrappers(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    prefix = ""
    while not hasattr(model, "peft_config"):
        names = [name for name in _INSIDE if name in model._modules]
        inner = model._modules[names[0]] if names else None
        if inner is None or len(model._modules) > 1:
            break
        model, prefix = inner, f"{prefix}{names[0]}."
    return model, prefix


def _explain(
    model: torch.nn.Module,
    own: Mapping[str, Any],
    checkpoint: Mapping[Any, Any],
    aliases: Mapping[str, str],
) -> str:
    """Say how a checkpoint does not fit.

    Returns:
        The text of an error.
    """
    short = canonical_names(own)
    theirs = _canonical(checkpoint)
    if any(key in own for key in checkpoint):
        short, theirs = {key: key for key in own}, {key: key for key in checkpoint}
    names, known = set(theirs.values()), set(short.values())
    present = {aliases.get(key, key) for key, name in short.items() if name in names}
    missing = [
        key
        for key, name in short.items()
        if name not in names and aliases.get(key, key) not in present
    ]
    unexpected = [key for key, name in theirs.items() if name not in known]
    return (
        f"the checkpoint does not fit {type(model).__name__}: missing {missing[:5]} "
        f"({len(missing)} in all), unexpected {unexpected[:5]} ({len(unexpected)} in "
        f"all).{_hint(model, checkpoint, unexpected)}"
    )


def _hint(
    model: torch.nn.Module, checkpoint: Mapping[Any, Any], unexpected: list[Any]
) -> str:
    if "state_dict" in checkpoint or "model" in checkpoint:
        return " The state dict seems to be one of the checkpoint's entries."
    has_adapters = hasattr(_without_wrappers(model)[0], "peft_config")
    if any("lora_" in str(key) for key in unexpected) and not has_adapters:
        return (
            " The checkpoint holds adapters; put them on the model first, with "
            "PeftModel.from_pretrained(model, ..., is_trainable=True)."
        )
    if hasattr(model, "save_pretrained") and unexpected:
        return (
            " If it is one of another version of transformers, pass "
            "from_pretrained(folder).state_dict() of the model's class."
        )
    return ""
