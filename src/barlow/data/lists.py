"""Images that a file lists: a .txt of paths, or metadata.csv / .jsonl beside the images."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.folder import Paths
from barlow.data.source import Table, hash_of
from barlow.data.splits import NAMES, Choose
from barlow.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


def open_text(path: Path, choose: Choose) -> Table:
    """A list of paths, one a line, relative to the list; a label may follow after a tab."""
    choose([])
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} lists no images: expected one path a line")
    rows = [line.strip().partition("\t") for line in lines if not line.startswith("#")]
    names = [name for name, _, _ in rows]
    if not any(os.path.exists(path.parent / name) for name in names[:100]):
        raise UserError(
            f"{path} lists {len(names)} images, but neither {path.parent / names[0]} nor any of "
            "the next exists: paths are relative to the list"
        )
    return _table(path.parent, names, [label for _, _, label in rows])


def metadata_files(path: Path) -> dict[str, Path]:
    """The metadata files of a folder: of the folder itself (""), or of its splits."""
    return {
        folder: path / folder / name
        for folder in ("", *sorted(NAMES))
        for name in METADATA
        if (path / folder / name).is_file()
    }


def open_metadata(path: Path, choose: Choose) -> Table:
    """A folder with metadata.csv or .jsonl: the images they name, with their labels."""
    found = metadata_files(path)
    if "" in found:
        rows = _rows(found[""])
        splits = sorted({row["split"] for row in rows if row.get("split")})
        chosen = choose(splits)
        if chosen:
            rows = [row for row in rows if row.get("split") in chosen]
        return _from_rows(path, rows, found[""])
    chosen = choose(list(found))
    rows = [
        {**row, _column(row, FILE_COLUMNS, found[split]): f"{split}/{_name(row, found[split])}"}
        for split in chosen
        for row in _rows(found[split])
    ]
    return _from_rows(path, rows, found[chosen[0]])


def _from_rows(path: Path, rows: list[dict[str, Any]], file: Path) -> Table:
    if not rows:
        raise UserError(f"{file} lists no images")
    column = next((c for c in LABEL_COLUMNS if c in rows[0]), None)
    labels = ["" if column is None else str(row.get(column) or "") for row in rows]
    return _table(path, [_name(row, file) for row in rows], labels)


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            if file.suffix == ".csv":
                return list(csv.DictReader(lines))
            return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _name(row: dict[str, Any], file: Path) -> str:
    return str(row[_column(row, FILE_COLUMNS, file)])


def _column(row: dict[str, Any], names: Sequence[str], file: Path) -> str:
    for name in names:
        if name in row:
            return name
    raise UserError(f"{file} has no column {names[0]!r}; found: {', '.join(map(str, row))}")


def _table(root: Path, names: list[str], labels: list[str]) -> Table:
    paths = Paths(names)
    fingerprint = hash_of([paths.digest(), *labels])
    return Table(paths.under(str(root)), paths, *numbered(labels), fingerprint)


def numbered(labels: list[str]) -> tuple[np.ndarray[Any, Any] | None, list[str] | None]:
    """Labels as numbers and the names of the classes; None if an image has none ("").

    Example:
        >>> numbered(["dog", "cat", "dog"])
        (array([1, 0, 1]), ['cat', 'dog'])
    """
    if not all(labels):
        return None, None
    if all(label.isdecimal() for label in labels):
        # Numbers are classes already: 10 comes after 9, and 3 stays 3 if 2 does not occur.
        numbers = np.array([int(label) for label in labels])
        return numbers, [str(i) for i in range(numbers.max() + 1)]
    classes, numbers = np.unique(labels, return_inverse=True)
    return numbers, [str(name) for name in classes]
