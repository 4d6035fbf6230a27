"""WebDataset shards: tar files whose images are read in place."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.decode import EXTENSIONS, Raw
from barlow.data.files import read_bytes
from barlow.data.folder import Paths, default_to_train, files_below
from barlow.data.lists import numbered, text_of
from barlow.data.source import Table, hash_of
from barlow.data.splits import NAMES, SplitChooser
from barlow.errors import UserError

_LABELS = (".cls", ".json")
_AT_ONCE = 8  # shards whose headers are read in parallel, as reading them is mostly waiting


class Members:
    """Files inside tar files, each read with one seek."""

    def __init__(self, shards: list[Path], places: np.ndarray[Any, Any]) -> None:
        """`places`: (N, 3), the index of the shard, and the offset and size in bytes."""
        self._shards, self._places = shards, places

    def __len__(self) -> int:
        """Number of images."""
        return len(self._places)

    def __getitem__(self, index: int) -> Raw:
        """The bytes of one file."""
        shard, offset, size = (int(value) for value in self._places[index])
        file = self._shards[shard]
        try:
            return read_bytes(file, offset, size)
        except OSError as error:
            raise UserError(
                f"cannot read {file} ({error.strerror}): run the same command again "
                "once it is readable"
            ) from None


def open_shards(path: Path, choose: SplitChooser) -> Table:
    """A tar file, or a folder of them; a sample's label is in its .cls, or its .json's "label"."""
    files = files_below(path, ".tar") if path.is_dir() else [path]
    splits = default_to_train([_split_of(file, path) for file in files], map(str, files), path)
    if chosen := choose([split for split in dict.fromkeys(splits) if split]):
        files = [f for split in chosen for f, of in zip(files, splits, strict=True) if of == split]
    names: list[str] = []
    labels: list[str] = []
    places: list[tuple[int, int, int]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, images in enumerate(pool.map(lambda file: list(_images(file)), files)):
            file = files[number]
            shard = file.relative_to(path).as_posix() if path.is_dir() else file.name
            for name, offset, size, label in images:
                names.append(f"{shard}/{name}")
                places.append((number, offset, size))
                labels.append(label)
    if not names:
        raise UserError(f"no images in the {len(files)} tar files of {path}")
    ids = Paths(names)
    numbers, classes = numbered(labels)
    where = np.array(places, dtype=np.int64)
    fingerprint = hash_of([ids.digest(), where.tobytes()])
    return Table(Members(files, where), ids, numbers, classes, fingerprint)


def _images(file: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset, size and label ("" if none) of every image; a sample's files share a stem."""
    stem, label = "", ""
    images: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}"
                if key != stem:
                    yield from ((*image, label) for image in images)
                    stem, images, label = key, [], ""
                suffix = os.path.splitext(base)[1].lower()
                if suffix in EXTENSIONS:
                    images.append((member.name, member.offset_data, member.size))
                elif suffix in _LABELS and (content := tar.extractfile(member)):
                    label = _label(suffix, content.read()) or label
    except tarfile.TarError as error:
        packed = " (compressed shards cannot be read in place: decompress them)"
        raise UserError(f"cannot read {file} as a tar file: {error}{packed}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    yield from ((*image, label) for image in images)


def _label(suffix: str, content: bytes) -> str:
    if suffix == ".cls":
        return content.decode(errors="replace").strip()
    try:
        value = json.loads(content)
    except ValueError:
        return ""
    return text_of(value.get("label")) if isinstance(value, dict) else ""


def _split_of(file: Path, root: Path) -> str:
    """The split in `train-0000.tar`, `imagenet-train-000.tar` or `train/0000.tar`; "" if none."""
    words = re.split(r"[-_.]", file.name)
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    return next((word for word in [*words, *folders] if word.lower() in NAMES), "")
