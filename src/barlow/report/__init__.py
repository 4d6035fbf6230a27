"""The report of a run: one HTML page that opens from disk."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from barlow.errors import one_line

if TYPE_CHECKING:
    from barlow.report.analysis import Analysis
    from barlow.run import Run

log = logging.getLogger(__name__)


def write_report(runs: Sequence[str], *, out: str | None = None) -> Path:
    """Write the report of a run, or a comparison of several, as one self-contained HTML file.

    Args:
        runs: folder of a run, or of several runs to draw in the same charts.
        out: HTML file to write; default: report.html in the run, or for several runs
            comparison.html in the first.

    Returns:
        The file.

    Raises:
        UserError: if a folder is not a run, or a file in it is damaged.
    """
    from barlow.atomic import write_text
    from barlow.report.facts import collect
    from barlow.report.overlay import overlay
    from barlow.report.page import page
    from barlow.run import Run

    facts = [collect(Run(Path(run))) for run in runs]
    if len({one.name for one in facts}) < len(facts):
        facts = [replace(one, name=str(one.path)) for one in facts]
    first, alone = Run(Path(runs[0])), len(runs) == 1
    path = Path(out) if out else first.report_file if alone else first.path / "comparison.html"
    write_text(path, page(facts[0], analyse_or_none(first)) if alone else overlay(facts))
    return path


def analyse_or_none(run: "Run") -> "Analysis | None":
    """The analysis of images by a run's encoder; None, with a warning, if it fails."""
    from barlow.report.analysis import analyse

    try:
        return analyse(run)
    except Exception as error:  # the rest of the page is still useful
        log.warning("the report of %s omits the images: %s", run.path, one_line(error))
        return None
