"""A folder of images at any depth, read by a plain directory walk."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.decode import EXTENSIONS, UNREAD
from barlow.data.source import Table, hash_of
from barlow.data.splits import NAMES, SplitChooser, is_held_out
from barlow.errors import UserError

log = logging.getLogger(__name__)


class Paths(Sequence[str]):
    """Many paths in one block of memory: readable ids or, below a root, paths that can be opened.

    A million Python strings are a million objects, and touching a reference count copies the
    memory around it into the worker; one array of bytes and one of offsets are shared by all.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Store the names as ids; `under` turns them into paths."""
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)
        self._root: str | None = None

    def __len__(self) -> int:
        """Number of paths."""
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """One path, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._bytes[start : self._ends[index]])
        return printable(name) if self._root is None else os.path.join(self._root, name)

    def under(self, root: str) -> "Paths":
        """The same names as paths below `root`."""
        other = Paths.__new__(Paths)
        other._ends, other._bytes, other._root = self._ends, self._bytes, root
        return other

    def digest(self) -> str:
        """A hash of all names."""
        return hash_of([self._bytes, self._ends.tobytes()])


def printable(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def open_folder(path: Path, choose: SplitChooser) -> Table:
    """All images below a folder, in the order of their names."""
    splits, others = _splits(path)
    chosen = choose(splits, some_of(others) if all(map(is_held_out, splits)) else "")
    if others:
        log.warning("%s: its splits are %s; left out: %s", path, some_of(splits), some_of(others))
    roots = chosen or [""]
    found, other = [], Counter[str]()
    for root in roots:
        for name, is_image in walk(path / root, root):
            if is_image:
                found.append(name)
            else:
                other[os.path.splitext(name)[1].lower()] += 1
    unread = ", ".join(f"{other[ending]} {ending}" for ending in UNREAD if other[ending])
    if not found:
        where = path / roots[0] if len(roots) == 1 else path
        what = f"none of its {other.total()} files is a supported image" if other else "it is empty"
        what += f"; unsupported formats: {unread}" if unread else ""
        raise UserError(f"no images in {where}: {what} (looked for {_some_extensions()})")
    if unread:
        log.warning(
            "%s: unsupported formats left out: %s; convert them to JPEG or PNG", path, unread
        )
    found.sort()
    names = Paths(found)
    labels, classes = _labels(found, path, splits if chosen else [])
    return Table(names.under(str(path)), names, labels, classes, names.digest())


def _splits(path: Path) -> tuple[list[str], list[str]]:
    """The folders that are splits, and the images and folders of images beside them.

    Among folders that are classes, a folder called `train` is a class too.
    """
    folders = _folders(path)
    splits = [name for name in folders if name.lower() in NAMES]
    if not splits:
        return [], []
    others = images_beside(path, splits)
    held_out = all(map(is_held_out, splits))
    classes = others if held_out else [name for name in others if name in folders]
    lonely = len(splits) == 1 or held_out
    if classes and lonely and not any(_folders(path / name) for name in splits):
        log.warning(
            "%s: treating %s as a class, not a split, beside %s",
            *(path, some_of(splits), some_of(classes)),
        )
        return [], []
    return splits, others


def images_beside(path: Path, splits: Sequence[str]) -> list[str]:
    """The folders that contain images, then the images, beside the given splits."""
    found = [
        name
        for name in _folders(path)
        if name not in splits and any(is_image for _, is_image in walk(path / name, name))
    ]
    return found + sorted(
        entry.name for entry in entries_of(path) if _is_image(entry.name) and not _is_folder(entry)
    )


def default_to_train(splits: Sequence[str], names: Iterable[str], source: object) -> list[str]:
    """The split of every file or row; "" for those that have none.

    Those without a split are for training if all others are held out. Otherwise a warning says that
    they are left out, unless no file or row has a split.
    """
    found = sorted(set(splits) - {""})
    if found and all(map(is_held_out, found)):
        return [split or "train" for split in splits]
    if found and "" in splits:
        unmarked = some_of(compress(names, (not split for split in splits)))
        log.warning("%s: its splits are %s; left out: %s", source, some_of(found), unmarked)
    return list(splits)


def files_below(folder: Path, ending: str) -> list[Path]:
    """The files with an ending, sorted; as in a folder of images, hidden ones are left out."""
    return sorted(folder / name for name, _ in walk(folder) if name.endswith(ending))


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every file's name relative to the source, and whether it is an image; no hidden files."""
    pending = [(str(folder), prefix)]
    top = os.path.realpath(folder)
    walked = {top}  # and the targets of links, so that no file is found twice
    while pending:
        folder_path, prefix = pending.pop()
        for entry in entries_of(folder_path):
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if not _is_folder(entry):
                yield name, _is_image(entry.name)
                continue
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                around = (top, os.path.realpath(folder_path))
                if any(Path(place).is_relative_to(real) for place in around):
                    continue
                if _is_walked(real, walked):
                    continue
                walked.add(real)
            pending.append((entry.path, name))


def entries_of(folder: str | Path) -> Iterator["os.DirEntry[str]"]:
    """The entries of a folder that are not hidden; none, with a warning, if it is unreadable."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        log.warning("%s is left out: %s", folder, error.strerror)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    # `isdir` is false for a link that cannot be followed, where `entry.is_dir` raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_walked(place: str, tops: set[str]) -> bool:
    """Whether a walk from one of `tops`, which may themselves be hidden, reaches `place`."""
    while place not in tops:
        above, name = os.path.split(place)
        if name.startswith(".") or above == place:
            return False
        place = above
    return True


def _labels(
    names: list[str], path: Path, splits: list[str]
) -> tuple[np.ndarray[Any, Any] | None, list[str] | None]:
    """Labels and class names; the classes are the first level of folders that images differ in."""
    depth = 1 if splits else 0
    if not splits:
        # In root/images/cat/1.jpg, a folder that all images share is not a class.
        shared = os.path.commonpath([names[0], names[-1]]) if len(names) > 1 else ""
        folder = shared if os.path.isdir(path / shared) else ""
        depth = len(Path(folder).parts)
    number: dict[str, int] = {}
    numbers = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):  # no list of all parts: there may be a million names
        parts = name.split("/", depth + 1)
        if len(parts) < depth + 2:
            return None, None
        numbers[i] = number.setdefault(parts[depth], len(number))
    folders = set(number)
    for split in splits:  # so that train and test number their classes alike
        folders.update(_folders(path / split))
    classes = sorted(folders)
    place = {name: i for i, name in enumerate(classes)}
    places = np.array([place[name] for name in number], dtype=np.int64)
    return places[numbers], [printable(name) for name in classes]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in entries_of(path) if _is_folder(entry))


def some_of(names: Iterable[str]) -> str:
    """The first few of many names, for a message.

    Example:
        >>> some_of("abcdef")
        'a, b, c and 3 more'
    """
    first = [printable(name) for name in names]
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _some_extensions() -> str:
    return ".jpg, .png, .webp, .tif and others"
