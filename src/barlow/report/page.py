"""A run as one page: first its results, then the evidence for them."""

from collections.abc import Sequence
from html import escape

from barlow.command import command
from barlow.report.analysis import Analysis
from barlow.report.charts import Series, chart, number
from barlow.report.facts import Facts, Verdict, describe_protocol, verdict
from barlow.report.html import Section, document, folded, listing, table
from barlow.report.pictures import confusion, map_of, matrices, neighbours, spectra, views

# Titles of charts by column of metrics.csv. Other columns are titled by their own name.
TITLES = {
    "loss": "Loss",
    "invariance": "Invariance term",
    "redundancy": "Redundancy-reduction term",
    "diagonal_error": "Diagonal error per feature",
    "off_diagonal_rms": "Off-diagonal correlation, RMS",
    "lr": "Learning rate",
    "images_per_second": "Throughput, images per second",
    "knn_top1": "k-NN top-1",
    "effective_rank": "Effective rank of the representation",
    "rankme_representation": "RankMe of the representation",
    "rankme_embedding": "RankMe of the embedding",
    "mean_abs_off_diagonal": "Mean correlation of two features of the embedding",
}
TRAINING = ("loss", "invariance", "redundancy", "diagonal_error", "off_diagonal_rms")
PACE = ("lr", "images_per_second")
CLOCK = ("step", "epoch", "seconds")
_LISTED = 100  # at most: warnings, and images that cannot be read


def page(facts: Facts, analysis: Analysis | None, *, live: str = "") -> str:
    """The page of one run.

    Args:
        facts: what the run's folder records.
        analysis: the analysis of images by its encoder, if the images were available.
        live: version of the page, if it should ask its server for updates.

    Returns:
        A self-contained HTML page.
    """
    columns = {name.removeprefix("val_") for name in facts.columns()}
    health = sorted(columns - {*TRAINING, *PACE, *CLOCK})
    sections = [
        Section("worth", "Results", _worth(facts, analysis)),
        Section("data", "Training data", _data(facts, analysis)),
        Section("training", "Training", _training(facts) if facts.rows else ""),
        Section("health", "Health", _health(facts, health, analysis)),
        Section("matrix", "Cross-correlation matrix", matrices(analysis) if analysis else ""),
        Section("neighbours", "Nearest neighbours", neighbours(analysis) if analysis else ""),
        Section("map", "Map of the representation", map_of(analysis) if analysis else ""),
        Section("events", "Events during training", _events(facts)),
        Section("settings", "Settings and command", _settings(facts)),
    ]
    return document(f"{facts.name} - Barlow Twins", _head(facts, analysis), sections, live)


def curves(runs: Sequence[Facts], columns: Sequence[str]) -> str:
    """A chart of each column and its validation counterpart, for one run or several.

    Args:
        runs: the runs whose `metrics.csv` is drawn.
        columns: names of columns; those that no run has are left out.

    Returns:
        HTML; empty if there is nothing to draw.
    """
    charts = []
    for column in columns:
        series = []
        for i, facts in enumerate(runs):
            own = f"{facts.name}, " if len(runs) > 1 else ""
            twin = facts.curve(f"val_{column}")
            colour = i % 6
            name = f"{own}training" if twin else facts.name if own else _title(column).lower()
            series.append(Series(name, facts.curve(column), colour, dashed=bool(own and twin)))
            series.append(Series(f"{own}validation", twin, colour if own else 1))
        charts.append(chart(_title(column), series))
    body = "".join(charts)
    return f'<div class="grid">{body}</div>' if body else ""


def results(facts: Facts) -> str:
    """The tables of `RUN/evaluation/`, the newest first."""
    parts = []
    for result in facts.results:
        title = describe_protocol(result).capitalize()
        parts.append(f"<h3>{escape(title)}</h3>{table(result.cells(), title)}")
        parts.append(f'<p class="soft">{escape(result.caption())}</p>')
    return "".join(parts)


def format_metric(value: float, metric: str) -> str:
    """Format a number of a result; accuracies are in percent.

    Example:
        >>> format_metric(0.857, "val_top1"), format_metric(0.5, "val_r2")
        ('85.7 %', '0.500')
    """
    return f"{100 * value:.1f} %" if "top" in metric else f"{value:.3f}"


def seconds(value: float) -> str:
    """Format a duration for a person to read.

    Example:
        >>> seconds(42), seconds(250), seconds(7500)
        ('42 s', '4 min 10 s', '2 h 5 min')
    """
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def data_name(facts: Facts) -> str:
    """The number of training images and the name of their source."""
    data = facts.starts[-1]["data"] if facts.starts else None
    if data is None:
        return facts.settings.source
    return f"{data['images']:,} images of {data['name']}"


