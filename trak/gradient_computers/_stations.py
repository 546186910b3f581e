"""Where a pass listens, what it serves there, and what it found out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from trak.gradient_computers._layer_rules import LayerRule
from trak.gradient_computers._layouts import Layout


@dataclass(slots=True)
class Station:
    """A module, and which of its parameters are served there in which way.

    Each way maps the module's own names of parameters to the model's.
    """

    name: str
    """The module's name in the model."""

    module: nn.Module
    """The module."""

    rule: LayerRule | None = None
    """Its layer rule."""

    by_rule: dict[str, str] = field(default_factory=dict)
    """Parameters whose gradients the rule forms."""

    by_module: dict[str, str] = field(default_factory=dict)
    """Parameters whose gradients come from running the module again."""

    expanded: dict[str, str] = field(default_factory=dict)
    """Parameters that are replaced by a copy for each example while it runs."""

    excluded: set[Layout] = field(default_factory=set)
    """Layouts of its output that turned out wrong."""

    copies_inputs: bool = False
    """Whether its inputs are written to later, and have to be copied."""

    loops: bool = False
    """Whether it runs again for one example at a time, as ``vmap`` cannot run it."""

    def parameters(self) -> list[str]:
        """Return the model's names of what is served here."""
        return [
            *self.by_rule.values(),
            *self.by_module.values(),
            *self.expanded.values(),
        ]


@dataclass(slots=True)
class Finding:
    """Why a pass has to be made again."""

    station: Station
    """Where it happened."""

    parameters: tuple[str, ...]
    """Which parameters cannot be served there; none if they can with a change made."""

    reason: str = ""
    """Why not, for users."""
