"""What the accuracy benchmark runs: the lines of each truth, and three choices of them.

A line is a method with its options, at growing numbers of models. Each is run by a process
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CHECKPOINTS = (1, 2, 5, 10, 20)
RETRAININGS = (20, 50, 100, 200, 500, 1000, 2000)
SKETCHES = (256, 512, 1024, 2048, 4096)
"""Projected entries that the arithmetic of traker 0.3.2 is tried with."""

SIZES = {"dense": (64, 128, 256, 512, 1024, 2048, 4096), "wide": (8192,), "exact": (0,)}
"""Projected entries that TRAK is tried with, by the kind of gradients; 0 for all."""

MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Dampings of TRAK, in mean eigenvalues."""

EXPONENTS = tuple((a, b) for a in (0.25, 0.0) for b in (0.5, 0.25, 0.75, 1.0))
"""Powers of the out-to-loss weight, the default of classification first."""

SMALL = ("digits", "diabetes", "mnist", "cifar4")
"""Truths whose models have fewer than 100,000 parameters."""

TEXT = ("sst2", "rte", "sst2_top", "qnli_top", "rte_top")

LANGUAGE = ("webnlg",)
"""Truths of language models."""

PAIRS = ("qnli_head", "rte_head")
"""Truths whose inputs are vectors of pairs of texts."""


@dataclass(frozen=True)
class Line:
    """A method with its options."""

    name: str
    """What tables and pictures call it."""

    method: str
    """What the worker runs."""

    counts: tuple[int, ...] = (0,)
    """Numbers of checkpoints, of training runs or of retrainings; 0 for none."""

    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    """What tells lines of one name apart: of these the truth chooses the best."""

    is_default: bool = True
    """Whether this is the variant that the method's own default is."""

    needs: str = ""
    """Kind of the projected gradients that must be stored before."""

    targets: int = 0
    """How many targets are scored, the first ones; 0 for all. The time is scaled up."""

    theirs: bool = False
    """Whether it runs in the environment of traker 0.3.2."""

    def key(self, truth: str) -> str:
        """Give the name of the line's files."""
        parts = [truth, self.method, self.variant, self.needs]
        parts += [f"{k}-{v}" for k, v in sorted(self.options.items())]
        text = "_".join(part for part in parts if part)
        return "".join(c if c.isalnum() or c in "-_." else "" for c in text)


def features(kind: str, n_checkpoints: int) -> Line:
    """Make the line that stores projected gradients for others."""
    most = min(5, n_checkpoints) if kind == "exact" else n_checkpoints
    counts = tuple(range(1, most + 1))
    return Line(f"gradients, {kind}", "features", counts, needs=kind)


def lines(truth: str, n_checkpoints: int, n_given: int, plan: str) -> list[Line]:
    """List what is run on a truth.

    Args:
        truth: Its name.
        n_checkpoints: How many checkpoints it has.
        n_given: How many retrainings datamodels are given at most.
        plan: ``"quick"``, ``"default"`` or ``"full"``.

    Returns:
        The lines, cheap ones first.
    """
    most = 5 if plan == "quick" else n_checkpoints
    counts = tuple(count for count in CHECKPOINTS if count <= min(most, n_checkpoints))
    found = [Line("training", "training")]
    if truth in LANGUAGE:
        return [*found, *_language(truth, counts, plan)]
    found += _baselines(truth)
    found += _ours(counts)
    found += _sizes(truth, counts, plan)
    found += _arithmetic(truth, counts, plan)
    found += _gradients(counts)
    given = tuple(count for count in RETRAININGS if count <= n_given)
    if plan == "quick":
        given = tuple(count for count in given if count <= 100)
    if given:
        found.append(Line("empirical influence", "empirical", given))
        found.append(Line("datamodels", "datamodels", given))
    found += _theirs(truth, counts, plan)
    if plan != "quick":
        found += _curvature(truth, counts, plan)
    return found


def _baselines(truth: str) -> Iterator[Line]:
    yield Line("random", "random")
    for kind in ("label", "signed") if truth != "diabetes" else ("signed",):
        yield Line(
            "similarity of inputs", "similarity", options={"by": kind}, variant=kind
        )
    for power in (1, 2) if truth in PAIRS else ():
        options = {"by": "signed", "of": "pairs", "power": power}
        name = "similarity of pairs"
        yield Line(name, "similarity", (0,), options, f"power {power}", power == 1)
    if truth in TEXT:
        for kind in ("label", "signed"):
            options = {"by": kind, "of": "words"}
            yield Line("similarity of words", "similarity", (0,), options, kind)


def _ours(counts: tuple[int, ...]) -> Iterator[Line]:
    yield Line("TRAK", "trak", counts, needs="sparse")
    yield Line("TRAK, p=8192", "trak", counts, needs="wide")
    yield Line(
        "TRAK, exponents (0, 1)",
        "trak",
        counts,
        {"exponents": [0.0, 1.0]},
        needs="sparse",
    )
    yield Line("TRAK by damping and exponents", "grid", counts, needs="sparse")


