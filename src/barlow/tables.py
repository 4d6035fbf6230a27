"""A table of text, printed in two ways: plain, and by rich for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first left-aligned, the others right-aligned.

    Args:
        lines: the rows, each with the same number of cells.

    Example:
        >>> print(text_table([["k-NN", "top-1"], ["k = 20", "9 %"]]))
        k-NN    top-1
        k = 20    9 %
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def rich_table(
    lines: Sequence[Sequence[str]],
    caption: str,
    *,
    first: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
) -> "Table":
    """A table for a terminal.

    Args:
        lines: headings, then the cells of each line.
        caption: text below the table.
        first: options of `rich.table.Table.add_column` for the first column.
        others: the same for the other columns.
    """
    from rich.table import Table
    from rich.text import Text

    headings, *rows = lines
    # As Text, because rich would take brackets in a name for markup.
    table = Table(caption=Text(caption, "table.caption"), caption_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, **((others if i else first) or {}))
    for row in rows:
        table.add_row(*map(Text, row))
    return table
