"""Stopping a training between two steps when the system or a person asks for it."""

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

_SIGNALS = ["SIGINT", "SIGTERM", "SIGUSR1"]


def requeue() -> bool:
    """Ask SLURM to start this job again; False if this is none of its jobs, or it will not."""
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("SLURM's job %s is not queued again: %s", job, error)
        return False
    return True


@dataclass
class Stop:
    """Whether a signal has asked for the end, and which."""

    signal: str | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) instead of dying of them.

    The handlers act once: a second signal of the same kind has its usual effect.

    Yields:
        An object whose `signal` is the name of the signal that came, if any.
    """
    stop = Stop()
    usual: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name
        signal.signal(number, usual[number])

    try:
        for name in _SIGNALS:
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
