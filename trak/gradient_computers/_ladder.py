"""Which way serves each parameter: the ladder of engines, and what share each has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch import nn

from trak._params import Selection
from trak.gradient_computers._layer_rules import LayerRule, rule_for
from trak.gradient_computers._stations import Station


class Rung(str, Enum):
    """A way to compute per-sample gradients; the first are the fastest."""

    LAYER = "layer rules"
    """A product of a layer's input and its output's gradient."""

    MODULE = "modules run again"
    """``vmap`` over a single module, on what it got in the batch."""

    COPIES = "a copy for each example"
    """A parameter with a leading dimension of 1, expanded over the batch."""

    VMAP = "vmap over the whole model"
    """``torch.func``, with respect to the parameters that are left."""

    LOOP = "one example at a time"
    """A forward and a backward pass for each example."""


HOOKED = frozenset({Rung.LAYER, Rung.MODULE, Rung.COPIES})
"""What takes part in the one batched pass."""

LARGEST_SHARE = 0.25
"""Share of the model's parameters above which a module is not run again.

Running it again costs about its share of a pass over the whole model."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which way serves each parameter, and why not a faster one.

    Example:
        >>> coverage = Coverage({"w": Rung.LAYER, "v": Rung.LOOP}, {"w": 3, "v": 1}, {})
        >>> coverage.share(Rung.LAYER)
        0.75
        >>> print(str(coverage).split("; ")[0])
        layer rules: 75.0 % of the gradient (1 parameter)
    """

    rungs: dict[str, Rung]
    """The way, by parameter."""

    sizes: dict[str, int]
    """Number of entries, by parameter."""

    reasons: dict[str, str]
    """Why a parameter is not served in one of the faster ways."""

    def share(self, rung: Rung) -> float:
        """Return the share of gradient entries that a rung serves."""
        served = sum(size for name, size in self.sizes.items() if self._is(name, rung))
        return served / sum(self.sizes.values())

    def _is(self, name: str, rung: Rung) -> bool:
        return self.rungs[name] is rung

    def __str__(self) -> str:
        parts = []
        for rung in Rung:
            names = [name for name in self.rungs if self._is(name, rung)]
            if not names:
                continue
            noun = "parameter" if len(names) == 1 else "parameters"
            text = (
                f"{rung.value}: {100 * self.share(rung):.1f} % of the gradient "
                f"({len(names)} {noun})"
            )
            reasons = {
                self.reasons[name]: name for name in names[::-1] if name in self.reasons
            }
            if rung not in HOOKED and reasons:
                said = "; ".join(f"{name}: {why}" for why, name in reasons.items())
                text += f" [{said}]"
            parts.append(text)
        return "; ".join(parts)


class Ladder:
    """The way of each selected parameter, which only ever moves down.

    Args:
        model: The model, in the mode that it will be called in.
        selection: The parameters.
        prefix: What the selection's names have before the model's own.
        batched: Whether the task has a batched form; else everything is for ``vmap``.

    Attributes:
        stations: Where a pass has to listen.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        prefix: str,
        *,
        batched: str | None,
    ) -> None:
        self.selection = selection
        self.rungs: dict[str, Rung] = {}
        self.reasons: dict[str, str] = {}
        self.stations: list[Station] = []
        if batched is not None:
            self.rungs = dict.fromkeys(selection.names, Rung.VMAP)
            self.reasons = dict.fromkeys(selection.names, batched)
            return
        self._total = sum(value.numel() for value in model.parameters())
        self._by_module: dict[str, Station] = {}
        for name, owners in _owners(model, selection.names, prefix).items():
            self._place(name, owners)
        self._collect()

    def _place(self, name: str, owners: list[_Owner]) -> None:
        """Find the way of one parameter, which all modules that own it must allow."""
        ways = [self._way(owner) for owner in owners]
        blocked = [reason for rung, reason in ways if rung not in HOOKED]
        rungs = {rung for rung, _ in ways}
        if not owners or blocked or (Rung.COPIES in rungs and len(owners) > 1):
            self.rungs[name] = Rung.VMAP
            self.reasons[name] = next(iter(blocked), "it is shared by several modules")
            return
        self.rungs[name] = max(rungs, key=list(Rung).index)
        for owner, (rung, reason) in zip(owners, ways, strict=True):
            station = self._station(owner)
            if rung is Rung.LAYER:
                station.by_rule[owner.local] = name
                continue
            self.reasons[name] = reason
            served = station.by_module if rung is Rung.MODULE else station.expanded
            served[owner.local] = name

    def _station(self, owner: _Owner) -> Station:
        rule = rule_for(owner.module)
        made = Station(
            owner.name, owner.module, rule if isinstance(rule, LayerRule) else None
        )
        return self._by_module.setdefault(owner.name, made)

    def _way(self, owner: _Owner) -> tuple[Rung, str]:
        module, local = owner.module, owner.local
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            return Rung.MODULE, f"{kind} has no layer rule"
        rule = rule_for(module)
        if isinstance(rule, LayerRule) and local in rule.parameters:
            return Rung.LAYER, ""
        reason = rule if isinstance(rule, str) else f"{kind} has another {local}"
        parameter = module._parameters[local]
        children = [
            child
            for child in module.children()
            if any(True for _ in child.parameters())
        ]
        if not children:
            return Rung.MODULE, reason
        if parameter is not None and parameter.ndim > 1 and len(parameter) == 1:
            return Rung.COPIES, reason
        size = sum(value.numel() for value in module.parameters())
        if size <= LARGEST_SHARE * self._total:
            return Rung.MODULE, reason
        return Rung.VMAP, f"{kind} is a large module with a parameter of its own"

    def _collect(self) -> None:
        """Drop what is not served in a pass any more from the stations."""
        served = set(self.served_by(*HOOKED))
        for station in self._by_module.values():
            for way in (station.by_rule, station.by_module, station.expanded):
                for local in [key for key, name in way.items() if name not in served]:
                    del way[local]
        self.stations = [it for it in self._by_module.values() if it.parameters()]

    def served_by(self, *rungs: Rung) -> list[str]:
        """Return the parameters of some rungs, in the model's order."""
        return [name for name in self.selection.names if self.rungs[name] in rungs]

    def move_down(self, names: Iterable[str], reason: str) -> None:
        """Serve parameters in the next slower way that differs."""
        for name in names:
            hooked = self.rungs[name] in HOOKED
            self.rungs[name] = Rung.VMAP if hooked else Rung.LOOP
            self.reasons[name] = reason
        self._collect()

    def coverage(self) -> Coverage:
        """Return which way serves each parameter."""
        shapes = zip(self.selection.names, self.selection.shapes, strict=True)
        sizes = {name: math.prod(shape) for name, shape in shapes}
        rungs = {name: self.rungs[name] for name in sizes}
        return Coverage(rungs, sizes, dict(self.reasons))


