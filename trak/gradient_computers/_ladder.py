"""Which way serves each parameter: the ladder of engines, and what share each has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from trak._params import Selection
from trak.gradient_computers._layer_rules import LayerRule, inner_rule_for, rule_for
from trak.gradient_computers._stations import Station


class Rung(str, Enum):
    """A way to compute per-sample gradients; the first are the fastest."""

    LAYER = "layer rules"
    """A product of a layer's input and its output's gradient."""

    COPIES = "a copy for each example"
    """A small parameter, broadcast over the batch where its module uses it."""

    MODULE = "modules run again"
    """``vmap`` over a single module, on what it got in the batch."""

    FOLLOWED = "followed to the examples"
    """What is made of a parameter is copied for each example where it meets them."""

    VMAP = "vmap over the whole model"
    """``torch.func``, with respect to the parameters that are left."""

    LOOP = "one example at a time"
    """A forward and a backward pass for each example."""


HOOKED = frozenset({Rung.LAYER, Rung.COPIES, Rung.MODULE, Rung.FOLLOWED})
"""What takes part in the one batched pass."""

LARGEST_COPY = 2**15
"""Entries above which a parameter is not copied for each example."""

LARGEST_FOLLOWED = 2**20
"""Entries above which a parameter is not followed, as a gradient of it for each example is
held until the end of the pass."""

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
        reason: Why everything is for ``vmap``; None if it is not.

    Attributes:
        reasons: Why a parameter is not served in one of the faster ways.
        stations: Where a pass has to listen.
        structure: What :func:`structure` gave for the model.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, prefix: str, reason: str | None
    ) -> None:
        self.selection = selection
        self.reasons: dict[str, str] = {}
        self.stations: list[Station] = []
        self._all_stations: dict[str, Station] = {}
        self.structure = structure(model)
        self._total = sum(value.numel() for value in model.parameters())
        self._owners = _owners(model, selection.names, prefix)
        self._ways: dict[str, list[Rung]] = {}
        for name in selection.names:
            ways = [] if reason else self._ways_of(name)
            self._ways[name] = [*ways, Rung.VMAP, Rung.LOOP]
            if reason:
                self.reasons[name] = reason
        self._collect()

    @property
    def rungs(self) -> dict[str, Rung]:
        """Which way serves each parameter."""
        return {name: ways[0] for name, ways in self._ways.items()}

    def _ways_of(self, name: str) -> list[Rung]:
        """List the ways through hooks for a parameter, and note what rules others out."""
        owners = self._owners[name]
        ways = []
        for owner in owners:
            found, reason = self._ways_at(owner)
            ways.append(found)
            if reason:
                self.reasons[name] = reason
        if len(owners) == 1:
            return ways[0]
        found = []
        if any(Rung.LAYER in way for way in ways):
            # A module may hold under its own name what only a layer below it uses.
            found.append(Rung.LAYER)
        shared = [any(w is not Rung.COPIES for w in way) for way in ways]
        if owners and all(shared) and any(Rung.LAYER not in way for way in ways):
            found.append(Rung.MODULE)
        if not found:
            self.reasons.setdefault(name, "no module owns it")
        return found

    def _ways_at(self, owner: _Owner) -> tuple[list[Rung], str]:
        module, local = owner.module, owner.local
        kind = type(module).__name__
        if isinstance(module, nn.RNNBase) or answers_for_parts(module):
            return [Rung.MODULE], f"{kind} has no layer rule"
        if _is_derived(module, local):
            return [], "a weight is computed from it before any example is seen"
        rule = rule_for(module)
        parameter = module._parameters[local]
        size = 0 if parameter is None else parameter.numel()
        last = [Rung.FOLLOWED] if 0 < size <= LARGEST_FOLLOWED else []
        if isinstance(rule, LayerRule) and local in rule.parameters:
            is_table = isinstance(module, nn.Embedding)
            return [Rung.LAYER, *(last if is_table else [])], ""
        reason = rule if isinstance(rule, str) else f"{kind} has another {local}"
        ways = []
        inner = inner_rule_for(module)
        if inner is not None and local in inner.parameters:
            ways.append(Rung.LAYER)
        if 0 < size <= LARGEST_COPY:
            ways.append(Rung.COPIES)
        size = sum(value.numel() for value in module.parameters())
        is_leaf = all(child.numel() == 0 for child in _below(module))
        if is_leaf or size <= LARGEST_SHARE * self._total:
            ways.append(Rung.MODULE)
        ways += last
        if not ways:
            reason = f"{kind} is a large module with a parameter of its own"
        return ways, reason

    def _collect(self) -> None:
        """List what is served in a pass, station by station."""
        for station in self._all_stations.values():
            station.clear()
        for name, ways in self._ways.items():
            if ways[0] not in HOOKED:
                continue
            for owner in self._owners[name]:
                station = self._station(owner)
                has_rule = station.rule and owner.local in station.rule.parameters
                if ways[0] is Rung.LAYER and not has_rule:
                    continue
                if ways[0] is Rung.FOLLOWED:
                    station.followed[owner.local] = name
                    continue
                is_forced = has_rule and not station.is_inside
                if is_forced or ways[0] is Rung.LAYER:
                    station.by_rule[owner.local] = name
                elif ways[0] is Rung.COPIES:
                    station.copied[owner.local] = name
                else:
                    station.by_module[owner.local] = name
        every = self._all_stations.values()
        self.stations = [station for station in every if station.parameters()]

    def _station(self, owner: _Owner) -> Station:
        if owner.name not in self._all_stations:
            attention = answers_for_parts(owner.module)
            rule = None if attention else rule_for(owner.module)
            inner = None if attention else inner_rule_for(owner.module)
            is_inside = inner is not None and not isinstance(rule, LayerRule)
            known = rule if isinstance(rule, LayerRule) else inner
            made = Station(owner.name, owner.module, known, is_inside=is_inside)
            self._all_stations[owner.name] = made
        return self._all_stations[owner.name]

    def served_by(self, *rungs: Rung) -> list[str]:
        """Return the parameters of some rungs, in the model's order."""
        return [name for name, ways in self._ways.items() if ways[0] in rungs]

    def move_down(self, names: Iterable[str], reason: str) -> None:
        """Serve parameters in their next slower way."""
        for name in names:
            del self._ways[name][0]
            self.reasons[name] = reason
        self._collect()

    def leave_hooks(self, reason: str) -> None:
        """Serve every parameter without hooks."""
        for name, ways in self._ways.items():
            if ways[0] in HOOKED:
                self._ways[name] = [Rung.VMAP, Rung.LOOP]
                self.reasons[name] = reason
        self._collect()

    def coverage(self) -> Coverage:
        """Return which way serves each parameter."""
        shapes = zip(self.selection.names, self.selection.shapes, strict=True)
        sizes = {name: math.prod(shape) for name, shape in shapes}
        return Coverage(self.rungs, sizes, dict(self.reasons))


