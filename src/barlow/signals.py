"""Stopping a training between two steps when the system or a person asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_SIGNALS = ["SIGINT", "SIGTERM", "SIGUSR1"]


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
