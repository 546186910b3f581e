"""Shape-annotated aliases, and the table of symbols that they and the docs use.

========  ==================================================================
symbol    meaning
========  ==================================================================
``n``     training examples
``m``     targets
``b``     batch
``d``     gradient entries (``grad_dim``)
``p``     projected entries (``proj_dim``)
``c``     checkpoints (``model_id``)
``s``     retraining subsets; in a sparse projection, nonzeros a coordinate
========  ==================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = Any
"""Any nesting of tuples, lists and mappings whose tensors share their first axis."""

Gradients: TypeAlias = Mapping[str, Tensor] | Tensor
"""Per-sample gradients: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor."""

Weights: TypeAlias = Mapping[str, Tensor]
"""Named tensors, as ``dict(model.named_parameters())`` gives them."""

Checkpoint: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str]
"""A state dict, or the path of a file or of a ``transformers`` folder with one."""

GradWrt: TypeAlias = Iterable[str] | Callable[[str, torch.nn.Parameter], bool] | str
"""What to differentiate: names or globs, or a predicate on (name, parameter)."""
