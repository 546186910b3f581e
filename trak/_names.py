"""Names of parameters without what wrappers put before them."""

from __future__ import annotations

from collections.abc import Iterable

_LEADING = ("module.", "base_model.model.")
"""What ``DataParallel`` and PEFT put before every name of a model."""

_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What ``torch.compile``, FSDP and activation checkpointing put before the names of a
module, which may be a part of the model."""


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Take off what wrappers put before names.

    Args:
        names: All names of a model's parameters, or of its state dict.

    Returns:
        The canonical name of each. Every name stays what it is where two would become
        the same.

    Example:
        >>> canonical_names(["module.0._orig_mod.weight", "module.1.bias"])
        {'module.0._orig_mod.weight': '0.weight', 'module.1.bias': '1.bias'}
    """
    given = list(names)
    found = [
        ".".join(part for part in name.split(".") if part not in _ANYWHERE)
        for name in given
    ]
    while prefix := _common_prefix(found):
        found = [name.removeprefix(prefix) for name in found]
    if len(set(found)) < len(given) or "" in found:
        found = given
    return dict(zip(given, found, strict=True))


def _common_prefix(names: list[str]) -> str:
    for prefix in _LEADING:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""
