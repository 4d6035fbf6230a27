"""Where the vectors are in a Parquet file, if it stores them as they are laid out in memory."""

from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData, ParquetFile

EMBEDDING = "embedding"
ELEMENT = f"{EMBEDDING}.list.element"  # Parquet's name for the column of the vectors' elements

_DTYPES = {"float": torch.float32, "halffloat": torch.float16}
_HEADER_BYTES = 256  # more than a page header takes


class PlainVectors(NamedTuple):
    """Vectors that can be read without decoding.

    Attributes:
        spans: for each row group, the offset of its vectors in the file and their number.
        dtype: the type of their elements.
    """

    spans: list[tuple[int, int]]
    dtype: torch.dtype


def find_plain_vectors(path: Path, parquet: "ParquetFile", features: int) -> PlainVectors | None:
    """Find the vectors of a file that can be read without decoding.

    Args:
        path: the file.
        parquet: pyarrow's view of the file.
        features: width of the embedding.

    Returns:
        Where they are, or None if the file does not store them as they are laid out in memory.
    """
    embedding = parquet.schema_arrow.field(EMBEDDING)
    dtype = _DTYPES.get(str(embedding.type.value_type))
    if dtype is None or embedding.nullable or embedding.type.value_field.nullable:
        return None
    metadata, spans = parquet.metadata, list[tuple[int, int]]()
    leaves = [parquet.schema.column(i).path for i in range(metadata.num_columns)]
    if ELEMENT not in leaves:
        return None
    with open(path, "rb") as file:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunk = group.column(leaves.index(ELEMENT))
            size = group.num_rows * features * dtype.itemsize
            if not _is_plain(chunk) or not _is_one_page(file, chunk):
                return None
            # The values are at the end of the page, so their size gives their offset.
            end = chunk.data_page_offset + chunk.total_compressed_size
            spans.append((end - size, group.num_rows))
    return PlainVectors(spans, dtype)


def _is_plain(chunk: "ColumnChunkMetaData") -> bool:
    return (
        chunk.compression == "UNCOMPRESSED"
        and not chunk.has_dictionary_page
        and set(chunk.encodings) <= {"PLAIN", "RLE"}  # RLE encodes the lists' lengths
    )


def _is_one_page(file: IO[bytes], chunk: "ColumnChunkMetaData") -> bool:
    """Whether a column chunk is a single page, judged by the size in the page's header."""
    file.seek(chunk.data_page_offset)
    header = file.read(_HEADER_BYTES)
    # Thrift's compact protocol: the first three fields are the page's type, uncompressed size and
    # compressed size. Each is a byte 0x15 ("the next field, an int32") and a zigzag varint.
    at, number = 0, 0
    for _ in range(3):
        if header[at] != 0x15:
            return False
        number, shift = 0, 0
        while True:
            at += 1
            number |= (header[at] & 0x7F) << shift
            shift += 7
            if header[at] < 0x80:
                break
        at += 1
    return bool(0 < chunk.total_compressed_size - number // 2 < _HEADER_BYTES)
