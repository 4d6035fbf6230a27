"""The building blocks of a page: text, tables, pictures, and the document around them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from PIL import Image

# The page is self-contained: the browser may load nothing, and connect only to the page's server.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Section:
    """A part of the page; one without a body is left out.

    Attributes:
        id: the anchor that links point to.
        title: its heading.
        body: HTML.
    """

    id: str
    title: str
    body: str


def document(title: str, head: str, sections: Sequence[Section], live: str = "") -> str:
    """The whole page as one string.

    Args:
        title: title of the window.
        head: HTML above the sections.
        sections: the sections, in order.
        live: version of the page, if it should ask its server for updates.
    """
    sections = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in sections)
    bodies = "".join(
        f'<section id="{s.id}" aria-labelledby="{s.id}-title">'
        f'<h2 id="{s.id}-title">{escape(s.title)}</h2>{s.body}</section>'
        for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_file('page.css')}</style></head>"
        f'<body data-live="{escape(live)}"><a class="skip" href="#content">Skip to content</a>'
        f'<main id="content">{head}<nav aria-label="Sections"><ul>{links}</ul></nav>{bodies}</main>'
        f"<script>{_file('page.js')}</script></body></html>\n"
    )


def table(lines: Sequence[Sequence[str]], label: str, kind: str = "") -> str:
    """A table whose first line and first column are headings.

    Args:
        lines: cells of each line, as plain text.
        label: what it shows, for a screen reader.
        kind: "text" if its cells are words and not numbers.
    """
    headings, *others = lines
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in headings)
    rows = [f"<thead><tr>{cells}</tr></thead>"]
    for first, *rest in others:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return scrolling(f'<table class="{kind}">{"".join(rows)}</table>', label)


def scrolling(body: str, label: str) -> str:
    """Wrap HTML that may be wider than a phone, so that it scrolls and the page does not."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{body}</div>'
    )


def listing(pairs: Sequence[tuple[str, str]], kind: str = "") -> str:
    """A list of names and values; the values are HTML."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def folded(title: str, body: str) -> str:
    """HTML that is folded until it is opened, and unfolded in print."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def img(image: Image.Image, alt: str, kind: str = "") -> str:
    """A picture embedded in the page."""
    return (
        f'<img class="{kind}" src="{data_uri(image)}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI: palette images exactly, as PNG, others as WebP."""
    file = io.BytesIO()
    kind = "png" if image.mode == "P" else "webp"
    image.save(file, kind, quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def sprite(images: Sequence[Image.Image], side: int, columns: int) -> Image.Image:
    """Thumbnails in one image, row after row."""
    sheet = Image.new("RGB", (side * columns, side * -(-len(images) // columns)))
    for i, image in enumerate(images):
        left, top = (side - image.width) // 2, (side - image.height) // 2
        sheet.paste(image, (i % columns * side + left, i // columns * side + top))
    return sheet


def _file(name: str) -> str:
    return (files("barlow.report") / name).read_text()
