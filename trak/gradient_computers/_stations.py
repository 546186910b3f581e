"""Where a pass listens, what it serves there, and what it found out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from trak.gradient_computers._layer_rules import LayerRule
from trak.gradient_computers._layouts import Layout

NOT_AUTOGRADS = (
    "its gradient differs from autograd's; is it used where no hook sees it?"
)
"""Why a parameter moves down after the self-check."""

MOST_DIMENSIONS = 4
"""Dimensions, without that of the batch, up to which copies of parameters are tried."""


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

    copied: dict[str, str] = field(default_factory=dict)
    """Parameters that are replaced by a copy for each example while it runs."""

    followed: dict[str, str] = field(default_factory=dict)
    """Parameters that are followed to where they, or what is made of them, meet examples."""

    ranks: dict[str, list[int]] = field(default_factory=dict)
    """How the copies of a parameter may be arranged, the current way first.

    With rank ``r`` the copies of ``(*shape)`` are ``(b, *[1] * r, *shape)``; with -1 they
    are ``(b, *shape[1:])``, in the place of a leading dimension of 1."""

    excluded: set[Layout] = field(default_factory=set)
    """Layouts of its output that turned out wrong."""

    is_inside: bool = False
    """Whether the module does more than its rule knows, which holds for a look-up in it."""

    copies_inputs: bool = False
    """Whether its inputs are written to later, and have to be copied."""

    copies_outputs: bool = False
    """Whether an output that is a view is written to later, and has to be copied."""

    loops: bool = False
    """Whether it runs again for one example at a time, as ``vmap`` cannot run it."""

    def parameters(self) -> list[str]:
        """Return the model's names of what is served here."""
        return [
            *self.by_rule.values(),
            *self.by_module.values(),
            *self.copied.values(),
            *self.followed.values(),
        ]

    def clear(self) -> None:
        """Serve nothing here; what was learned stays."""
        for way in (self.by_rule, self.by_module, self.copied, self.followed):
            way.clear()

    def arrangements(self, local: str) -> list[int]:
        """Return the ranks that are left for a parameter's copies."""
        if local not in self.ranks:
            value = self.module._parameters[local]
            shape = () if value is None else value.shape
            leading = [-1] if len(shape) > 1 and shape[0] == 1 else []
            self.ranks[local] = [*leading, *range(MOST_DIMENSIONS - len(shape))]
        return self.ranks[local]


class Use(NamedTuple):
    """A layout that was read off an output."""

    name: str
    """The module's name."""

    layout: Layout
    """The layout."""

    is_several: bool
    """Whether in a batch of several: with a single example every layout looks right."""

    reading: tuple[object, ...] = ()
    """What else the layout was read off: the same tensors of other sizes may be read
    otherwise, as ``(t, b, w)`` is where there are as many positions as examples."""


@dataclass(slots=True)
class Finding:
    """Why a pass has to be made again."""

    station: Station
    """Where it happened."""

    parameters: tuple[str, ...]
    """Which parameters cannot be served there; none if they can with a change made."""

    reason: str = ""
    """Why not, for users."""
