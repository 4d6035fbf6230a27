"""The sections that show the analysis of images by the encoder."""

import math
from html import escape

import torch
from torch import Tensor

from barlow.correlation_matrices import heat_map
from barlow.report.analysis import Analysis, ShownImage
from barlow.report.charts import Series, chart, data_of, histogram, number
from barlow.report.html import data_uri, img, scrolling, sprite, table

_CLASSES = 20  # most classes of a matrix that is drawn; with more, the worst pairs are listed
_MAP, _EDGE = 640, 14  # width of the map, and its margin
_COLUMNS = 32  # of the sheet of thumbnails
_PAIRS = 10


def confusion(analysis: Analysis) -> str:
    """The confusion matrix: true classes by those that the nearest neighbours vote for."""
    if analysis.confusion is None or analysis.knn is None:
        return ""
    without, with_ = (f"{100 * share:.1f} %" for share in analysis.knn)
    head = (
        "<h3>Which classes are confused</h3><p>Predicted by vote of the 20 nearest of "
        f"{analysis.bank:,} training images, with nothing fitted: {with_} correct, "
        f"{without} without pretraining.</p>"
    )
    if len(analysis.classes) > _CLASSES:
        return head + _worst(analysis.confusion, analysis.classes)
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in analysis.classes)
    rows = []
    for name, counts in zip(analysis.classes, analysis.confusion.tolist(), strict=True):
        cells = "".join(
            f'<td style="--share:{count / max(sum(counts), 1):.3f}"'
            f"{' class=none' if not count else ''}>{count}</td>"
            for count in counts
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body = (
        '<table class="confusion"><caption class="soft">rows: true class; columns: predicted '
        f"class</caption><thead><tr><td></td>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return head + scrolling(body, "Confusion matrix")


def _worst(counts: Tensor, classes: list[str]) -> str:
    pairs = counts.nonzero()  # (P, 2), few of all possible pairs
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    order = counts[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    lines = [["true class", "predicted class", "images"]]
    for a, b in pairs[order[:_PAIRS]].tolist():
        lines.append([classes[a], classes[b], str(int(counts[a, b]))])
    return table(lines, "The classes most often confused")


def views(analysis: Analysis) -> str:
    """Images and their two views."""
    figures = "".join(
        f'<figure><div class="three">{img(image, f"image {name}")}{img(one, "its first view")}'
        f"{img(two, 'its second view')}</div></figure>"
        for name, image, one, two in analysis.views
    )
    return (
        "<h3>Images and their two views</h3><p>What differs between the views is what the encoder "
        f'learns to ignore.</p><div class="views">{figures}</div>'
    )


def spectra(analysis: Analysis) -> str:
    """How the variance is spread over the directions of the representation."""
    lines = [
        Series(name, [(i + 1.0, share) for i, share in enumerate(shares)], colour)
        for name, shares, colour in (
            ("trained", analysis.spectra[1], 0),
            ("untrained", analysis.spectra[0], 1),
        )
    ]
    # Shares more than a million times smaller than the first are rounding errors.
    kept = [
        Series(s.name, [(a, b) for a, b in s.points if b > 1e-6 * s.points[0][1]], s.colour)
        for s in lines
    ]
    before, after = (number(value) for value in analysis.rankmes)
    return (
        "<h3>Spectrum of the representation</h3><p>A slow decay means that many directions carry "
        f"variance. Their effective number (RankMe) is {after} of {analysis.width}, "
        f"{before} before training.</p>"
        f'<div class="grid">{chart("Share of the variance", kept, x="direction", log=True)}</div>'
    )


def matrices(analysis: Analysis) -> str:
    """The cross-correlation matrix at the start and now, as pictures and as histograms."""
    figures, diagonal, off = [], [], []
    named = zip(analysis.matrices, ("at the start", "now"), (1, 0), strict=True)
    for matrix, name, colour in named:
        on_it = matrix.diagonal()
        off_it = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
        rms = float(off_it.square().mean().sqrt()) if len(off_it) else 0.0
        text = f"diagonal {float(on_it.mean()):.2f} on average, off-diagonal {rms:.2f} RMS"
        drawn = img(heat_map(matrix), f"Cross-correlation matrix {name}: {text}", "matrix")
        caption = f"<figcaption>{name.capitalize()}<small>{text}</small></figcaption>"
        figures.append(f"<figure>{caption}{drawn}</figure>")
        diagonal.append(Series(name, histogram(on_it), colour))
        off.append(Series(name, histogram(off_it), colour) if len(off_it) else Series(name, []))
    chance = 1 / math.sqrt(analysis.matrix_images)
    some = f"; an evenly spaced subset of the {analysis.features:,} features is shown"
    return (
        "<p>Correlation of every feature of one view's embedding with every feature of the "
        "other's. Training drives the diagonal towards one, so that both views of an image agree, "
        "and all other entries towards zero, so that features do not repeat each other. Computed "
        f"from {analysis.matrix_images} images; "
        f"chance alone gives correlations of about {chance:.2f}"
        f"{some if analysis.features > 256 else ''}.</p>"
        f"{img(heat_map(torch.linspace(-1, 1, 255)[None]), '', 'scale')}"
        '<div class="ends" aria-hidden="true">'
        "<span>&minus;1</span><span>0</span><span>1</span></div>"
        f'<div class="grid wide">{"".join(figures)}</div><div class="grid">'
        f"{chart('On the diagonal: share of features', diagonal, x='correlation')}"
        f"{chart('Off the diagonal: share of pairs', off, x='correlation')}</div>"
    )


def neighbours(analysis: Analysis) -> str:
    """Images, and the training images that the encoder finds most like them."""
    asked = "held-out" if analysis.held_out else "training"
    rows = []
    for query, found in analysis.neighbours:
        cells = [f"<li>{_cell(query, f'{asked} image', query.label)}</li>"]
        for image, similarity in found:
            kind = "" if None in (image.label, query.label) else "same"
            kind = "other" if kind and image.label != query.label else kind
            note = f"{image.label}, {similarity:.2f}" if image.label else f"{similarity:.2f}"
            alt = f"neighbour with similarity {similarity:.2f}"
            cells.append(f'<li class="{kind}">{_cell(image, alt, note)}</li>')
        rows.append(f'<ul class="near">{"".join(cells)}</ul>')
    return (
        f"<p>Each row starts with a {asked} image, followed by those of {analysis.bank:,} training "
        "images whose representations are most similar (cosine).</p>" + "".join(rows)
    )


def _cell(image: ShownImage, alt: str, note: str | None) -> str:
    named = f"{alt}, {image.label}" if image.label else alt
    text = f'<span title="{escape(image.name)}">{escape(note or image.name)}</span>'
    return img(image.picture, named) + text


def map_of(analysis: Analysis) -> str:
    """Images as points in a plane, their thumbnails on hover."""
    if not analysis.map:
        return ""
    xs, ys = zip(*analysis.map, strict=True)
    mapped = {s.label for s in analysis.mapped}
    present = [name for name in analysis.classes if name in mapped]
    colour = {name: _hue(i, len(present)) for i, name in enumerate(present)}
    points = []
    for (x, y), image in zip(analysis.map, analysis.mapped, strict=True):
        style = f' style="--dot:{colour[image.label]}"' if image.label else ""
        points.append(f'<circle cx="{_at(x, xs)}" cy="{_at(y, ys)}" r="5"{style}></circle>')
    side = max(max(s.picture.size) for s in analysis.mapped)
    sheet = data_uri(sprite([s.picture for s in analysis.mapped], side, _COLUMNS))
    data = {
        "side": side,
        "columns": _COLUMNS,
        "labels": [s.label for s in analysis.mapped],
        "texts": [f"{s.label}: {s.name}" if s.label else s.name for s in analysis.mapped],
    }
    keys = "".join(
        f'<li><button type="button" aria-pressed="false" data-label="{escape(name)}" '
        f'style="--dot:{colour[name]}">{escape(name)}</button></li>'
        for name in present
        if len(present) <= 2 * _CLASSES
    )
    kind = "held-out" if analysis.held_out else "training"
    by = ", coloured by class, which training did not use" if present else ""
    label = (
        f"Map of {len(points)} {kind} images by their representation{by}. "
        "Arrow keys move from image to image."
    )
    return (
        f"<p>{len(points):,} {kind} images{by}. Images with similar representations lie close "
        "together (t-SNE: neighbourhoods are meaningful, distances between far groups are not). "
        "Point at one to see it.</p>"
        f'<div class="map">{f"<ul class=keys>{keys}</ul>" if keys else ""}'
        f'<svg viewBox="0 0 {_MAP} {_MAP}" role="img" tabindex="0" aria-label="{escape(label)}">'
        f"{''.join(points)}</svg>"
        '<div class="tip" role="status" hidden><i></i><span></span></div>'
        f'<img src="{sheet}" alt="" hidden>{data_of(data)}</div>'
    )


def _at(value: float, values: tuple[float, ...]) -> str:
    low, high = min(values), max(values)
    return f"{_EDGE + (_MAP - 2 * _EDGE) * (value - low) / ((high - low) or 1):.1f}"


def _hue(index: int, number: int) -> str:
    """The colour of a class: hues around the circle, with neighbours of different lightness."""
    lightness = (0.58, 0.72)[index % 2]
    return f"oklch({lightness} 0.16 {360 * index / max(number, 1) + 25:.0f})"
