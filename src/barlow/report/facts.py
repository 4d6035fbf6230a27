"""What a run's folder records about it, without its images or its encoder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barlow.errors import UserError
from barlow.evaluation.baselines import WITH_PRETRAINING, WITHOUT_PRETRAINING
from barlow.evaluation.result import Result, Row
from barlow.run import Run
from barlow.settings import Settings

_POINTS = 4_000  # at most per curve, so that a page of 10 MB holds some twenty curves

Curve = list[tuple[float, float]]  # (epoch, value)


@dataclass(frozen=True)
class Facts:
    """A run as plain data.

    Attributes:
        name: the name of its folder.
        path: the folder, as it was given.
        settings: all its settings.
        rows: the rows of `metrics.csv`.
        results: the results in `RUN/evaluation/`, the newest first.
        starts: time, step, images and environment of the start and of each resumption.
        warnings: time and text of each warning and error that was logged.
        skipped: id and reason of each image that could not be read.
    """

    name: str
    path: Path
    settings: Settings
    rows: list[dict[str, float]]
    results: list[Result]
    starts: list[dict[str, Any]]
    warnings: list[tuple[str, str]]
    skipped: list[tuple[str, str]]

    @property
    def epochs_done(self) -> float:
        """The number of passes over the images so far."""
        return self.rows[-1]["epoch"] if self.rows else 0.0

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or, with a time limit, the time is up."""
        if self.settings.minutes:
            return bool(self.rows) and self.rows[-1]["seconds"] >= 60 * self.settings.minutes
        return self.epochs_done >= self.settings.epochs

    @property
    def progress(self) -> str:
        """How many epochs are done, such as "12 of 100"."""
        done = f"{self.epochs_done:.4g}"
        if self.settings.minutes:
            return f"{done} in {self.settings.minutes:g} minutes" if self.finished else done
        return f"{done} of {self.settings.epochs}"

    def columns(self) -> list[str]:
        """The columns of `metrics.csv` that were measured, in its order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def curve(self, column: str) -> Curve:
        """Epochs and values of a column; a very long one is reduced to evenly spaced rows."""
        points = [(row["epoch"], row[column]) for row in self.rows if column in row]
        stride = -(-len(points) // _POINTS) or 1
        # Stride from the end, so that the last value is always kept.
        return points[::-1][::stride][::-1]


def collect(run: Run) -> Facts:
    """Read a run's folder.

    Raises:
        UserError: if it is not the folder of a run, or a file in it is damaged.
    """
    if not run.config_file.exists():
        raise UserError(f"no run at {run.path}: give the folder that `barlow pretrain` wrote")
    results = sorted(run.evaluation_files(), key=lambda p: p.stat().st_mtime, reverse=True)
    return Facts(
        run.path.resolve().name,
        run.path,
        run.settings(),
        run.metrics(),
        [Result.load(path) for path in results],
        run.starts(),
        _warnings(run.log_file),
        list(run.skipped().items()),
    )


@dataclass(frozen=True)
class Verdict:
    """What pretraining was worth, in two numbers.

    Attributes:
        without: the number without pretraining.
        with_: the number with it.
        metric: its name in a result, such as "val_top1".
        how: how it was measured, in words.
    """

    without: float
    with_: float
    metric: str
    how: str


def verdict(facts: Facts) -> Verdict | None:
    """The verdict from the newest linear result, else from the newest result of any kind."""
    for result in sorted(facts.results, key=lambda r: r.protocol != "linear"):
        without, with_ = _row(result, WITHOUT_PRETRAINING), _row(result, WITH_PRETRAINING)
        if without is None or with_ is None:
            continue
        for metric in ("val_top1", "val_map", "val_r2"):
            if metric in with_.values and metric in without.values:
                how = describe_protocol(result)
                return Verdict(without.values[metric], with_.values[metric], metric, how)
    return None


def describe_protocol(result: Result) -> str:
    """How a result was measured, in words.

    Example:
        >>> describe_protocol(Result("linear", (), {"labels_per_class": 10}))
        'linear classifier on the frozen encoder, 10 labels per class'
    """
    words = {
        "linear": "linear classifier on the frozen encoder",
        "knn": "k nearest neighbours",
        "finetune": "fine-tuning of the whole network",
        "health": "measures that need no labels",
    }
    parts = [words.get(result.protocol, result.protocol)]
    if number := result.settings.get("labels_per_class"):
        parts.append(f"{number} labels per class")
    if share := result.settings.get("label_fraction"):
        parts.append(f"{share:.3g} of the labels")
    if epochs := result.settings.get("epochs"):
        parts.append(f"{epochs} epochs")
    return ", ".join(parts)


def _row(result: Result, name: str) -> Row | None:
    """The first row of that name; k-NN has one for each k."""
    return next((row for row in result.rows if row.name.split(",")[0] == name), None)


def _warnings(log: Path) -> list[tuple[str, str]]:
    if not log.exists():
        return []
    text = log.read_text(errors="replace")
    found = re.finditer(r"^(\S+ [\d:]+),\d+ (?:WARNING|ERROR) (.*)$", text, re.MULTILINE)
    return [(match[1], match[2]) for match in found]
