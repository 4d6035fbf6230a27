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
_ONCE = 0.5  # seconds within which a signal sent to all processes and also passed on counts once


def requeue() -> bool:
    """Ask SLURM to start this job again; False if this is not a SLURM job or SLURM refuses."""
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
    """The first signal that asked training to stop, if any, and whether SLURM sent its warning."""

    signal: str | None = None
    warned: bool = False


@contextmanager
def stop_on_signals(pass_on: bool = False) -> Iterator[Stop]:
    """Record SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) instead of ending at once.

    A second signal of the same kind has its usual effect.

    Args:
        pass_on: send each signal on to the child processes, for which this one only waits.

    Yields:
        An object whose `signal` is the name of the first signal that came, if any.
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
        pass  # not in the main thread, the only one that may set signal handlers
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