def _sizes(truth: str, counts: tuple[int, ...], plan: str) -> Iterator[Line]:
    if truth not in SMALL or plan == "quick":
        return
    few = tuple(count for count in (1, 5) if count <= max(counts))
    for kind, sizes in SIZES.items():
        options = {"sizes": list(sizes)}
        yield Line("TRAK by size", "sizes", few, options, needs=kind)
    # It computes its gradients itself, those of weights that nobody else needs among them.
    yield Line("what was tried", "variants", few[-1:], needs="exact")


def _arithmetic(truth: str, counts: tuple[int, ...], plan: str) -> Iterator[Line]:
    # Dense sketches of millions of parameters take hours.
    kind = "dense" if truth in SMALL else "wide"
    sketches = (512, 2048) if plan == "quick" else SKETCHES
    for p in sketches:
        yield Line(
            "traker's arithmetic",
            "arithmetic",
            counts,
            {"p": p},
            f"p={p}",
            is_default=p == 2048,
            needs=kind,
        )


def _gradients(counts: tuple[int, ...]) -> Iterator[Line]:
    yield Line("gradient dot", "dot", counts, needs="wide")
    yield Line("gradient cosine", "cosine", counts, needs="wide")
    runs = tuple(count for count in (1, 5) if count <= max(counts))
    yield Line("TracIn", "tracin", runs)
    yield Line("GAS", "gas", runs)
    yield Line("representations", "representations", counts, {"same_label": False})


def _language(truth: str, counts: tuple[int, ...], plan: str) -> Iterator[Line]:
    yield Line("random", "random")
    yield Line("BM25", "similarity")
    yield Line("TRAK", "trak", counts, needs="sparse")
    yield Line("TRAK, p=8192", "trak", counts, needs="wide")
    yield Line("TRAK by damping and exponents", "grid", counts, needs="sparse")
    yield from _arithmetic(truth, counts, plan)
    few = tuple(count for count in counts if count <= 5)
    yield Line("what was tried, p=8192", "changes", (1, *few[-1:]), needs="wide")
    yield Line("what was tried", "variants", few[-1:], needs="exact")
    for p in (2048, 8192):
        name = f"a kernel for each parameter, p={p}"
        yield Line(name, "layers", (1, *few[-1:]), {"p": p}, needs="exact")
    yield from _gradients(counts)
    for multiple in (0.01, 0.1, 1.0):
        yield Line(
            "EK-FAC",
            "ekfac",
            few,
            {"multiple": multiple},
            f"{multiple:g}",
            is_default=multiple == 0.1,
        )


def _theirs(truth: str, counts: tuple[int, ...], plan: str) -> Iterator[Line]:
    if truth not in SMALL:
        return
    few = counts if truth in {"digits", "diabetes"} else counts[:1]
    yield Line("traker 0.3.2", "theirs", few[:2], {"p": 2048}, theirs=True)
    sketches = (256, 512) if plan == "quick" else SKETCHES
    if truth == "cifar4":
        sketches = (512,)
    for p in sketches:
        yield Line(
            "traker 0.3.2, float32, p chosen",
            "theirs",
            few if p <= 1024 else few[:1],
            {"p": p, "half": False},
            f"p={p}",
            is_default=p == 2048,
            theirs=True,
        )


def _curvature(truth: str, counts: tuple[int, ...], plan: str) -> Iterator[Line]:
    few = tuple(count for count in counts if count <= 5)
    # Half precision of these is not offered: they are as exact as float32 is.
    grids = {"ekfac": (0.01, 0.1, 1.0, 10.0), "arnoldi": (0.01, 0.1, 1.0)}
    names = {"ekfac": "EK-FAC", "arnoldi": "Arnoldi"}
    if truth not in SMALL:
        grids, few = {"ekfac": (0.01, 0.1, 1.0)}, few[:1]
    for method, multiples in grids.items():
        for multiple in multiples:
            yield Line(
                names[method],
                method,
                few,
                {"multiple": multiple},
                f"{multiple:g}",
                is_default=multiple == 0.1,
                targets=0 if truth in SMALL[:2] or method == "ekfac" else 100,
            )
    if truth not in SMALL:
        return
    for multiple in (0.1, 1.0, 10.0):
        # With little damping LiSSA's series takes too long to converge.
        for solver in ("cg", "lissa") if multiple >= 1 else ("cg",):
            yield Line(
                f"influence, {solver.replace('lissa', 'LiSSA').replace('cg', 'CG')}",
                "influence",
                few if plan == "full" or truth == "diabetes" else few[:1],
                {"multiple": multiple, "solver": solver},
                f"{multiple:g}",
                is_default=multiple == 1.0,
                targets=0 if truth == "diabetes" else 50,
            )


MINUTES = {"quick": 2.0, "default": 20.0, "full": 120.0}
"""Longest that a line may run before it is stopped and left out."""
