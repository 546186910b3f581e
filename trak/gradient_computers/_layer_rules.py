"""Which layers have a rule that forms their per-sample gradients, and which rule."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from trak.gradient_computers._layer_rules_base import LayerRule, SegmentRule
from trak.gradient_computers._layer_rules_conv import ConvRule, ConvTransposeRule
from trak.gradient_computers._layer_rules_dense import (
    EmbeddingRule,
    LinearRule,
    PReLURule,
    TransposedLinearRule,
)
from trak.gradient_computers._layer_rules_norm import (
    BatchNormRule,
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)

__all__ = ["LayerRule", "SegmentRule", "inner_rule_for", "rule_for"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.PReLU: PReLURule(),
    nn.LayerNorm: LayerNormRule(),
    nn.RMSNorm: RMSNormRule(),
    nn.GroupNorm: GroupNormRule(),
    **dict.fromkeys(_BATCH_NORMS, BatchNormRule()),
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), InstanceNormRule()
    ),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ConvTransposeRule(),
    ),
}

_TRANSPOSED_LINEAR = TransposedLinearRule()

_BEHAVIOUR = (
    "__call__",
    "_apply_instance_norm",
    "_call_impl",
    "_conv_forward",
    "_output_padding",
    "forward",
)
"""Methods that decide what one of these layers computes."""


def rule_for(module: nn.Module) -> LayerRule | str:
    """Find the rule that forms a layer's per-sample gradients.

    A subclass is taken for its PyTorch class if it computes the same: not if it has a
    forward of its own, on the class or on the instance.

    Args:
        module: The layer, in the mode it will be called in.

    Returns:
        The rule, or the reason why there is none.

    Example:
        >>> type(rule_for(nn.Linear(2, 3))).__name__
        'LinearRule'
        >>> rule_for(nn.BatchNorm1d(2))
        'BatchNorm1d in training mode mixes examples'
    """
    name = type(module).__name__
    rule = _rule_of_class(module)
    if isinstance(rule, str):
        return rule
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return f"the parameters of {name} are made by its first call"
    for key, value in module._parameters.items():
        if value is None:
            continue
        if key not in rule.parameters:
            return f"{name} has a parameter of its own, {key}"
        if not value.is_floating_point():
            return f"the {key} of {name} is {value.dtype}"
    return _reason_in_state(module) or rule


def inner_rule_for(module: nn.Module) -> LayerRule | None:
    """Find the rule for the look-up in an embedding that does more than look up.

    Args:
        module: Any module.

    Returns:
        The rule, which holds for the ids and rows of ``F.embedding``, wherever its forward
        calls that with the module's weight; None if it is no embedding.

    Example:
        >>> inner_rule_for(nn.Linear(1, 1)) is None
        True
    """
    if not isinstance(module, nn.Embedding) or _reason_in_state(module):
        return None
    weight = module._parameters.get("weight")
    known = weight is not None and weight.is_floating_point()
    return _RULES[nn.Embedding] if known else None


def _rule_of_class(module: nn.Module) -> LayerRule | str:
    kind = type(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return _TRANSPOSED_LINEAR
    for base, rule in _RULES.items():
        if isinstance(module, base):
            for method in _BEHAVIOUR:
                own = getattr(kind, method, None) is not getattr(base, method, None)
                if own or method in vars(module):
                    return f"{kind.__name__} has a {method} of its own"
            return rule
    return f"{kind.__name__} has no layer rule"


def _reason_in_state(module: nn.Module) -> str | None:
    """Say why the module's settings leave its class's rule without a meaning."""
    name = type(module).__name__
    if isinstance(module, _BATCH_NORMS):
        if module.training:
            return f"{name} in training mode mixes examples"
        if module.running_mean is None:
            return f"{name} without running statistics mixes examples"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return f"the max_norm of {name} changes its weight"
        if module.scale_grad_by_freq:
            return f"the scale_grad_by_freq of {name} mixes examples"
    return None
