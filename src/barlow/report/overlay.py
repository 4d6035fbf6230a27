"""Several runs on one page: their results, the settings that differ, and overlaid curves."""

from collections.abc import Sequence
from html import escape

from barlow.report.facts import Facts, verdict
from barlow.report.html import Section, document, table
from barlow.report.page import (
    CLOCK,
    PACE,
    TRAINING,
    curves,
    data_name,
    format_metric,
    results,
    seconds,
)


def overlay(runs: Sequence[Facts]) -> str:
    """The page of several runs.

    Args:
        runs: two or more runs with different names.

    Returns:
        A self-contained HTML page.
    """
    columns = dict.fromkeys(name.removeprefix("val_") for f in runs for name in f.columns())
    health = sorted(columns.keys() - {*TRAINING, *PACE, *CLOCK})
    evaluations = "".join(f"<h3>{escape(f.name)}</h3>{results(f)}" for f in runs if f.results)
    sections = [
        Section("worth", "Side by side", _summary(runs)),
        Section("settings", "Settings that differ", _differences(runs)),
        Section("training", "Training", curves(runs, TRAINING + PACE)),
        Section("health", "Health", curves(runs, health)),
        Section("evaluations", "Evaluations", evaluations),
    ]
    names = ", ".join(facts.name for facts in runs)
    head = f"<header><h1>{escape(names)}</h1></header>"
    return document(f"{names} - Barlow Twins", head, sections)


def _summary(runs: Sequence[Facts]) -> str:
    lines = [["run", "without", "with", "loss", "validation loss", "epochs", "training", "data"]]
    measured = set()
    for facts in runs:
        last = {name: facts.curve(name)[-1][1] for name in facts.columns()}
        found = verdict(facts)
        if found:
            measured.add(f"{facts.name}: {found.how}")
        lines.append(
            [
                facts.name,
                format_metric(found.without, found.metric) if found else "",
                format_metric(found.with_, found.metric) if found else "",
                *(f"{last[name]:.4g}" if name in last else "" for name in ("loss", "val_loss")),
                facts.progress,
                seconds(last.get("seconds", 0.0)),
                data_name(facts),
            ]
        )
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in sorted(measured))
    widths = {tuple(f.settings.projector[-1:]) for f in runs}
    if len(widths) > 1:
        notes += "<p>Losses are not comparable between embeddings of different widths.</p>"
    return table(lines, "Runs side by side") + notes


def _differences(runs: Sequence[Facts]) -> str:
    values = [facts.settings.to_dict() for facts in runs]
    lines = [
        [name, *(str(value[name]) for value in values)]
        for name in values[0]
        if any(value[name] != values[0][name] for value in values)
    ]
    if not lines:
        return "<p>None.</p>"
    return table(
        [["setting", *(facts.name for facts in runs)], *lines], "Settings that differ", "text"
    )
