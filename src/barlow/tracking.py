"""Sends the rows of `metrics.csv`, settings and pictures to experiment trackers as well."""

import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from operator import methodcaller
from pathlib import Path
from typing import Any

from PIL import Image

from barlow.atomic import write_text
from barlow.checkpoint import load_last
from barlow.errors import UserError, one_line
from barlow.progress import Reporter
from barlow.run import Run
from barlow.settings import Settings
from barlow.trackers import OPENERS, Tracker

log = logging.getLogger(__name__)


def tracked(reporter: Reporter | None, settings: Settings, run: Run) -> Reporter | None:
    """A reporter that also reports to the trackers named in the settings.

    Args:
        reporter: receives the same as without trackers.
        settings: `track` names the trackers.
        run: where the trackers' run ids are kept, so that a resumed training continues the same
            tracker runs.

    Returns:
        The reporter itself if there is no tracker.

    Raises:
        UserError: if a tracker is not installed.
    """
    for name in settings.track:
        if importlib.util.find_spec(OPENERS[name][0]) is None:
            raise UserError(f"--track {name}: {name} is not installed; run pip install {name}")
    return Tracked(reporter or Reporter(), settings, run) if settings.track else reporter


class Tracked(Reporter):
    """Reports to one reporter and several trackers; one that fails is dropped with a warning."""

    def __init__(self, reporter: Reporter, settings: Settings, run: Run) -> None:
        self._reporter, self._settings, self._run = reporter, settings, run
        # Read now, before a resumed training drops the rows that it will make again.
        self._last_logged_step = _last_step(run)
        self._sent: dict[str, float] = {}  # the last step that each tracker has received
        self._trackers: dict[str, Tracker] = {}
        self._done = self._total = 0.0
        self._step = 0

    def start(self, done: float, total: float, unit: str = "step") -> None:
        """Open the trackers; one that is new to the run receives all rows so far."""
        self._reporter.start(done, total, unit)
        self._done, self._total = done, total
        kept = _kept(self._run)
        for name in self._settings.track:
            self._try(name, self._open, name, kept.get(name))
        kept |= {name: tracker.id for name, tracker in self._trackers.items()}
        try:
            write_text(self._run.trackers_file, json.dumps(kept) + "\n")
        except OSError as error:
            log.warning(
                "cannot save tracker ids, so resuming will start new tracker runs: %s",
                one_line(error),
            )
        if not done:
            self._show("views", self._views)

    def step(self, done: float) -> None:
        """Tell the reporter; trackers receive rows only."""
        self._done = done
        self._reporter.step(done)

    def row(self, row: Mapping[str, float], text: str) -> None:
        """Send a row, unless a tracker has it already from before the training was resumed."""
        self._reporter.row(row, text)
        self._step = int(row["step"])
        for name, tracker in list(self._trackers.items()):
            if row["step"] > self._sent[name]:
                self._try(name, _send, tracker, row)

    def say(self, text: str) -> None:
        """Tell the reporter."""
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        """Tell the reporter."""
        self._reporter.warn(text)

    def end(self) -> None:
        """Close the trackers, after sending the last pictures if the training is finished."""
        self._reporter.end()
        if self._done >= self._total:
            self._show("matrix", self._matrices)
        self._each(methodcaller("end"))

    def _open(self, name: str, identity: str | None) -> None:
        tracker = OPENERS[name][1](self._run, self._settings, identity)
        self._trackers[name] = tracker
        self._sent[name] = self._last_logged_step if identity else _last_step(self._run)
        if identity is None:
            for row in self._run.metrics():
                _send(tracker, row)

    def _views(self) -> dict[str, Image.Image]:
        from barlow.assembly import draw_source_views

        with tempfile.TemporaryDirectory() as folder:
            drawn = draw_source_views(self._settings, Path(folder) / "views.png")
            with Image.open(drawn) as picture:
                return {"views": picture.convert("RGB")}

    def _matrices(self) -> dict[str, Image.Image]:
        from barlow.assembly import training_images
        from barlow.correlation_matrices import heat_map, initial_and_current

        state = load_last(self._run.last_checkpoint)
        if state is None:
            return {}
        source = training_images(self._settings).spread(min(256, self._settings.batch_size))
        matrices = initial_and_current(self._settings, state, source)
        names = ("matrix_at_the_start", "matrix_at_the_end")
        return {name: _on_white(heat_map(m)) for name, m in zip(names, matrices, strict=True)}

    def _show(self, what: str, draw: Callable[[], dict[str, Image.Image]]) -> None:
        if not self._trackers:
            return
        try:
            pictures = draw()
        except Exception as error:
            log.warning("cannot draw the %s for the trackers: %s", what, one_line(error))
            return
        for name, picture in pictures.items():
            self._each(methodcaller("image", name, picture, self._step))

    def _each(self, tell: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, tell, tracker)

    def _try(self, name: str, act: Callable[..., object], *arguments: Any) -> None:
        """Call a tracker, which must not stop a training, nor print into its progress."""
        try:
            with redirect_stdout(StringIO()):
                act(*arguments)
        except Exception as error:
            self._trackers.pop(name, None)
            log.warning("%s failed and is disabled from now on: %s", name, one_line(error))


def _last_step(run: Run) -> float:
    rows = run.metrics(whole=True)
    return rows[-1]["step"] if rows else -1.0


def _send(tracker: Tracker, row: Mapping[str, float]) -> None:
    """Log a row without its step, which says where a tracker puts the values."""
    tracker.log({k: v for k, v in row.items() if k != "step"}, int(row["step"]))


def _on_white(picture: Image.Image) -> Image.Image:
    colours = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colours).convert("RGB")


def _kept(run: Run) -> dict[str, str]:
    try:
        return dict(json.loads(run.trackers_file.read_text()))
    except (OSError, TypeError, ValueError):
        return {}
