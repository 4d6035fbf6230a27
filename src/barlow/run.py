"""A run: one folder that holds everything a training produced."""

import csv
import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from barlow import lock
from barlow.atomic import UNFINISHED, write_text
from barlow.errors import UserError, user_error_if_unreadable
from barlow.settings import Settings

log = logging.getLogger(__name__)

METRICS = [
    "step",
    "epoch",
    "seconds",
    "images_per_second",
    "lr",
    "loss",
    "invariance",
    "redundancy",
    "diagonal_error",
    "off_diagonal_rms",
    "val_loss",
    "val_invariance",
    "val_redundancy",
    "val_diagonal_error",
    "val_off_diagonal_rms",
    "knn_top1",
    "effective_rank",
    "rankme_representation",
    "rankme_embedding",
    "mean_abs_off_diagonal",
]

_ALWAYS = set(METRICS[:8])  # in every row

# Settings that may change when a run is resumed: they affect where and how often something is done,
# not what is done.
_MAY_CHANGE = {
    "accelerator",
    "compile",
    "devices",
    "epochs",
    "eval_every",
    "log_every",
    "max_broken",
    "minutes",
    "save_every",
    "save_minutes",
    "source",  # the images may have moved; their fingerprint is compared on resuming
    "track",
    "validation",
    "workers",
}


@dataclass(frozen=True)
class Run:
    """A run's folder and what is in it.

    Example:
        >>> Run("runs/a").metrics_file
        PosixPath('runs/a/metrics.csv')
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config_file(self) -> Path:
        """The settings, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """The training curves, as CSV with the columns `METRICS`."""
        return self.path / "metrics.csv"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that a run resumes from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def encoder_folder(self) -> Path:
        """The encoder as a timm folder."""
        return self.path / "encoder"

    @property
    def skipped_file(self) -> Path:
        """The images that could not be read, as CSV: id and reason."""
        return self.path / "skipped.csv"

    @property
    def starts_file(self) -> Path:
        """Time, machine and images of the start and of every resumed training, as JSON lines."""
        return self.path / "starts.jsonl"

    @property
    def report_file(self) -> Path:
        """The report of the run, as HTML."""
        return self.path / "report.html"

    @property
    def log_file(self) -> Path:
        """The log, with times."""
        return self.path / "log.txt"

    @property
    def evaluation_folder(self) -> Path:
        """The results of evaluations, as JSON."""
        return self.path / "evaluation"

    @property
    def trackers_file(self) -> Path:
        """The run's ids in experiment trackers, as JSON."""
        return self.path / "trackers.json"

    @property
    def tensorboard_folder(self) -> Path:
        """The event files of TensorBoard."""
        return self.path / "tensorboard"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint kept after this epoch."""
        return self.path / "checkpoints" / f"epoch-{epoch:04d}.ckpt"

    def evaluation_files(self) -> list[Path]:
        """The files in `evaluation_folder`, by name, without hidden ones such as those of macOS."""
        return sorted(self.evaluation_folder.glob("[!.]*.json"))

    @property
    def trained(self) -> bool:
        """Whether the run has a checkpoint or an encoder, which other settings would overwrite."""
        return self.encoder_folder.exists() or any(self.last_checkpoint.parent.glob("*.ckpt"))

    def settings(self) -> Settings:
        """The settings that the run was made with.

        Raises:
            UserError: if the file is damaged, or has a setting that this version does not know.
        """
        with user_error_if_unreadable(self.config_file):
            values = yaml.safe_load(self.config_file.read_bytes())
            return Settings(**{k: v for k, v in values.items() if not k.startswith("_")})

    def encoder(self) -> nn.Module:
        """The encoder, with the preprocessing it was trained with."""
        from barlow.share import load_encoder

        return load_encoder(self.path)

    def metrics(self, *, whole: bool = False) -> list[dict[str, float]]:
        """The rows of `metrics.csv`; a row has only the columns that were measured at its step.

        Args:
            whole: ignore what a power failure may leave after the last complete row.
        """
        if not self.metrics_file.exists():
            return []
        with user_error_if_unreadable(self.metrics_file):
            content = self.metrics_file.read_bytes()
            file = io.StringIO((_whole(content) if whole else content).decode(), newline="")
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            for row in rows:
                if missing := _ALWAYS - row.keys():
                    raise ValueError(f"a row has no {min(missing)}")
            return rows

    def add_metrics(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Append rows to `metrics.csv`, all or none of them.

        Raises:
            OSError: if the disk is full or the folder not writable.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS)
        with open(self.metrics_file, "ab", buffering=0) as file:
            end = file.tell()
            if not end:
                writer.writeheader()
            writer.writerows({k: _short(row[k]) for k in METRICS if k in row} for row in rows)
            line = text.getvalue().encode()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def add_start(self, start: Mapping[str, Any]) -> None:
        """Record that the training starts or resumes, with the time."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        before = self.starts_file.read_text() if self.starts_file.exists() else ""
        write_text(self.starts_file, before + json.dumps({"time": time, **start}) + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """What `add_start` recorded, oldest first."""
        if not self.starts_file.exists():
            return []
        with user_error_if_unreadable(self.starts_file):
            return [{**json.loads(line)} for line in self.starts_file.read_text().splitlines()]

    def skipped(self) -> dict[str, str]:
        """The images that could not be read, each with the reason."""
        if not self.skipped_file.exists():
            return {}
        with (
            user_error_if_unreadable(self.skipped_file),
            open(self.skipped_file, newline="") as file,
        ):
            return {row["id"]: row["reason"] for row in csv.DictReader(file)}

    def add_skipped(self, skipped: Iterable[tuple[str, str]]) -> int:
        """List images that could not be read, each once; returns how many are new."""
        known = self.skipped()
        every = dict(skipped) | known
        if len(every) > len(known):
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(["id", "reason"])
            writer.writerows(sorted(every.items()))
            write_text(self.skipped_file, text.getvalue())
        return len(every) - len(known)

    def clear_untrained(self, settings: Settings) -> None:
        """Delete the files of an earlier start with other settings that trained nothing."""
        if self.config_file.exists() and _changes(self.settings(), settings):
            for file in (
                self.metrics_file,
                self.starts_file,
                self.skipped_file,
                self.trackers_file,
                self.log_file,
            ):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.tensorboard_folder, ignore_errors=True)

    def truncate_metrics(self, step: int) -> None:
        """Drop rows of steps that a resumed run will repeat, and incomplete rows."""
        if not self.metrics_file.exists():
            return
        content = self.metrics_file.read_bytes()
        rows, broken = self.metrics(whole=True), len(content) - len(_whole(content))
        if broken:
            log.warning(
                "%s: dropped %d bytes after its last complete row", self.metrics_file, broken
            )
        elif not rows or rows[-1]["step"] <= step:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in r.items()} for r in rows if r["step"] <= step)
        write_text(self.metrics_file, text.getvalue())


