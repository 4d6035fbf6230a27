"""Parquet files, as the hub lays them out: split-00000-of-00001.parquet, images in a column."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from barlow.data.decode import Raw
from barlow.data.folder import default_to_train, files_below, some_of
from barlow.data.lists import numbered, text_of
from barlow.data.source import RowIds, Table, hash_of
from barlow.data.splits import NAMES, SplitChooser
from barlow.errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, Features

log = logging.getLogger(__name__)

_LABELS = ("label", "labels", "fine_label", "class", "target")


class Column:
    """The image column of a table; rows are read from the memory-mapped file on access."""

    def __init__(self, dataset: "Dataset", column: str) -> None:
        """Column `column` of `dataset`."""
        self._dataset, self._column = dataset, column

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Raw:
        """The image of one row, undecoded."""
        return raw_of(self._dataset[int(index)][self._column])

    def __iter__(self) -> Iterator[Raw]:
        """All rows in order, several at a time."""
        # Row by row, most of the time would go into finding each row.
        for rows in self._dataset.iter(batch_size=1000):
            yield from map(raw_of, rows[self._column])


def open_parquet(path: Path, choose: SplitChooser) -> Table:
    """One Parquet file, or a folder of them."""
    files = _tables_in(path) if path.is_dir() else [path]
    splits = default_to_train([split_of(file, path) for file in files], map(str, files), path)
    chosen = choose([split for split in dict.fromkeys(splits) if split])
    if chosen:
        files = [f for split in chosen for f, of in zip(files, splits, strict=True) if of == split]
    return table_of(read_parquet(files), str(path), "/".join(chosen))


def _tables_in(folder: Path) -> list[Path]:
    files = files_below(folder, ".parquet")
    found = [file for file in files if holds_images(file)]
    if 0 < len(found) < len(files):
        others = sorted(set(files) - set(found))
        log.warning("%s: left out, not a source of images: %s", folder, some_of(map(str, others)))
    return found or files


def holds_images(file: Path) -> bool:
    """Whether a Parquet file in a folder is a source; a damaged one is, so that its error shows.

    A file that barlow itself wrote about images is not a source, even if it contains thumbnails.
    """
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        schema = pq.read_schema(file)
        image_column(Features.from_arrow_schema(schema), str(file))
    except UserError:
        return False
    except Exception:  # the file is damaged, or has types that `datasets` does not know
        return True
    return not any(key.startswith(b"barlow") for key in schema.metadata or {})


def split_of(file: Path, root: Path) -> str:
    """The split in `train-00000-of-00002.parquet`, `train.parquet` or `train/0000.parquet`."""
    word = re.split(r"[-_.]", file.name)[0]
    if word.lower() in NAMES:
        return word
    if match := re.match(r"(.+)-\d{5}-of-\d{5}", file.name):
        return match[1]
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    return next((folder for folder in folders if folder.lower() in NAMES), "")


def read_parquet(files: Sequence[Path]) -> "Dataset":
    """A memory-mapped data set of the files, which `datasets` copies into its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train"
        )
    except Exception as error:
        cause = error.__cause__ or error
        place = f" (copied to {datasets.config.HF_DATASETS_CACHE}; set HF_HOME to change this)"
        why = one_line(cause, 300) + (place if isinstance(cause, OSError) else "")
        raise UserError(f"cannot read {some_of(map(str, files))} as Parquet: {why}") from None


def table_of(dataset: "Dataset", name: str, split: str) -> Table:
    """A data set's image column, labels and fingerprint."""
    from datasets import Image

    column = image_column(dataset.features, name)
    dataset = dataset.cast_column(column, Image(decode=False))
    label = next((c for c in _label_columns(dataset) if c != column), None)
    labels, classes = (None, None) if label is None else _labels(dataset, label)
    ids = RowIds(split or "row", range(len(dataset)))
    images = dataset.select_columns(column)
    known: list[str | bytes] = [] if labels is None else [labels.tobytes(), *(classes or [])]
    fingerprint = hash_of([column_hash(images, column), str(len(images)), *known])
    return Table(Column(images, column), ids, labels, classes, fingerprint)


def column_hash(images: "Dataset", column: str) -> str:
    """A hash that identifies the rows, whichever path they are read from.

    It covers three images and the lengths of all, which are stored apart from the images.
    """
    import pyarrow.compute as pc

    rows = sorted({0, len(images) // 2, len(images) - 1}) if len(images) else []
    parts = [repr(raw_of(images[row][column])) for row in rows]
    for field in images.data.column(column).flatten():  # bytes and path
        parts.append(str(pc.binary_length(field).to_pylist()))
    return hash_of(parts)


def image_column(features: "Features", name: str) -> str:
    """The column that holds images."""
    from datasets import Image, Value

    for column, feature in features.items():
        if isinstance(feature, Image):
            return str(column)
    for column, feature in features.items():
        if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
            return str(column)
        if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
            return str(column)
    found = ", ".join(f"{c} ({_kind(f)})" for c, f in features.items())
    raise UserError(f"{name} has no image column (bytes or Image); found: {found}")


def _label_columns(dataset: "Dataset") -> list[str]:
    from datasets import ClassLabel, Value

    columns = [c for c, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    return columns or [c for c in _LABELS if isinstance(dataset.features.get(c), Value)]


def _labels(
    dataset: "Dataset", column: str
) -> tuple[np.ndarray[Any, Any] | None, list[str] | None]:
    """The class of each row, -1 where there is none, and the names of the classes."""
    from datasets import ClassLabel

    feature, values = dataset.features[column], dataset.data.column(column)
    if isinstance(feature, ClassLabel):
        return values.fill_null(-1).to_numpy().astype(np.int64), list(feature.names)
    encoded = values.combine_chunks().dictionary_encode("encode")
    numbers, classes = numbered([text_of(kind) for kind in encoded.dictionary.to_pylist()])
    return None if numbers is None else numbers[encoded.indices.to_numpy()], classes


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def raw_of(value: Any) -> Raw:
    """The bytes or path in a value of an image column, which may be a dictionary of both."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return b"" if value is None else value
