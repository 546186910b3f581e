"""Processes that can be killed, stopped or cut short at a chosen file-system event.

They are forked from a parent that has imported everything and started no thread, so one
costs milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Report = Callable[[str], None]
Job = Callable[[Report], None]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.truncate"}


def warm_up() -> None:
    """Import what ``torch.func`` imports at its first use, without starting threads."""
    torch.set_num_threads(1)
    torch.func.vmap(torch.func.grad(lambda x: (x * x).sum()))(torch.ones(2, 2))


@dataclass(frozen=True, slots=True)
class Trap:
    """Sends a signal to the process itself when it comes to a file-system event."""

    directory: Path
    """Events elsewhere do not count."""

    at: int
    """Number of the event, from 0; the signal comes just before it."""

    number: int = signal.SIGKILL
    """The signal."""

    def install(self, report: Report | None = None) -> None:
        """Start counting, and naming every event to ``report`` if there is one."""
        count = 0

        def event(name: str) -> bool:
            nonlocal count
            count += 1
            if report is not None:
                report(f"event {name}")
            return count - 1 == self.at

        def step(name: str) -> None:
            if event(name):
                os.kill(os.getpid(), self.number)

        sys.addaudithook(lambda name, args: self._audit(step, name, args))
        for module, name in ((os, "fsync"), (os, "posix_fallocate")):
            setattr(module, name, _before(getattr(module, name), step, name))
        io.open = self._opening(step)
        np.memmap.flush = _before(np.memmap.flush, step, "flush")
        np.memmap.__setitem__ = self._tearing(step, event)

    def _opening(self, step: Report) -> Any:
        opening = io.open

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opening(path, mode, *args, **kwargs)
            if "w" in mode and self.directory in Path(path).parents:
                step("empty file")
            return file

        return opened

    def _audit(self, step: Report, name: str, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], str | os.PathLike):
            return
        is_write = name == "open" and args[2] & WRITING
        if (is_write or name in AUDITED) and self.directory in Path(args[0]).parents:
            step(name)

    def _tearing(self, step: Report, event: Callable[[str], bool]) -> Any:
        def write(array: np.memmap, key: Any, value: Any) -> None:
            step("write")
            if event("half of a write"):
                new = np.array(array[key])
                old = new.copy()
                new[...] = value
                half = new.size // 2
                new.reshape(-1)[half:] = old.reshape(-1)[half:]
                np.ndarray.__setitem__(array, key, new)
                os.kill(os.getpid(), self.number)
            np.ndarray.__setitem__(array, key, value)

        return write


def _before(function: Any, step: Report, name: str) -> Any:
    def wrapped(*args: Any) -> Any:
        step(name)
        return function(*args)

    return wrapped


@dataclass(slots=True)
class Child:
    """A running process and what it reports."""

    pid: int
    _reports: int
    _gate: int
    _text: str = ""

    def go(self) -> float:
        """Wait until the process is ready, and let it begin.

        Returns:
            When it began.
        """
        while "\n" not in self._text and (data := os.read(self._reports, 1 << 16)):
            self._text += data.decode()
        os.write(self._gate, b"!")
        return time.perf_counter()

    def send(self, number: int) -> None:
        """Send it a signal; it may have ended already, but nobody has waited for it."""
        os.kill(self.pid, number)

    def wait_until_stopped(self) -> None:
        """Wait until it stops.

        Raises:
            RuntimeError: If it ends instead.
        """
        status = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if status is None or status.si_code != os.CLD_STOPPED:
            self.end()
            raise RuntimeError("the process ended where it should have stopped")

    def end(self) -> Ended:
        """Wait for its end.

        Returns:
            How it ended.

        Raises:
            RuntimeError: If it ended by an error of its own.
        """
        while data := os.read(self._reports, 1 << 16):
            self._text += data.decode()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._reports)
        os.close(self._gate)
        lines = self._text.splitlines()
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            errors = [line for line in lines if line.startswith("error ")]
            raise RuntimeError("; ".join(errors) or "the process failed")
        events = [line.removeprefix("event ") for line in lines if line[:6] == "event "]
        stages = [line for line in lines if line[:6] != "event "]
        return Ended(os.WIFSIGNALED(status), stages[-1] if stages else "start", events)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    killed: bool
    stage: str
    """The last that it reported."""

    events: list[str]
    """All file-system events, if they were asked for."""


def start(job: Job, trap: Trap | None = None, *, list_events: bool = False) -> Child:
    """Fork a process that waits for :meth:`Child.go` and then does a job.

    Args:
        job: What to do; it is given a function that reports a stage.
        trap: Where to cut it short.
        list_events: Whether to report every event that the trap counts.

    Returns:
        The process.

    Raises:
        RuntimeError: If this process has threads, which a fork would lose.
    """
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  no paths wanted
    if threads > 1:
        raise RuntimeError(f"{threads} threads run here; a fork would lose them.")
    reading, writing = os.pipe()
    gate, key = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        os.close(gate)
        return Child(pid, reading, key)
    os.close(key)

    def report(line: str) -> None:
        os.write(writing, f"{line}\n".encode())

    status = 1
    try:
        report("ready")
        os.read(gate, 1)
        if trap is not None:
            trap.install(report if list_events else None)
        job(report)
        report("done")
        status = 0
    except BaseException as error:  # noqa: BLE001  it must not leave this process
        with contextlib.suppress(OSError):
            report(f"error {type(error).__name__}: {error}".replace("\n", " "))
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
    finally:
        os._exit(status)


def run(job: Job, trap: Trap | None = None, *, list_events: bool = False) -> Ended:
    """Do a job in a process of its own, to its end."""
    child = start(job, trap, list_events=list_events)
    child.go()
    return child.end()


@contextlib.contextmanager
def running(job: Job, trap: Trap | None = None) -> Iterator[Child]:
    """Run a job while the block does something else; it is killed if the block fails."""
    child = start(job, trap)
    child.go()
    try:
        yield child
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
            child.send(signal.SIGKILL)
            os.waitpid(child.pid, 0)
        raise
