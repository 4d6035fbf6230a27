"""Labels in the forms that users have: a source's own, or a CSV file of images and labels."""

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from barlow.data import Source
from barlow.data.lists import FILE_COLUMNS, LABEL_COLUMNS
from barlow.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["classes", "tags", "numbers"]
AnyKind = Literal["auto", "classes", "tags", "numbers"]

_FILE_COLUMNS = (*FILE_COLUMNS, "id")
_SEPARATOR = re.compile(r"\s*[|;]\s*")
_MISSING = ("na", "n/a", "nan", "null", "none")  # also what begins with #, such as Excel's #N/A


@dataclass(frozen=True)
class Labels:
    """The labels of some images of a source.

    Attributes:
        kind: "classes", one per image; "tags", any number per image; or "numbers".
        names: names of the classes, the tags, or the columns of numbers.
        rows: `(M,)` int64, which images of the source.
        values: `(M,)` int64 classes, `(M, T)` float32 tags of 0 or 1, or `(M, T)` float32 numbers.
    """

    kind: Kind
    names: list[str]
    rows: Tensor
    values: Tensor

    def take(self, indices: Tensor) -> "Labels":
        """The labels of some of the images."""
        return Labels(self.kind, self.names, self.rows[indices], self.values[indices])


def labels_of(source: Source) -> Labels:
    """The classes that a source itself provides.

    Raises:
        UserError: if it has none.
    """
    if source.labels is None or not bool((source.labels >= 0).any()):
        raise UserError(
            f"{source.name} has no labels: put the images in one folder per class, give a table "
            "with a label column, or give a CSV file with --labels"
        )
    rows = (source.labels >= 0).nonzero().flatten()
    names = source.classes or [str(c) for c in range(int(source.labels.max()) + 1)]
    return Labels("classes", list(names), rows, source.labels[rows])


def read_labels(file: str | Path, ids: Sequence[str], kind: AnyKind, folder: str = "") -> Labels:
    """Read labels from a CSV file with a heading line, commas, semicolons or tabs between columns.

    The file name is in a column `file_name` (or file, path, image, id; else in the first). It is
    the source's id, the last parts of it, or a longer path that ends in the source's folder and the
    id, with slashes or Windows' backslashes. One further column holds a class, several tags with
    `|` or `;` between them, or a number; several columns hold a number each, or 0 and 1 for tags.
    If one of several is called label, class, category or target, only that one is read. A column
    without a heading is left out; capitals in headings do not matter.

    Args:
        file: the CSV file.
        ids: ids of the source's images.
        kind: what the file holds; "auto" infers it from the values. Whole numbers in one column are
            classes, unless the kind is "numbers".
        folder: name of the folder that the ids are below, if there is one.

    Returns:
        Labels of the images that the file names; a line whose image is not in the source, or
        whose value is empty, is left out and counted in the log.

    Raises:
        UserError: if the file cannot be read, names no image of the source, one image twice, or
            has values of another kind.
    """
    columns, lines = _table(Path(file))
    written = [name for name, *_ in lines]
    places = _places([*written, *map(_from_windows, written)], ids, folder)
    rows, cells = list[int](), list[list[str]]()
    unknown, empty = list[str](), list[str]()
    for name, *values in lines:
        row = places.get(name, places.get(_from_windows(name)))
        if row is None:
            unknown.append(name)
        elif row < 0:
            raise UserError(f"{file}: several images are called {name}: include their folders")
        elif any(values) and (len(values) == 1 or all(values)):
            rows.append(row)
            cells.append(values)
        else:
            empty.append(name)
    if empty and not rows:
        raise UserError(f"{file}: no image has a value in every column ({', '.join(columns)})")
    if not rows:
        first = f"its first row names {lines[0][0]}" if lines else "it has no rows"
        raise UserError(
            f"{file} labels no image of the source: {first}, the source has images like {ids[0]}"
        )
    if len(set(rows)) < len(rows):
        twice = next(row for row, lines_of in Counter(rows).items() if lines_of > 1)
        raise UserError(f"{file} labels {ids[twice]} twice: give one line per image")
    if unknown:
        log.warning(
            "%s: %d image(s) not found in the source, first: %s", file, len(unknown), unknown[0]
        )
    if empty:
        log.warning("%s: %d image(s) with no value, first: %s", file, len(empty), empty[0])
    found = _kind(columns, cells, str(file)) if kind == "auto" else kind
    order = torch.tensor(rows).argsort()
    names, values_of = _READERS[found](columns, cells, str(file))
    return Labels(found, names, torch.tensor(rows)[order], values_of[order])


