"""A map of all images of a file of embeddings, in the browser."""

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from barlow.atomic import write_atomically
from barlow.embeddings.encode import read_embeddings
from barlow.embeddings.images import source_of, thumbnails
from barlow.embeddings.neighbours import nearest
from barlow.embeddings.table import EmbeddingTable, open_table
from barlow.errors import UserError
from barlow.progress import Reporter

_NEIGHBOURS = 15  # per image; UMAP's default
_EXACT = 50_000  # most images with an exact neighbour search; for more, UMAP's own is used
_FEWEST = 20  # images that a map needs at least
_ROWS = 4096  # per row group, and so the number of thumbnails held at a time
_STATE = b"barlow.embeddings"  # metadata key: size and time of the file that was mapped


def explore(file: str, *, port: int = 5055, reporter: Reporter | None = None) -> None:
    """Draw a map of all images of a file, once, and serve it on this machine until interrupted.

    Args:
        file: Parquet file written by `barlow embed`.
        port: port to serve on; if it is taken, the next free one.
        reporter: receives a message before slow work.

    Raises:
        UserError: if Embedding Atlas is not installed or fails, or there are fewer than 20 images.
    """
    command = [
        *(sys.executable, "-m", "embedding_atlas.cli", str(draw_map(file, reporter))),
        *("--image", "image", "--x", "projection_x", "--y", "projection_y"),
        *("--neighbors", "neighbors", "--host", "127.0.0.1", "--port", str(port)),
    ]
    with suppress(KeyboardInterrupt):  # the user stops the server with Ctrl-C
        if status := subprocess.run(command).returncode:
            raise UserError(f"Embedding Atlas exited with status {status}: see its output above")


def draw_map(file: str, reporter: Reporter | None = None) -> Path:
    """Write what Embedding Atlas shows: positions in two dimensions, neighbours and thumbnails.

    Args:
        file: Parquet file written by `barlow embed`.
        reporter: receives a message before slow work.

    Returns:
        The Parquet file, `FILE.map.parquet` for FILE.parquet; not rewritten if `file` is unchanged.

    Raises:
        UserError: if the extra `explore` is not installed, or there are fewer than 20 images.
    """
    if not all(importlib.util.find_spec(name) for name in ("embedding_atlas", "umap")):
        raise UserError("Embedding Atlas is not installed: pip install embedding-atlas umap-learn")
    table = open_table(file)
    if table.images < _FEWEST:
        raise UserError(f"{file} has {table.images} images: a map needs {_FEWEST} or more")
    out = table.path.with_suffix(".map.parquet")
    stat = table.path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}".encode()
    if _state_of(out) != state:
        (reporter or Reporter()).say(f"drawing {out}, which takes a minute or more")
        x = read_embeddings(file).embeddings
        neighbours = _neighbours(table, x)
        places = _project(x, neighbours)
        write_atomically(out, lambda f: _write(f, table, state, places, *neighbours))
    return out


def _project(
    x: np.ndarray[Any, Any], neighbours: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """Project embeddings to positions `(N, 2)` at which neighbours stay neighbours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from UMAP and its dependencies, meant for developers
        from umap import UMAP

        count = neighbours[0].shape[1]
        umap = UMAP(count, metric="cosine", precomputed_knn=neighbours, random_state=0, n_jobs=1)
        places: np.ndarray[Any, Any] = umap.fit_transform(x)
    return places


def _neighbours(
    table: EmbeddingTable, x: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The nearest images of each image, itself included, and their distances; both `(N, 15)`."""
    if table.images > _EXACT:
        random = np.random.RandomState(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from umap.umap_ import nearest_neighbors

            found = nearest_neighbors(x, _NEIGHBOURS, "cosine", None, False, random)
        return found[0], found[1]
    similarity, rows = nearest(table, torch.from_numpy(x), _NEIGHBOURS)
    return rows.numpy(), (1 - similarity).clamp_min(0).numpy()


def _write(
    file: IO[bytes],
    table: EmbeddingTable,
    state: bytes,
    places: np.ndarray[Any, Any],
    ids: np.ndarray[Any, Any],
    distances: np.ndarray[Any, Any],
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    columns = {name: pa.array(values, pa.string()) for name, values in table.columns().items()}
    columns["projection_x"] = pa.array(places[:, 0], pa.float32())
    columns["projection_y"] = pa.array(places[:, 1], pa.float32())
    columns["neighbors"] = pa.StructArray.from_arrays(
        [
            pa.array(list(ids), pa.list_(pa.int32())),
            pa.array(list(distances), pa.list_(pa.float32())),
        ],
        ["ids", "distances"],
    )
    known = pa.table(columns)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the format of `datasets`
    schema = known.schema.append(pa.field("image", kind)).with_metadata({_STATE: state})
    with ParquetWriter(file, schema) as writer:
        for start, images in _images(table):
            some = known.slice(start, len(images))
            writer.write_table(some.append_column("image", pa.array(images, kind)).cast(schema))


def _images(table: EmbeddingTable) -> Iterator[tuple[int, list[dict[str, Any] | None]]]:
    source = source_of(table)
    for start in range(0, table.images, _ROWS):
        rows = range(start, min(start + _ROWS, table.images))
        found = thumbnails(table, rows, source)
        yield start, [{"bytes": found[r], "path": None} if r in found else None for r in rows]


def _state_of(file: Path) -> bytes | None:
    import pyarrow as pa
    from pyarrow.parquet import read_schema

    try:
        return (read_schema(file).metadata or {}).get(_STATE)
    except (OSError, pa.ArrowInvalid):
        return None
