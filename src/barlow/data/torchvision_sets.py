"""torchvision's data sets by name; downloaded once into the data root."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barlow.data.source import RowIds, Table, hash_of
from barlow.data.splits import SplitChooser
from barlow.errors import UserError, one_line


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set's class in torchvision, and the arguments that select its splits."""

    kind: str  # name of the class in torchvision.datasets
    splits: dict[str, dict[str, Any]]  # our name for a split: the arguments that select it


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}


def _named(*splits: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {split: {"split": split, **more} for split in splits}


TORCHVISION_SETS = {
    "cifar10": TorchvisionSet("CIFAR10", _TRAIN_TEST),
    "cifar100": TorchvisionSet("CIFAR100", _TRAIN_TEST),
    "dtd": TorchvisionSet("DTD", _named("train", "val", "test")),
    "eurosat": TorchvisionSet("EuroSAT", {"": {}}),
    "fashion-mnist": TorchvisionSet("FashionMNIST", _TRAIN_TEST),
    "flowers102": TorchvisionSet("Flowers102", _named("train", "val", "test")),
    "food101": TorchvisionSet("Food101", _named("train", "test")),
    "imagenette": TorchvisionSet("Imagenette", _named("train", "val", size="320px")),
    "kmnist": TorchvisionSet("KMNIST", _TRAIN_TEST),
    "mnist": TorchvisionSet("MNIST", _TRAIN_TEST),
    "stl10": TorchvisionSet("STL10", _named("train", "test", "unlabeled")),
    "svhn": TorchvisionSet("SVHN", _named("train", "test", "extra")),
}


def data_root() -> Path:
    """Where downloads go: $BARLOW_DATA, by default ~/.cache/barlow."""
    return Path(os.environ.get("BARLOW_DATA") or "~/.cache/barlow").expanduser()


def open_torchvision(name: str, choose: SplitChooser) -> Table:
    """Open the chosen splits of one of torchvision's data sets."""
    entry = TORCHVISION_SETS[name]
    chosen = choose([split for split in entry.splits if split]) or [""]
    tables = [_table(_load(name, entry, entry.splits[split]), split) for split in chosen]
    return tables[0] if len(tables) == 1 else _joined(tables)


def _load(name: str, entry: TorchvisionSet, arguments: dict[str, Any]) -> Any:
    from filelock import FileLock
    from torchvision import datasets

    kind: Callable[..., Any] = getattr(datasets, entry.kind)
    root = data_root()
    if "loader" in kind.__init__.__annotations__:
        arguments = arguments | {"loader": str}  # keeps the path, so that we do the decoding
    try:
        return kind(root, **arguments)
    except RuntimeError:
        pass  # not downloaded yet
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # several ranks may get here at once
            return kind(root, **arguments, download=True)
    except Exception as error:
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({one_line(error)}): "
            "set BARLOW_DATA to the folder that contains it, or use a folder of images"
        ) from None


def _table(dataset: Any, split: str) -> Table:
    classes = getattr(dataset, "classes", None)
    if hasattr(dataset, "data"):
        records: Any = np.asarray(dataset.data)
        labels = np.asarray(getattr(dataset, "targets", getattr(dataset, "labels", None)))
        ids: Sequence[str] = RowIds(split or "row", range(len(records)))
        if records.ndim == 4 and records.shape[1] == 3:
            records = records.transpose(0, 2, 3, 1)  # (N, H, W, C)
        fingerprint = hash_of([np.ascontiguousarray(records).data.cast("B").tobytes()])
    else:
        items = [dataset[i] for i in range(len(dataset))]
        records = ids = [str(path) for path, _ in items]
        labels = np.array([label for _, label in items])
        fingerprint = hash_of(os.path.basename(path) for path in records)
    if (labels < 0).any():  # stl10's unlabelled images
        return Table(records, ids, None, None, fingerprint)
    if classes and isinstance(classes[0], tuple):  # imagenette has a tuple of synonyms
        classes = [names[0] for names in classes]
    return Table(records, ids, labels, list(classes) if classes else None, fingerprint)


def _joined(tables: Sequence[Table]) -> Table:
    records: Any = (
        np.concatenate([table.records for table in tables])
        if isinstance(tables[0].records, np.ndarray)
        else [table.records[i] for table in tables for i in range(len(table.records))]
    )
    labels = [table.labels for table in tables if table.labels is not None]
    return Table(
        records,
        [name for table in tables for name in table.ids],
        np.concatenate(labels) if len(labels) == len(tables) else None,
        tables[0].classes,
        hash_of(table.fingerprint for table in tables),
    )