def _table(file: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the value columns, and lines of file name and values."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            written = text.readlines()
        first = next((line for line in written if line.strip()), "")
        separator = max(",;\t", key=first.count)  # the comma if counts are equal
        heading, *lines = [line for line in csv.reader(written, delimiter=separator) if any(line)]
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f'cannot read {file}: {error}: in Excel save it as "CSV UTF-8"') from None
    except ValueError:
        raise UserError(f"{file} is empty: expected a header, then lines of file,label") from None
    for number, line in enumerate(lines, 2):
        if len(line) != len(heading):
            raise UserError(
                f"{file}, line {number}: {len(line)} values, but the header has {len(heading)}"
            )
    heading = [name.strip() for name in heading]
    plain = [name.lower().replace(" ", "_") for name in heading]
    at = next((plain.index(c) for c in _FILE_COLUMNS if c in plain), None)
    if at is None:  # the first column, or the second after an index without a heading
        at = int(not heading[0] and all(line[0].isdecimal() for line in lines))
    rest = [i for i in range(len(heading)) if i != at and heading[i]]
    if not rest:
        raise UserError(f"{file} has one column: expected file names and labels, with a header")
    usual = [i for i in rest if plain[i] in LABEL_COLUMNS]
    if len(usual) == 1 < len(rest):
        others = ", ".join(heading[i] for i in rest if i not in usual)
        log.warning("%s: using column %s, ignoring %s", file, heading[usual[0]], others)
        rest = usual
    return (
        [heading[i] for i in rest],
        [[line[at].strip().removeprefix("./"), *(line[i].strip() for i in rest)] for line in lines],
    )


def _places(names: Sequence[str], ids: Sequence[str], folder: str) -> dict[str, int]:
    """The row of the image that each name means, if there is one; -1 if it may mean several."""
    asked, places, whole = set(names), dict[str, int](), dict[str, int]()
    for row, name in enumerate(ids):
        path = f"{folder}/{name}" if folder else name
        whole[path] = row
        for end in _ends(path):
            if end in asked:
                places[end] = -1 if end in places else row
    for name in asked - places.keys():
        if found := [whole[end] for end in _ends(name) if end in whole]:
            places[name] = found[0]
    # A name that is a whole id is never ambiguous.
    return places | {name: row for row, name in enumerate(ids) if name in asked}


def _from_windows(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _ends(path: str) -> Iterator[str]:
    """Yield the path, the path without its first folder, without its first two, and so on."""
    while path:
        yield path
        path = path.partition("/")[2]


def _kind(columns: list[str], cells: list[list[str]], file: str) -> Kind:
    if len(cells[0]) > 1:
        return "tags" if {v for line in cells for v in line} <= {"0", "1"} else "numbers"
    values = [line[0] for line in cells]
    if any(_SEPARATOR.search(value) for value in values):
        return "tags"
    others = [value for value in values if _number(value) is None]
    if others and (wrong := _among_numbers(values, others)):
        raise UserError(f"{_no_number(file, wrong, columns, 0)}; or give --kind classes")
    return "classes" if others or all(value.isdecimal() for value in values) else "numbers"


def _among_numbers(values: list[str], others: list[str]) -> str | None:
    """Which of `others` is a gap or decimal comma among numbers; None if they are classes."""
    if all(_number(value.replace(",", ".", 1)) is not None for value in values):
        return others[0]
    numbers = [value for value in values if _number(value) is not None]
    if not all(value.isdecimal() for value in numbers):
        return others[0]
    gaps = (v for v in others if v.lower() in _MISSING or v.startswith("#"))
    return next(gaps, None) if numbers else None


def _no_number(file: str, value: str, columns: list[str], at: int) -> str:
    several = f"; or keep only one of {', '.join(columns)}" if len(columns) > 1 else ""
    return (
        f"{file}: {value!r} in column {columns[at]} is not a number: leave the cell empty if "
        f"the value is unknown, and use a decimal point, not a comma{several}"
    )


def _classes(columns: list[str], cells: list[list[str]], file: str) -> tuple[list[str], Tensor]:
    if len(columns) > 1:
        raise UserError(
            f"{file} has {len(columns)} columns of values: classes need exactly one, "
            f"found {', '.join(columns)}"
        )
    values = [line[0] for line in cells]
    numeric = all(value.isdecimal() for value in values)
    names = sorted(set(values), key=int) if numeric else sorted(set(values))
    if len(names) < 2:
        raise UserError(f"{file} has only one class, {names[0]!r}: a classifier needs two or more")
    number = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([number[value] for value in values])


def _tags(columns: list[str], cells: list[list[str]], file: str) -> tuple[list[str], Tensor]:
    if len(columns) > 1:
        if not {v for line in cells for v in line} <= {"0", "1"}:
            raise UserError(
                f"{file}: tag columns must be 0 or 1, other values are in {', '.join(columns)}"
            )
        return columns, torch.tensor([[float(v) for v in line] for line in cells])
    lists = [{tag for tag in _SEPARATOR.split(line[0]) if tag} for line in cells]
    names = sorted(set().union(*lists))
    place = {name: i for i, name in enumerate(names)}
    at = [(line, place[tag]) for line, tags in enumerate(lists) for tag in tags]
    values = torch.zeros(len(lists), len(names))
    values[torch.tensor(at, dtype=torch.int64).reshape(-1, 2).unbind(1)] = 1.0
    return names, values


def _numbers(columns: list[str], cells: list[list[str]], file: str) -> tuple[list[str], Tensor]:
    for line in cells:
        for at, value in enumerate(line):
            if _number(value) is None:
                raise UserError(_no_number(file, value, columns, at))
    return columns, torch.tensor([[float(v) for v in line] for line in cells])


_READERS = {"classes": _classes, "tags": _tags, "numbers": _numbers}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
