"""The Parquet file of embeddings: any Parquet reader can read it, and ours without decoding.

Vectors are written neither compressed nor encoded, those of a row group in a single page. They are
then laid out in the file as in memory, and a search reads them in place. With pyarrow, reading the
same column takes sixteen times as long, because Parquet counts the elements of every list, even if
all lists have the same length.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from barlow.embeddings.layout import ELEMENT, EMBEDDING, PlainVectors, find_plain_vectors
from barlow.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_ABOUT = b"barlow"  # key of our metadata in the file, stored as JSON

# The limits of a row group; pyarrow would write a larger one as two pages.
_GROUP_BYTES, _GROUP_ROWS = 2**24, 2**14
_BLOCK_BYTES = 2**20  # of vectors read together, so that they stay in a core's own cache


@dataclass(frozen=True)
class Rows:
    """Some rows of the table, column by column."""

    ids: Sequence[str]
    paths: Sequence[str | None]
    labels: Sequence[str | None] | None  # None if no image has one
    embeddings: np.ndarray[Any, Any]  # (n, F) float32 or float16


def group_size(features: int, dtype: str) -> int:
    """Rows per row group, for vectors of `features` elements of "float32" or "float16"."""
    return max(1, min(_GROUP_ROWS, _GROUP_BYTES // (features * np.dtype(dtype).itemsize)))


def write_table(
    file: IO[bytes],
    groups: Iterable[Rows],
    *,
    features: int,
    dtype: str,
    labelled: bool,
    about: dict[str, Any],
) -> None:
    """Write row groups, one after another.

    Args:
        file: a binary file, open for writing.
        groups: each of at most `group_size` rows.
        features: width of the embedding.
        dtype: "float32" or "float16".
        labelled: whether there is a column of labels.
        about: metadata to store in the file, as plain values.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    number = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    vector = pa.list_(number, features)
    columns = [pa.field("id", pa.string(), nullable=False), pa.field("path", pa.string())]
    if labelled:
        columns.append(pa.field("label", pa.string()))
    columns.append(pa.field(EMBEDDING, vector, nullable=False))
    schema = pa.schema(columns, metadata={_ABOUT: json.dumps(about)})
    texts = [column.name for column in columns[:-1]]
    with ParquetWriter(
        file,
        schema,
        compression={ELEMENT: "none", **dict.fromkeys(texts, "zstd")},
        use_dictionary=["label"],
        write_statistics=texts,
        data_page_size=4 * _GROUP_BYTES,  # never reached, so that each row group is one page
    ) as writer:
        for rows in groups:
            values: list[Any] = [pa.array(rows.ids, pa.string()), pa.array(rows.paths, pa.string())]
            if labelled:
                values.append(pa.array(rows.labels, pa.string()))
            flat = pa.array(np.ascontiguousarray(rows.embeddings).reshape(-1))
            values.append(pa.FixedSizeListArray.from_arrays(flat, type=vector))
            table = pa.Table.from_arrays(values, schema=schema)
            writer.write_table(table, row_group_size=max(1, len(table)))