def _is_derived(module: nn.Module, local: str) -> bool:
    """Tell whether a parameter is what a parametrization makes a weight of."""
    # A copy for each example is none: weight normalisation's kernel for the CPU writes past
    # the end of its memory for tensors of another rank (seen with torch 2.13).
    hooks = module._forward_pre_hooks.values()
    named = {getattr(hook, "name", None) for hook in hooks}  # before parametrizations
    return isinstance(module, ParametrizationList) or any(
        name is not None and local in {f"{name}_g", f"{name}_v", f"{name}_orig"}
        for name in named
    )


def answers_for_parts(module: nn.Module) -> bool:
    """Tell whether a module uses the weights of its parts without calling them.

    Returns:
        Whether it does; attention pooling of CLIP is known by its name.

    Example:
        >>> answers_for_parts(nn.MultiheadAttention(2, 1))
        True
    """
    named = type(module).__name__ == "AttentionPool2d"
    return named or isinstance(module, nn.MultiheadAttention)


def _below(module: nn.Module) -> Iterator[nn.Parameter]:
    for child in module.children():
        yield from child.parameters()


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
        if answers_for_parts(module):
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


def structure(model: nn.Module) -> tuple[object, ...]:
    """Identify a model's modules, their modes, and which of them share parameters.

    Returns:
        What a ladder holds for; equal as long as the model is built the same.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1))
        >>> before = structure(model)
        >>> model[0] = nn.Linear(1, 1)
        >>> structure(model) == before
        False
    """
    places: dict[int, int] = {}
    return tuple(
        (
            id(module),
            module.training,
            tuple(
                (local, places.setdefault(id(value), len(places)))
                for local, value in module._parameters.items()
                if value is not None
            ),
        )
        for module in model.modules()
    )


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


def describe_slow(coverage: Coverage) -> str:
    """Tell which parameters no batched pass serves, and why.

    Args:
        coverage: The way of each parameter.

    Returns:
        The text of a warning.
    """
    groups: dict[tuple[Rung, str], list[str]] = {}
    for name, rung in coverage.rungs.items():
        if rung not in HOOKED:
            reason = coverage.reasons.get(name, "")
            groups.setdefault((rung, reason), []).append(name)
    parts = []
    for (rung, reason), names in groups.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{', '.join(names[:3])}{more} by {rung.value} ({reason})")
    return (
        f"Some per-sample gradients cannot be taken from the batched pass, and are "
        f"computed in a slower way with the same result: {'; '.join(parts)}."
    )
