"""Parquet files on the hub that are read without downloading them, one row group at a time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from barlow.data.decode import Raw
from barlow.data.parquet import image_column, raw_of
from barlow.data.source import RowIds, Table, hash_of
from barlow.errors import UserError, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_AT_ONCE = 2**28  # bytes of row groups that are shuffled together and that a worker keeps
_MOST = 16  # row groups; with the hub's 100 photographs in each, 1,600 are shuffled together


class RowGroups:
    """The images of remote Parquet files; row groups are fetched whole, and the last few kept."""

    def __init__(
        self,
        system: "AbstractFileSystem",
        places: list[tuple[str, Any, int]],
        starts: np.ndarray[Any, Any],
        column: str,
        keep: int,
    ) -> None:
        """`places`: each group's file, its metadata, the group's index; `starts`: first rows."""
        self._system, self._places, self._starts = system, places, starts
        self._column, self._keep = column, keep
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Raw:
        """The image of one row, undecoded."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if (rows := self._kept.get(group)) is None:
            rows = self._kept[group] = self._fetch(group)
            while len(self._kept) > self._keep:
                self._kept.pop(next(iter(self._kept)), None)  # the oldest
        return raw_of(rows[int(index - self._starts[group])].as_py())

    def _fetch(self, group: int) -> Any:
        import pyarrow.parquet as pq

        name, metadata, number = self._places[group]
        try:
            with self._system.open(name, cache_type="none") as file:
                table = pq.ParquetFile(file, metadata=metadata).read_row_group(
                    number, columns=[self._column], use_threads=False
                )
        except Exception as error:  # from the network, its libraries or Parquet
            why = one_line(error, 200)
            raise UserError(
                f"cannot read {name} from the hub ({why}): run the same command again to resume"
            ) from None
        return table.column(self._column)


def open_remote(system: "AbstractFileSystem", files: Sequence[str], name: str, split: str) -> Table:
    """Open Parquet files on the hub without downloading them: only their footers are read now.

    Args:
        system: where the files are.
        files: their names there, which contain a revision unless the files never change.
        name: what the user called the data set.
        split: prefix of the ids of the rows.

    Returns:
        The table, without labels: they would take a request for every row group.
    """
    import pyarrow.parquet as pq
    from datasets import Features

    def footer(file: str) -> Any:
        with system.open(file, cache_type="none") as opened:
            return pq.ParquetFile(opened).metadata

    with ThreadPoolExecutor(8) as pool:
        footers = list(pool.map(footer, files))
    column = image_column(Features.from_arrow_schema(footers[0].schema.to_arrow_schema()), name)
    places, lengths, sizes = [], [], []
    for file, metadata in zip(files, footers, strict=True):
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            places.append((file, metadata, number))
            lengths.append(group.num_rows)
            sizes.append(group.total_byte_size)
    together = int(max(1, min(_MOST, _AT_ONCE // max(1, max(sizes)))))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    records = RowGroups(system, places, starts, column, keep=together)
    ids = RowIds(split or "row", range(len(records)))
    fingerprint = hash_of([*files, str(len(records))])
    return Table(records, ids, fingerprint=fingerprint, blocks=starts, blocks_together=together)
