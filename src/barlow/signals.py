"""Stopping a training between two steps when the system or a person asks for it."""

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

# Windows has no SIGUSR1.
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_ONCE = 0.5  # seconds within which a signal is the same: sent to all, and passed on by the parent


def requeue() -> bool:
    """Ask SLURM to start this job again; False if this is none of its jobs, or it will not."""
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("cannot requeue SLURM job %s: %s", job, error)
        return False
    return True


@dataclass
class Stop:
    """Whether a signal has asked for the end, which came first, and whether SLURM warned."""

    signal: str | None = None
    warned: bool = False


@contextmanager
def stop_on_signals(pass_on: bool = False) -> Iterator[Stop]:
    """Note SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) instead of dying of them.

    A second signal of the same kind has its usual effect.

    Args:
        pass_on: to the child processes, of which this one only waits for the end.

    Yields:
        An object whose `signal` is the name of the signal that came, if any.
    """
    stop = Stop()
    usual: dict[int, Any] = {}
    came: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if number not in came:
            name = signal.Signals(number).name
            stop.signal = stop.signal or name
            stop.warned |= name == "SIGUSR1"
            came[number] = time.monotonic()
            for child in multiprocessing.active_children() if pass_on else ():
                if child.pid:
                    os.kill(child.pid, number)
        elif time.monotonic() - came[number] > _ONCE:
            signal.signal(number, usual[number])
            os.kill(os.getpid(), number)

    try:
        for name in SIGNALS:
            number = getattr(signal, name)
            usual[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:
        pass  # not in the main thread: Python leaves signals to that one
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
