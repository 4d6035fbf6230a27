"""A source: numbered images, their ids and, if known, their labels."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from barlow import address
from barlow.data.decode import Picture, Raw
from barlow.errors import UserError

MAX_BROKEN = 0.05


class Records(Protocol):
    """What is stored for each image, read on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Raw: ...


@dataclass(frozen=True)
class Table:
    """What opening a source yields: the records of its images, and their ids and labels."""

    records: Records
    ids: Sequence[str]
    labels: np.ndarray[Any, Any] | None = None  # (N,), -1 where unknown
    classes: list[str] | None = None
    fingerprint: str = ""
    blocks: np.ndarray[Any, Any] | None = None
    """Starts of the blocks of records that are read in one go, and the end; None: one by one."""
    blocks_together: int = 1
    """How many blocks may be held in memory at a time."""


class Source:
    """Numbered images that are read one by one.

    Created by `open_source`. `source[i]` is image i as uint8 (C, H, W).

    Args:
        name: the source as the user wrote it.
        table: where the images are.
        in_chans: number of channels that every image is converted to.
        limit: use only the first `limit` images.
        max_broken: largest share of images that may be broken.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        in_chans: int = 3,
        limit: int | None = None,
        max_broken: float = MAX_BROKEN,
    ) -> None:
        """See the class."""
        self.name = name
        self.in_chans = in_chans
        self.records = table.records
        self.classes = table.classes
        self.max_broken = max_broken
        self.skipped: list[tuple[str, str]] = []  # (id, reason)
        self._broken: set[int] = set()
        self._len = len(table.records) if limit is None else min(limit, len(table.records))
        whole = len(table.ids) == self._len
        self._ids = table.ids if whole else table.ids[: self._len]
        labels = table.labels
        self.labels = None if labels is None else torch.as_tensor(labels[: self._len]).long()
        self._blocks, self._blocks_together = table.blocks, table.blocks_together
        self.fingerprint = hash_of([table.fingerprint, str(self._len), str(in_chans)])

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return self._len

    @property
    def ids(self) -> Sequence[str]:
        """A path or row id for every image."""
        return self._ids

    def order(self, key: int) -> Tensor:
        """The order of an epoch, (N,), under a key of `address`.

        Images that are read one by one are fully shuffled. If they come in blocks, the blocks are
        shuffled, and images only within groups of as many blocks as may be held at a time.
        """
        if self._blocks is None:
            return address.permutation(self._len, key)
        return address.block_permutation(self._blocks, self._len, self._blocks_together, key)

    @property
    def is_remote(self) -> bool:
        """Whether the images are read in blocks from a remote place."""
        return self._blocks is not None

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as uint8 (C, H, W); raises BrokenImage if it cannot be read."""
        return self.open(index).decode()

    def open(self, index: int) -> Picture:
        """Image `index` with its size known but its pixels not read; may raise BrokenImage."""
        if not -self._len <= index < self._len:
            raise IndexError(f"image {index} is out of range for {self._len} images")
        return Picture(self.records[index % self._len], self.in_chans)

    def skip(self, index: int, reason: str) -> None:
        """Record that an image is broken; raises UserError if too many are."""
        if index in self._broken:
            return
        self._broken.add(index)
        self.skipped.append((self._ids[index], reason))
        if len(self._broken) > self.max_broken * self._len:
            name, why = self.skipped[0]
            raise UserError(
                f"{self.name}: {len(self._broken)} of {self._len} images are broken, more than "
                f"the {self.max_broken:.0%} that max_broken allows; the first is {name} ({why})"
            )

    def part(self, rows: Sequence[int] | Tensor) -> "Source":
        """The source with only these images."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[chosen].numpy()
        records: Any = _Chosen(self.records, chosen)
        ids: Any = _Chosen(self._ids, chosen)
        fingerprint = hash_of([self.fingerprint, chosen.numpy().tobytes()])
        table = Table(records, ids, labels, self.classes, fingerprint)
        return Source(self.name, table, self.in_chans, max_broken=self.max_broken)

    def spread(self, number: int) -> "Source":
        """At most `number` images, spread over the source; of a remote source, the first ones."""
        if number >= len(self):
            return self
        # Spread over a remote source, each image would need a block of its own to be fetched.
        return self.part(range(number) if self.is_remote else spread(len(self), number))

    def __repr__(self) -> str:
        """Name and size."""
        return f"Source({self.name!r}, {self._len} images)"


class _Chosen:
    def __init__(self, values: Any, rows: Tensor) -> None:
        self._values, self._rows = values, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Chosen(self._values, self._rows[index])
        return self._values[int(self._rows[index])]


class RowIds(Sequence[str]):
    """Ids of rows, made on access: `prefix:0`, `prefix:1`..."""

    def __init__(self, prefix: str, rows: range) -> None:
        """The ids of `rows`, each with `prefix` in front."""
        self._prefix, self._rows = prefix, rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """One id, or the ids of a slice."""
        if isinstance(index, slice):
            return RowIds(self._prefix, self._rows[index])
        return f"{self._prefix}:{self._rows[index]}"


def spread(number: int, most: int) -> list[int]:
    """At most `most` of `number` rows, each once, spread over all of them at random distances.

    Sources are often sorted by class, so the first rows would not represent them, or cycle through
    the classes, so rows at a fixed distance would not.

    Example:
        >>> rows = spread(25, 20)
        >>> len(set(rows)), rows == sorted(rows)
        (20, True)
    """
    if number <= most:
        return list(range(number))
    within = address.uniform(address.SPREAD, torch.arange(most), 1)[:, 0].double()
    ends = torch.arange(most + 1) * number // most  # one row from each of `most` ranges
    rows: list[int] = (ends[:-1] + (ends.diff() * within).long()).tolist()
    return rows


def hash_of(parts: Iterable[str | bytes]) -> str:
    """A short hash of strings and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
