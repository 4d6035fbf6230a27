"""Reports the progress of long work: to a reporter, `log.txt` and the logger."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from barlow.settings import Settings

log = logging.getLogger(__name__)

_SLOW, _FIRST, _EVERY = 2.0, 5.0, 30.0  # seconds


class Reporter:
    """Receives a training's progress; this base class ignores it."""

    def start(self, done: float, total: float, unit: str = "step") -> None:
        """The work starts; `done` of its `total` units are done already."""

    def step(self, done: float) -> None:
        """The work has reached `done` units."""

    def row(self, row: Mapping[str, float], text: str) -> None:
        """A row was added to `metrics.csv`; `text` is what `describe` makes of it."""

    def say(self, text: str) -> None:
        """Something happened that is worth a line."""

    def warn(self, text: str) -> None:
        """Something is wrong, but the work goes on."""
        self.say(text)

    def end(self) -> None:
        """The work has ended, successfully or not."""


def describe(row: Mapping[str, float], settings: Settings) -> str:
    """A row of `metrics.csv` as a line of text.

    Example:
        >>> describe({"epoch": 1.5, "step": 30, "loss": 12.0, "invariance": 7.0,
        ...           "redundancy": 980.4, "images_per_second": 99.6}, Settings("a", epochs=2))
        'epoch 1.50/2, step 30, loss 12, invariance 7, redundancy 980.4, 100 images/s'
    """
    if settings.minutes:
        reached = f"minute {row['seconds'] / 60:.2f}/{settings.minutes:g}, epoch {row['epoch']:.2f}"
    else:
        reached = f"epoch {row['epoch']:.2f}/{settings.epochs}"
    parts = [
        reached,
        f"step {row['step']:.0f}",
        f"loss {row['loss']:.4g}",
        f"invariance {row['invariance']:.4g}",
        f"redundancy {row['redundancy']:.4g}",
    ]
    if "val_loss" in row:
        parts.append(f"validation loss {row['val_loss']:.4g}")
    if "knn_top1" in row:
        parts.append(f"k-NN {row['knn_top1']:.1%}")
    return ", ".join([*parts, f"{row['images_per_second']:.0f} images/s"])


@contextmanager
def reporting(reporter: Reporter, done: float, total: float, unit: str = "step") -> Iterator[None]:
    """Report the start of the work inside and its end, whether or not it fails."""
    reporter.start(done, total, unit)
    try:
        yield
    finally:
        reporter.end()


@contextmanager
def log_if_slow(what: str) -> Iterator[Callable[[str], None]]:
    """Log what the work inside is if it takes longer than two seconds, then its progress.

    Yields:
        A function to call with the progress; it logs after five seconds, then at most every thirty.
    """
    timer = threading.Timer(_SLOW, log.info, [what])
    timer.daemon = True
    timer.start()
    due = time.monotonic() + _FIRST

    def reached(place: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _EVERY
            log.info("%s: %s", what, place)

    try:
        yield reached
    finally:
        timer.cancel()


class _ToFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        pass  # the disk is full: the line is lost, but training goes on


class _ToReporter(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def log_to(file: Path, reporter: Reporter) -> Iterator[None]:
    """Within it, what this package logs also goes to a file, and warnings to the reporter."""
    logger = logging.getLogger("barlow")
    to_file = _ToFile(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers, level = [to_file, _ToReporter(reporter)], logger.level
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