def open_run(out: str | Path, settings: Settings) -> Run:
    """The run in a folder: a new one, or one made with the same settings.

    A run without a checkpoint also accepts other settings, since nothing is lost.

    Args:
        out: the folder.
        settings: of the new training.

    Returns:
        The run; nothing is written yet.

    Raises:
        UserError: if the folder holds something else, or a run with other settings.
    """
    run = Run(Path(out))
    if not run.path.exists():
        return run
    if not run.path.is_dir():
        raise UserError(f"--out {out} is a file: use a folder")
    if not run.config_file.exists():
        names = {path.name for path in run.path.iterdir()}
        if all(name == lock.NAME or fnmatch(name, UNFINISHED) for name in names):
            return run
        raise UserError(f"--out {out} contains other files but no run: use a new or empty folder")
    changed = _changes(run.settings(), settings)
    if changed and run.trained:
        raise UserError(
            f"--out {out} contains a run with different settings ({'; '.join(changed)}): "
            "use another folder, or the settings of that run"
        )
    return run


def _changes(old: Settings, new: Settings) -> list[str]:
    was, now = old.to_dict(), new.to_dict()
    changes = [
        f"{name} was {was[name]!r}, is {now[name]!r}"
        for name in was
        if name not in _MAY_CHANGE and was[name] != now[name]
    ]
    if new.minutes is None and new.epochs < old.epochs:
        changes.append(f"epochs was {old.epochs}, is {new.epochs} (it may only increase)")
    if (new.minutes is None) != (old.minutes is None) or (new.minutes or 0) < (old.minutes or 0):
        changes.append(f"minutes was {old.minutes}, is {new.minutes} (it may only increase)")
    return changes


def _whole(content: bytes) -> bytes:
    """Lines up to the last complete one: a power failure may leave half a line, or zero bytes."""
    content = content.partition(b"\0")[0]
    return content[: content.rfind(b"\n") + 1]


def _short(value: float) -> str:
    return f"{value:.7g}"
