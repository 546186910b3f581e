"""What is measured: cells, and three choices of them by the time they take."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Featurize:
    """A call of ``featurize``: a model, a batch size, a sketch size."""

    model: str
    b: int
    p: int
    threads: int = 1
    half: bool = False
    """``use_half_precision`` of both sides; traker 0.3.2 computes in half precision then."""

    real: bool = False
    """Whether traker 0.3.2 is run to the end however long a batch takes."""

    in_memory: bool = False
    """Whether ours is also timed with a saver that writes no files."""


@dataclass(frozen=True, slots=True)
class Project:
    """A call of ``project`` on a matrix ``(b, d)``, for every projector there is."""

    d: int
    b: int
    p: int
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Score:
    """Finalizing, top-k and self-influence on features of a size."""

    n: int
    p: int = 2048
    m: int = 1000
    k: int = 100
    checkpoints: int = 1
    exponents: bool = False
    """Whether halves and quarters of the sizes are measured too."""

    rounds: int = 1
    """How often all of it is measured, each time with a store of its own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    featurize: tuple[Featurize, ...]
    project: tuple[Project, ...]
    score: tuple[Score, ...]

    budget: float
    """Seconds of turns for a cell; warming up comes on top."""

    cap: float
    """Longest that one call of traker 0.3.2 may be expected to take, in seconds; what is
    longer is extrapolated from one block of its projection."""

    rounds: int
    """The most rounds of a cell."""

    turn: float = 0.1
    """Seconds that a turn should last at least; short calls are repeated."""


QUICK = Plan(
    featurize=(
        Featurize("mlp", 128, 512, in_memory=True),
        Featurize("mlp", 128, 2048),
        Featurize("resnet9", 32, 2048),
    ),
    project=(Project(100_000, 32, 512), Project(100_000, 32, 2048)),
    score=(Score(10_000),),
    budget=10,
    cap=5,
    rounds=5,
)

_MLP = Featurize("mlp", 128, 2048)
_RESNET = Featurize("resnet9", 32, 2048)

DEFAULT = Plan(
    featurize=(
        replace(_MLP, p=512),
        replace(_MLP, in_memory=True),
        replace(_MLP, p=16384),
        replace(_MLP, b=32),
        replace(_MLP, b=1),
        replace(_MLP, threads=2),
        replace(_MLP, b=32, p=512, half=True),
        replace(_RESNET, p=512),
        replace(_RESNET, in_memory=True),
        replace(_RESNET, p=16384),
        replace(_RESNET, b=128),
        replace(_RESNET, b=1),
        replace(_RESNET, threads=2),
        Featurize("resnet18", 32, 2048, in_memory=True),
        Featurize("resnet18", 5, 2048, real=True),
        Featurize("minilm", 16, 2048, in_memory=True),
        Featurize("llama", 16, 2048, in_memory=True),
    ),
    project=(
        *(Project(100_000, b, p) for b in (32, 256) for p in (512, 2048, 16384)),
        *(Project(2_300_000, 32, p) for p in (512, 2048, 16384)),
        Project(2_300_000, 256, 2048),
    ),
    score=(
        Score(20_000, exponents=True),
        Score(100_000, p=4096, rounds=3),
        Score(1_000_000),
    ),
    budget=20,
    cap=15,
    rounds=11,
)

_BATCHES = (1, 32, 128)
_SKETCHES = (512, 2048, 16384)

FULL = Plan(
    featurize=(
        *(
            Featurize(model, b, p, threads, in_memory=p == 2048)
            for model in ("mlp", "resnet9", "resnet18")
            for b in _BATCHES
            for p in _SKETCHES
            for threads in (1, 2)
        ),
        *(
            Featurize(model, b, p, threads, in_memory=p == 2048)
            for model in ("minilm", "llama")
            for b in (1, 16, 32)
            for p in _SKETCHES
            for threads in (1, 2)
        ),
        Featurize("mlp", 32, 512, half=True),
        Featurize("resnet9", 32, 2048, real=True),
        Featurize("resnet18", 5, 2048, real=True),
    ),
    project=tuple(
        Project(d, b, p, threads)
        for d in (100_000, 480_000, 2_300_000)
        for b in (32, 256)
        for p in _SKETCHES
        for threads in (1, 2)
    ),
    score=(
        Score(20_000, exponents=True),
        Score(100_000, p=4096, rounds=5),
        Score(100_000, p=4096, checkpoints=4),
        Score(1_000_000, rounds=3),
    ),
    budget=60,
    cap=60,
    rounds=15,
)

PLANS = {"quick": QUICK, "default": DEFAULT, "full": FULL}
