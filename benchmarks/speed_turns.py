"""The parent's side: worker processes, and turns that alternate between them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("speed_worker.py")


class WorkerError(Exception):
    """A worker could not do what it was asked for."""


class Worker:
    """A process that runs one library.

    Args:
        python: The interpreter of the library's environment.
        threads: Threads it may use.
        directory: For its stores.
        show: Whether what it prints is shown.
    """

    def __init__(
        self, python: str, threads: int, directory: Path, *, show: bool = False
    ) -> None:
        keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if Path(python) == Path(sys.executable):
            keep = dict(os.environ)  # the library may be found by PYTHONPATH
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        self.process = subprocess.Popen(
            [python, str(WORKER)],
            env={
                **keep,
                **dict.fromkeys(names, str(threads)),
                "TMPDIR": str(directory),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show else subprocess.DEVNULL,
            text=True,
        )
        self.replies: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put("")
        self.replies.put("")  # for whoever asks once more

    def ask(self, do: str, limit: float = 3600.0, **named: Any) -> dict[str, Any]:
        """Ask for something and wait for the reply.

        Args:
            do: The command.
            limit: Seconds to wait; then the process is killed.
            **named: The command's arguments.

        Returns:
            The reply.

        Raises:
            WorkerError: If the command failed, took too long, or ended the process.
        """
        try:
            self.process.stdin.write(json.dumps({"do": do, **named}) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=limit)
        except queue.Empty:
            self.process.kill()
            raise WorkerError(f"stopped after {limit:.0f} s in {do}") from None
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            raise WorkerError(f"the process ended in {do} with status {code}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # what was not sent cannot be
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join()
        self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plain(reply: dict[str, Any]) -> tuple[float, float]:
    return reply["wall"], reply["cpu"]


@dataclass(slots=True)
class Series:
    """One thing that is timed, turn after turn."""

    name: str
    worker: Worker
    request: dict[str, Any]
    """What a turn asks for."""

    examples: int
    """Examples that one turn goes through."""

    expected: float
    """Seconds that one turn will take."""

    read: Callable[[dict[str, Any]], tuple[float, float]] = plain
    """From the reply to seconds of wall and of processor time."""

    turns: list[tuple[int, float, float]] = field(default_factory=list)
    """Round, and milliseconds an example of wall and of processor time."""

    error: str = ""
    """Why there are no more turns."""

    def turn(self, number: int) -> None:
        if self.error:
            return
        try:
            limit = 60 + 10 * self.expected
            wall, cpu = self.read(self.worker.ask(limit=limit, **self.request))
        except WorkerError as error:
            self.error = str(error)
            return
        scale = 1e3 / self.examples
        self.turns.append((number, wall * scale, cpu * scale))


def spread(rounds: int, turns: int) -> set[int]:
    """Choose ``turns`` of the rounds, evenly.

    Returns:
        Their numbers.
    """
    turns = min(turns, rounds)
    return {round((k + 0.5) * rounds / turns - 0.5) for k in range(turns)}


def interleave(
    steady: Sequence[Series], slow: Sequence[Series], budget: float, most: int
) -> None:
    """Make turns, one series after the other and in reverse in every other round.

    Args:
        steady: What takes a turn in every round, at least three.
        slow: What takes a turn in as many rounds as half the budget allows, at least one.
        budget: Seconds for all of it.
        most: The most rounds.
    """
    together = sum(one.expected for one in steady)
    rounds = max(min(3, most), min(most, int(budget / 2 / max(together, 1e-9))))
    every = set(range(rounds))
    chosen = [(one, every) for one in steady]
    for one in slow:
        turns = int(budget / 2 / len(slow) / one.expected)
        chosen.append((one, spread(rounds, max(1, turns))))
    for number in range(rounds):
        for one, numbers in reversed(chosen) if number % 2 else chosen:
            if number in numbers:
                one.turn(number)


def ratio(above: Series, below: Series, clock: int = 1) -> dict[str, float]:
    """Compare two series round by round, so that what slows both cancels.

    Args:
        above: The numerator.
        below: The denominator.
        clock: 1 for wall time, 2 for processor time.

    Returns:
        The median, least and greatest ratio and the number of rounds; empty where one
        side has no turn.
    """
    by_round = {turn[0]: turn[clock] for turn in below.turns}
    found = [t[clock] / by_round[t[0]] for t in above.turns if t[0] in by_round]
    if not found:
        return {}
    return {
        "median": statistics.median(found),
        "least": min(found),
        "greatest": max(found),
        "rounds": len(found),
    }


def calls_for(seconds: float, wanted: float, most: int) -> int:
    """Say how many calls of ``seconds`` make a turn of at least ``wanted`` seconds."""
    return max(1, min(most, round(wanted / max(seconds, 1e-6))))
