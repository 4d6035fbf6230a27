"""Images that a file lists: a .txt of paths, or metadata.csv / .jsonl beside the images."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from barlow.data.folder import Paths, default_to_train, images_beside, some_of
from barlow.data.source import Table, hash_of
from barlow.data.splits import NAMES, SplitChooser, is_held_out
from barlow.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


def open_text(path: Path, choose: SplitChooser) -> Table:
    """A list of paths relative to the list, one per line; a label may follow after a tab."""
    choose([])
    lines = [line.strip() for line in _lines(path) if not line.startswith("#")]
    rows = [line.partition("\t") for line in lines if line]
    if not rows:
        raise UserError(f"{path} lists no images: expected one path per line")
    names = [name for name, _, _ in rows]
    if not any(os.path.exists(path.parent / name) for name in names[:100]):
        raise UserError(
            f"{path} lists {len(names)} images, but neither {path.parent / names[0]} nor any of "
            "the following exists: paths are relative to the list"
        )
    return _table(path.parent, names, [label.strip() for _, _, label in rows])


def metadata_files(path: Path) -> dict[str, Path]:
    """The metadata files of a folder: of the folder itself (""), or of its splits."""
    return {
        folder: path / folder / name
        for folder in ("", *sorted(NAMES))
        for name in METADATA
        if (path / folder / name).is_file()
    }


def open_metadata(path: Path, choose: SplitChooser) -> Table:
    """A folder with metadata.csv or .jsonl: the images named there, with their labels."""
    found = metadata_files(path)
    if "" in found:
        rows = _rows(found[""])
        marked = [text_of(row.get("split")) for row in rows]
        splits = default_to_train(marked, (_name(row, found[""]) for row in rows), path)
        chosen = choose(sorted(set(splits) - {""}))
        if chosen:
            rows = [row for row, split in zip(rows, splits, strict=True) if split in chosen]
        return _from_rows(path, rows, found[""])
    beside = images_beside(path, list(found)) if all(map(is_held_out, found)) else []
    chosen = choose(list(found), some_of(beside))
    rows = [
        {**row, _column(row, FILE_COLUMNS, found[split]): f"{split}/{_name(row, found[split])}"}
        for split in chosen
        for row in _rows(found[split])
    ]
    return _from_rows(path, rows, found[chosen[0]])


def _from_rows(path: Path, rows: list[dict[str, Any]], file: Path) -> Table:
    if not rows:
        raise UserError(f"{file} lists no images")
    column = next((c for c in LABEL_COLUMNS if any(c in row for row in rows)), None)
    labels = ["" if column is None else text_of(row.get(column)) for row in rows]
    # pandas writes whole numbers as floats where some are missing; see `text_of`.
    if all(re.fullmatch(r"(\d+\.0)?", label) for label in labels):
        labels = [label.removesuffix(".0") for label in labels]
    return _table(path, [_name(row, file) for row in rows], labels)


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix != ".csv":
        return list(_objects(file))
    try:
        return list(csv.DictReader(_lines(file)))
    except csv.Error as error:
        raise UserError(
            f"cannot read {file} as CSV ({error}): expected a header row, then one image per line"
        ) from None


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            example = '{"file_name": "1.png", "label": "cat"}'
            raise UserError(
                f"{file}, line {number} is {line.strip()[:80]!r}: expected a JSON object on one "
                f"line, such as {example}"
            )
        yield row


def _lines(file: Path) -> TextIO:
    try:
        return io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from None


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


def text_of(value: Any) -> str:
    """A label or split as text; "" for a missing one: null, or the NaN that pandas writes.

    pandas stores whole numbers as floats if some are missing, so the float 3.0 becomes "3", as in
    a column without gaps. Spaces around a name are removed.

    Example:
        >>> text_of(3.0), text_of(0.5), text_of("3.0"), text_of(None), text_of("cat ")
        ('3', '0.5', '3.0', '', 'cat')
    """
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def numbered(labels: list[str]) -> tuple[np.ndarray[Any, Any] | None, list[str] | None]:
    """Labels as numbers, -1 where there is none (""), and the names of the classes.

    Classes that are whole numbers are sorted as numbers, 10 after 9. Both results are None if there
    are no labels at all.

    Example:
        >>> numbered(["dog", "cat", "", "dog"])
        (array([ 1,  0, -1,  1]), ['cat', 'dog'])
    """
    classes = sorted(set(labels) - {""})
    if not classes:
        return None, None
    if all(label.isdecimal() for label in classes):
        classes.sort(key=int)  # stable: "007" stays before "7"
    place = {name: i for i, name in enumerate(classes)} | {"": -1}
    return np.array([place[label] for label in labels], dtype=np.int64), classes
