"""A folder of images of any depth, by a plain directory walk."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.decode import EXTENSIONS
from barlow.data.source import Table, hash_of
from barlow.data.splits import NAMES, Choose
from barlow.errors import UserError


class Paths(Sequence[str]):
    """Many paths in one piece of memory: ids, which are to be read, or below a root, to be opened.

    A million Python strings are a million objects, each copied into every worker when its
    reference count is touched; one array of bytes and one of offsets are shared by all.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """The names as ids; see `under`."""
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)
        self._root: str | None = None

    def __len__(self) -> int:
        """How many."""
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """One, or a slice of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._bytes[start : self._ends[index]])
        return printable(name) if self._root is None else os.path.join(self._root, name)

    def under(self, root: str) -> "Paths":
        """The files of these names below a root."""
        other = Paths.__new__(Paths)
        other._ends, other._bytes, other._root = self._ends, self._bytes, root
        return other

    def digest(self) -> str:
        """A hash of all names."""
        return hash_of([self._bytes, self._ends.tobytes()])


def printable(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def open_folder(path: Path, choose: Choose) -> Table:
    """All images below a folder, in the order of their names."""
    splits = [entry for entry in _folders(path) if entry.lower() in NAMES]
    chosen = choose(splits)
    roots = chosen or [""]
    found, other = [], 0
    for root in roots:
        for name, is_image in _walk(path / root, root):
            if is_image:
                found.append(name)
            else:
                other += 1
    if not found:
        where = path / roots[0] if len(roots) == 1 else path
        what = f"none of its {other} files is an image" if other else "it is empty"
        raise UserError(f"no images in {where}: {what} (looked for {_some_extensions()})")
    found.sort()
    names = Paths(found)
    labels, classes = _labels(found, path, splits if chosen else [])
    return Table(names.under(str(path)), names, labels, classes, names.digest())


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    """Names relative to the source, and whether each is an image; hidden ones are left out."""
    pending = [(str(folder), prefix)]
    top = os.path.realpath(folder)
    seen = set()  # real paths of linked folders, so that a loop of links ends
    while pending:
        folder_path, prefix = pending.pop()
        with os.scandir(folder_path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{prefix}/{entry.name}" if prefix else entry.name
                if entry.is_dir():
                    if entry.is_symlink():
                        real = os.path.realpath(entry.path)
                        around = (top, os.path.realpath(folder_path))
                        if real in seen or any(Path(p).is_relative_to(real) for p in around):
                            continue
                        seen.add(real)
                    pending.append((entry.path, name))
                else:
                    yield name, os.path.splitext(entry.name)[1].lower() in EXTENSIONS


def _labels(
    names: list[str], path: Path, splits: list[str]
) -> tuple[np.ndarray[Any, Any] | None, list[str] | None]:
    """Classes are the first folders that tell images apart."""
    depth = 1 if splits else 0
    if not splits:
        # root/images/cat/1.jpg: what all share is no class.
        shared = os.path.commonpath([names[0], names[-1]]) if len(names) > 1 else ""
        folder = shared if os.path.isdir(path / shared) else ""
        depth = len(Path(folder).parts)
    number: dict[str, int] = {}
    numbers = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):  # no list of parts: a million names are many
        parts = name.split("/", depth + 1)
        if len(parts) < depth + 2:
            return None, None
        numbers[i] = number.setdefault(parts[depth], len(number))
    folders = set(number)
    for split in splits:  # train and test number their classes alike
        folders.update(_folders(path / split))
    classes = sorted(folders)
    place = {name: i for i, name in enumerate(classes)}
    places = np.array([place[name] for name in number], dtype=np.int64)
    return places[numbers], [printable(name) for name in classes]


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _some_extensions() -> str:
    return ".jpg, .png, .webp, .tif and others"
