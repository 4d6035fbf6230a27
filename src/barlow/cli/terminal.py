"""What the user sees in the terminal."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from barlow.errors import UserError
from barlow.progress import Reporter

if TYPE_CHECKING:
    from barlow.embeddings.sheet import Listing
    from barlow.evaluation import Result
    from barlow.evaluation.compare import Comparison

_ROWS, _SILENCE = 30.0, 60.0  # seconds between rows, and without any line


def reporter(quiet: bool = False, verbose: bool = False) -> Reporter:
    """A progress bar in a terminal, lines in a log; with `quiet`, warnings only."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose cannot be used together")
    if quiet:
        logging.getLogger("barlow.progress").setLevel(logging.WARNING)
        return Warnings()
    return Bar(verbose) if sys.stdout.isatty() else Lines(verbose)


class Warnings(Reporter):
    """Prints warnings only."""

    def warn(self, text: str) -> None:
        print(f"barlow: {text}", file=sys.stderr, flush=True)


class Lines(Reporter):
    """For logs: the first row, every row with a validation, and otherwise one every half minute.

    With `verbose`, every row. After a minute without a line, it says how far the work has come.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._row_at = -float("inf")

    def start(self, done: float, total: float, unit: str = "step") -> None:
        self._unit, self._total, self._said_at = unit, total, time.monotonic()

    def step(self, done: float) -> None:
        if time.monotonic() - self._said_at >= _SILENCE:
            self.say(f"{self._unit} {done:.0f} of {self._total:.0f}")

    def row(self, row: Mapping[str, float], text: str) -> None:
        looked = "val_loss" in row or "effective_rank" in row
        if self._verbose or looked or time.monotonic() - self._row_at >= _ROWS:
            self._row_at = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        self._said_at = time.monotonic()
        print(f"barlow: {text}", flush=True)


class Bar(Reporter):
    """A rich progress bar with k-NN, the loss, its two terms, images a second and the time left."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._knn = ""
        self._progress: Any = None

    def start(self, done: float, total: float, unit: str = "step") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn(unit + " {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", completed=done, total=total, terms="")
        self._progress.start()

    def step(self, done: float) -> None:
        self._progress.update(self._task, completed=done)

    def row(self, row: Mapping[str, float], text: str) -> None:
        if self._verbose:
            self.say(text)
        if "knn_top1" in row:
            self._knn = f"k-NN {row['knn_top1']:.1%}, "
        validation = f" (validation {row['val_loss']:.4g})" if "val_loss" in row else ""
        self._progress.update(
            self._task,
            terms=f"{self._knn}loss {row['loss']:.4g}{validation} = "
            f"invariance {row['invariance']:.4g} + lambd x redundancy {row['redundancy']:.4g}, "
            f"{row['images_per_second']:.0f} images/s",
        )

    def say(self, text: str) -> None:
        line = f"barlow: {text}"
        if self._progress:  # `out` does not read brackets in a path as markup
            self._progress.console.out(line, highlight=False)
        else:
            print(line)

    def end(self) -> None:
        self._progress.stop()


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"barlow: {record.getMessage()}", file=sys.stderr)


def log_to_stderr() -> None:
    """From now on, log to stderr what was found in another project's file, and what is slow."""
    for name in ("barlow.share", "barlow.progress"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [_ToStderr()]


def print_table(result: "Result | Comparison | Listing") -> None:
    """Print a result: as a drawn table in a terminal, as plain text in a log."""
    from rich.console import Console

    console = Console()
    # A log has no width that a table would have to be squeezed into.
    if console.is_terminal:
        console.print(result.table())
    else:
        print(result)
