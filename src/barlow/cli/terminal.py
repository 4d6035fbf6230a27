"""What a person sees in the terminal."""

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from barlow.errors import UserError
from barlow.progress import Reporter

if TYPE_CHECKING:
    from barlow.embeddings.sheet import Listing
    from barlow.evaluation import Result
    from barlow.evaluation.compare import Comparison


def reporter(quiet: bool = False, verbose: bool = False) -> Reporter:
    """A bar in a terminal, lines in a log."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose are both given: give one of them")
    if quiet:
        return Warnings()
    return Bar(verbose) if sys.stdout.isatty() else Lines(verbose)


class Warnings(Reporter):
    """Only what is not as it should be."""

    def warn(self, text: str) -> None:
        print(f"barlow: {text}", file=sys.stderr, flush=True)


class Lines(Reporter):
    """One line an epoch, or for every row of `metrics.csv`, for logs."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def row(self, row: Mapping[str, float], text: str) -> None:
        if self._verbose or float(row["epoch"]).is_integer():
            self.say(text)

    def say(self, text: str) -> None:
        print(f"barlow: {text}", flush=True)


class Bar(Reporter):
    """A rich progress bar with the loss, its two terms, images a second and the time left."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
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
        validation = f" (validation {row['val_loss']:.4g})" if "val_loss" in row else ""
        self._progress.update(
            self._task,
            terms=f"loss {row['loss']:.4g}{validation} = invariance {row['invariance']:.4g} + "
            f"lambd x redundancy {row['redundancy']:.4g}, {row['images_per_second']:.0f} images/s",
        )

    def say(self, text: str) -> None:
        line = f"barlow: {text}"
        if self._progress:  # `out`: brackets in a path are no markup
            self._progress.console.out(line, highlight=False)
        else:
            print(line)

    def end(self) -> None:
        self._progress.stop()


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"barlow: {record.getMessage()}", file=sys.stderr)


def tell_origins() -> None:
    """From now on, say on stderr what was recognised in a file of another project."""
    logger = logging.getLogger("barlow.share")
    logger.setLevel(logging.INFO)
    logger.handlers = [_ToStderr()]


def print_table(result: "Result | Comparison | Listing") -> None:
    """Print a result: drawn in a terminal, plain in a log."""
    from rich.console import Console

    console = Console()
    # A log has no width that a table would have to be squeezed into.
    if console.is_terminal:
        console.print(result.table())
    else:
        print(result)