@dataclass(frozen=True, slots=True)
class _Owner:
    """A module that holds a parameter."""

    name: str
    module: nn.Module
    local: str


def _owners(
    model: nn.Module, names: Iterable[str], prefix: str
) -> dict[str, list[_Owner]]:
    """Find every module that holds each parameter; attention answers for its parts."""
    first: dict[int, str] = {}
    for name, value in model.named_parameters():
        first[id(value)] = prefix + name
    owners: dict[str, list[_Owner]] = {name: [] for name in names}
    attention: tuple[str, nn.Module] | None = None
    for module_name, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, nn.MultiheadAttention):
            attention = (module_name, module)
        above = attention[0] + "." if attention and attention[0] else ""
        inside = attention is not None and module_name.startswith(above)
        for local, value in module._parameters.items():
            name = first.get(id(value), "") if value is not None else ""
            if name not in owners:
                continue
            if attention and inside and module is not attention[1]:
                own = f"{module_name.removeprefix(above)}.{local}"
                owners[name].append(_Owner(*attention, own))
            else:
                owners[name].append(_Owner(module_name, module, local))
    return owners


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Find the model inside wrappers that hooks cannot see through.

    Returns:
        The model, and what the wrappers put before its parameters' names.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(1, 1)))
        (Linear(in_features=1, out_features=1, bias=True), 'module.')
    """
    prefix = ""
    while True:
        inner = model._modules.get("_orig_mod")  # of torch.compile
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model, prefix = model.module, prefix + "module."
        elif inner is not None:
            model, prefix = inner, prefix + "_orig_mod."
        else:
            return model, prefix


def describe_moves(moved: dict[str, str], coverage: Coverage) -> str:
    """Tell which parameters are served in a slower way from now on, and why.

    Args:
        moved: The reasons, by parameter.
        coverage: The ways they are served in.

    Returns:
        The text of a warning.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, reason in moved.items():
        reasons.setdefault((reason, coverage.rungs[name].value), []).append(name)
    parts = [
        f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''} "
        f"by {way} ({reason})"
        for (reason, way), names in reasons.items()
    ]
    return (
        f"Some per-sample gradients cannot be taken from the batched pass, and are "
        f"computed in a slower way with the same result: {'; '.join(parts)}."
    )
