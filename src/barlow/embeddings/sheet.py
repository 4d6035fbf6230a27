"""Presenting the images found: a table for the terminal and an HTML page of thumbnails."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from barlow.atomic import write_text
from barlow.tables import rich_table, text_table

if TYPE_CHECKING:
    from rich.table import Table

_STYLE = """
:root { color-scheme: light dark; --faint: #666; --ground: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --faint: #aaa; --ground: #2a2a2a; } }
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
ul { display: flex; flex-wrap: wrap; gap: 1rem; list-style: none; margin: 0; padding: 0; }
li { width: 128px; overflow-wrap: anywhere; }
img, .none { width: 128px; height: 128px; object-fit: contain; background: var(--ground); }
.none { display: grid; place-items: center; color: var(--faint); }
.small { image-rendering: pixelated; }
small { color: var(--faint); }
"""


class Listing(NamedTuple):
    """A table of text under headings, and a sentence below it."""

    headings: list[str]
    lines: list[list[str]]
    note: str = ""

    def table(self) -> "Table":
        """The table for a terminal."""
        fold = {"overflow": "fold"}
        return rich_table([self.headings, *self.lines], self.note, first=fold, others=fold)

    def __str__(self) -> str:
        table = text_table([self.headings, *self.lines])
        return f"{table}\n{self.note}" if self.note else table


class Card(NamedTuple):
    """One image on a page: its file, its name and a caption."""

    image: bytes | None  # PNG or JPEG; None if the image is no longer there
    name: str
    caption: str


def write_sheet(
    file: str | Path, title: str, sections: Sequence[tuple[str, Sequence[Card]]]
) -> None:
    """Write a self-contained page: its thumbnails are embedded and nothing is fetched.

    Args:
        file: HTML file to write.
        title: title of the page.
        sections: headings and the cards below them.
    """
    body = "".join(
        f"<section><h2>{escape(heading)}</h2><ul>{''.join(map(_card, cards))}</ul></section>\n"
        for heading, cards in sections
    )
    write_text(
        Path(file),
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n",
    )


def _card(card: Card) -> str:
    if card.image is None:
        picture = '<div class="none">no image</div>'
    else:
        is_png = card.image.startswith(b"\x89PNG")  # as small images are saved
        kind, style = ("png", ' class="small"') if is_png else ("jpeg", "")
        data = base64.b64encode(card.image).decode()
        picture = f'<img{style} alt="{escape(card.name)}" src="data:image/{kind};base64,{data}">'
    return f"<li>{picture}<br>{escape(card.caption)}<br><small>{escape(card.name)}</small></li>"