@dataclass(frozen=True)
class EmbeddingTable:
    """An open file of embeddings; made by `open_table`.

    Attributes:
        path: path of the file.
        images: the number of rows.
        features: width of the embedding.
        about: our metadata in the file; empty if another program wrote it.
        parquet: pyarrow's view of the file.
    """

    path: Path
    images: int
    features: int
    about: dict[str, Any]
    parquet: "ParquetFile"

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The vectors from row `first` on, up to a few thousand at a time.

        Yields:
            The block's first row and its vectors `(n, F)` float32, which the next block overwrites.
        """
        plain = find_plain_vectors(self.path, self.parquet, self.features)
        blocks = self._decode() if plain is None else self._read_plain(plain, first)
        for start, block in blocks:
            if start + len(block) > first:
                yield max(start, first), block[max(0, first - start) :]

    def vectors(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, `(n, F)` float32."""
        x = torch.empty(stop - start, self.features)
        for at, block in self.blocks(start):
            if at >= stop:
                break
            n = min(len(block), stop - at)
            x[at - start : at - start + n] = block[:n]
        return x

    def columns(self, rows: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Everything but the vectors: `id`, `path` if there is one, `label` if there is one.

        Values are strings, whatever another program stored, or None where there is no value.

        Args:
            rows: which rows, in any order; default all.
        """
        names = [n for n in ("id", "path", "label") if n in self.parquet.schema_arrow.names]
        if rows is None:
            return _texts(self.parquet.read(names))
        if not len(rows):
            return {name: [] for name in names}
        metadata = self.parquet.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, rows, side="right")
        needed = np.unique(groups)
        found = self.parquet.read_row_groups(needed.tolist(), names)
        # Where each row group that was read begins in what was read.
        begin = dict(zip(needed, np.cumsum([0, *(sizes[g] for g in needed)]), strict=False))
        places = [
            int(begin[g] + row - (ends[g] - sizes[g])) for g, row in zip(groups, rows, strict=True)
        ]
        return _texts(found.take(places))

    def names(self, rows: Sequence[int]) -> list[str]:
        """Names by which a person finds some images: their paths, or else their ids."""
        columns = self.columns(rows)
        paths = columns.get("path", [None] * len(rows))
        return [path or name for path, name in zip(paths, columns["id"], strict=True)]

    def _read_plain(self, plain: PlainVectors, first: int) -> Iterator[tuple[int, Tensor]]:
        """Read the vectors in place, without decoding."""
        dtype = plain.dtype
        width = self.features * dtype.itemsize
        most = max(1, _BLOCK_BYTES // width)
        stored = torch.empty(most, self.features, dtype=dtype)
        memory = memoryview(stored.view(torch.uint8).numpy().data).cast("B")
        wide = torch.empty(most, self.features) if dtype != torch.float32 else stored
        row = 0
        with open(self.path, "rb", buffering=0) as file:
            for offset, rows in plain.spans:
                for at in range(0, rows, most):
                    n = min(most, rows - at)
                    if row + n > first:
                        file.seek(offset + at * width)
                        if file.readinto(memory[: n * width]) != n * width:
                            raise UserError(f"{self.path} is truncated: create it again")
                        if wide is not stored:
                            wide[:n] = stored[:n]
                        yield row, wide[:n]
                    row += n

    def _decode(self) -> Iterator[tuple[int, Tensor]]:
        """Decode the vectors with pyarrow, however they are stored."""
        row = 0
        for batch in self.parquet.iter_batches(batch_size=8192, columns=[EMBEDDING]):
            values = batch.column(0).flatten()
            if values.null_count or len(values) != len(batch) * self.features:
                raise UserError(f"{self.path} has embeddings of different lengths")
            x = values.to_numpy(zero_copy_only=False).astype(np.float32)
            yield row, torch.from_numpy(x).view(len(batch), self.features)
            row += len(batch)


def open_table(file: str | Path) -> EmbeddingTable:
    """Open a Parquet file with a column `embedding`, ours or another program's.

    Raises:
        UserError: if there is no such file or column.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"no file {path}: write one with `barlow embed ENCODER SOURCE --out {path}`"
        )
    try:
        parquet = ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {one_line(error, 200)}") from None
    schema = parquet.schema_arrow
    missing = {"id", EMBEDDING} - set(schema.names)
    if missing or not _is_vector(schema.field(EMBEDDING).type):
        raise UserError(
            f"{path} holds no embeddings (columns id and embedding, a list of numbers): "
            f"found {', '.join(schema.names)}"
        )
    if not parquet.metadata.num_rows:
        raise UserError(f"{path} has no rows")
    about = json.loads((schema.metadata or {}).get(_ABOUT, b"{}"))
    return EmbeddingTable(path, parquet.metadata.num_rows, _width(parquet), about, parquet)


def _texts(columns: "pa.Table") -> dict[str, list[Any]]:
    return {
        name: [None if value is None else str(value) for value in values]
        for name, values in columns.to_pydict().items()
    }


def _is_vector(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    is_list = types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def _width(parquet: "ParquetFile") -> int:
    kind = parquet.schema_arrow.field(EMBEDDING).type
    if hasattr(kind, "list_size"):
        return int(kind.list_size)
    batch = next(parquet.iter_batches(batch_size=1, columns=[EMBEDDING]))
    return len(batch.column(0)[0])