def _head(facts: Facts, analysis: Analysis | None) -> str:
    settings = facts.settings
    encoder = f"the encoder of {settings.init}" if settings.init else settings.encoder
    what = f"{encoder}, trained with Barlow Twins on {data_name(facts)}"
    state = "finished" if facts.finished else f"not finished: {facts.progress} epochs done"
    head = f'<header><h1>{escape(facts.name)}</h1><p class="soft">{escape(what)}; {state}.</p>'
    if found := verdict(facts):
        head += _verdict(found)
    elif analysis and analysis.knn:
        trained_on = "training images, whose labels were not used in training"
        how = f"vote of the 20 nearest of {analysis.bank:,} labelled training images"
        head += _verdict(
            Verdict(*analysis.knn, "val_top1", how),
            "held-out images" if analysis.held_out else trained_on,
        )
    last = facts.rows[-1] if facts.rows else {}
    cards = [("epochs", facts.progress)]
    for column, name in (("loss", "training loss"), ("val_loss", "validation loss")):
        if curve := facts.curve(column):
            cards.append((name, f"{number(curve[0][1])} &rarr; {number(curve[-1][1])}"))
    if last:
        cards.append(("training", seconds(last["seconds"])))
        cards.append(("images per second", number(last["images_per_second"])))
    if analysis:
        cards.append(("parameters", number(analysis.parameters)))
    return head + listing(cards, "cards") + "</header>"


def _verdict(found: Verdict, images: str = "test images") -> str:
    names = {"val_top1": "top-1 accuracy", "val_map": "mean average precision", "val_r2": "R²"}
    without, with_ = (format_metric(v, found.metric) for v in (found.without, found.with_))
    name = names[found.metric]
    return (
        f'<p class="verdict"><s aria-label="without pretraining {without}">{without}</s>'
        f'<span aria-hidden="true">&rarr;</span><b aria-label="with pretraining {with_}">{with_}'
        f'</b></p><p class="soft">{name} on {images}, without and with pretraining: '
        f"{escape(found.how)}.</p>"
    )


def _worth(facts: Facts, analysis: Analysis | None) -> str:
    body = results(facts)
    if not body and analysis and analysis.knn:
        body = (
            "<p>Not evaluated yet: <code>barlow evaluate</code> scores a classifier on the "
            "encoder's features, and <code>barlow report</code> then adds the table here.</p>"
        )
    return body + (confusion(analysis) if analysis else "")


def _data(facts: Facts, analysis: Analysis | None) -> str:
    settings, start = facts.settings, facts.starts[-1] if facts.starts else {}
    pairs = [("source", f"<code>{escape(settings.source)}</code>")]
    if data := start.get("data"):
        pairs.append(("images", f"{data['images']:,}"))
        pairs.append(("fingerprint", f"<code>{escape(data['fingerprint'])}</code>"))
    if facts.skipped:
        pairs.append(("skipped", f"{len(facts.skipped):,} images that cannot be read"))
    size = f"{settings.image_size} &times; {settings.image_size}, {settings.channels} channel(s)"
    pairs.append(("each view", f"{size}, preset {escape(settings.view_preset)}"))
    if environment := start.get("environment"):
        versions = [f"{name} {value}" for name, value in environment.items() if value != "none"]
        pairs.append(("machine and versions", escape(", ".join(versions))))
    return listing(pairs) + (views(analysis) if analysis else "")


def _training(facts: Facts) -> str:
    lambd = f"{facts.settings.lambd:g}"
    return (
        f"<p>The loss is the invariance term plus {lambd} times the redundancy-reduction term. "
        "Its value grows with the width of the embedding; the charts of the matrix's diagonal and "
        "off-diagonal are comparable across widths.</p>" + curves([facts], TRAINING + PACE)
    )


def _health(facts: Facts, columns: Sequence[str], analysis: Analysis | None) -> str:
    over_time = curves([facts], columns)
    return over_time + (spectra(analysis) if analysis else "")


def _events(facts: Facts) -> str:
    parts = []
    if len(facts.starts) > 1:
        lines = [
            [
                start["time"].replace("T", " ")[:19],
                f"{'resumed' if i else 'started'} at step {start['step']}",
                f"{start['environment']['system']}, barlow {start['environment']['barlow']}",
            ]
            for i, start in enumerate(facts.starts)
        ]
        parts.append(table([["time (UTC)", "", "machine"], *lines], "Starts", "text"))
    if facts.warnings:
        last = [["time", "warning or error"], *map(list, facts.warnings[-_LISTED:])]
        title = f"{len(facts.warnings)} warning(s) or error(s)"
        parts.append(f"<h3>{title}</h3>{table(last, 'Warnings and errors', 'text')}")
    if facts.skipped:
        lines = [["image", "reason"], *map(list, facts.skipped[:_LISTED])]
        title = f"{len(facts.skipped)} image(s) that cannot be read"
        more = "" if len(facts.skipped) <= _LISTED else "<p>The rest are in skipped.csv.</p>"
        parts.append(folded(title, table(lines, title, "text") + more))
    return "".join(parts)


def _settings(facts: Facts) -> str:
    values = facts.settings.to_dict()
    lines = [["setting", "value"], *([name, str(value)] for name, value in values.items())]
    text = escape(command(facts.settings, str(facts.path)))
    return f"<pre>{text}</pre>" + folded("All settings", table(lines, "Settings", "text"))


def _title(column: str) -> str:
    return TITLES.get(column, column.replace("_", " "))
