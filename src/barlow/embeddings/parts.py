"""A long computation in parts, each written atomically to a folder, and joined into one file.

A part is the same whichever process computes it and whenever, so a killed process costs at most the
parts in progress, and the file has the same bytes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from barlow.atomic import write_atomically, write_text
from barlow.data import Source
from barlow.data.folder import printable
from barlow.embeddings.encode import class_names_of
from barlow.embeddings.images import on_disk
from barlow.embeddings.table import Rows, group_size, write_table
from barlow.errors import UserError

_IMAGES = 1024  # per part: what a killed process may have to do again

Skipped = list[tuple[int, str]]  # rows of the source that cannot be read, and the reasons


@dataclass(frozen=True)
class Part:
    """Images `start` to `stop` of a source, and the file their embeddings are in once computed."""

    start: int
    stop: int
    file: Path

    def save(self, x: Tensor, rows: Tensor, skipped: Skipped) -> None:
        """Write embeddings `(n, F)`, their rows in the source `(n,)` and the images skipped."""
        content = save({"x": x, "rows": rows}, {"skipped": json.dumps(skipped)})
        write_atomically(self.file, lambda file: file.write(content))

    def load(self) -> tuple[Tensor, Tensor]:
        """The embeddings and rows that were saved."""
        with self._open() as file:
            return file.get_tensor("x"), file.get_tensor("rows")

    def skipped(self) -> Skipped:
        """The images that could not be read, without reading the embeddings."""
        with self._open() as file:
            return [(row, reason) for row, reason in json.loads(file.metadata()["skipped"])]

    def _open(self) -> Any:
        try:
            return safe_open(self.file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.file} is damaged ({error}): remove it and try again") from error


def parts_of(images: int, batch_size: int, folder: Path) -> list[Part]:
    """The parts of a source, each of whole batches."""
    size = -(-_IMAGES // batch_size) * batch_size
    starts = range(0, images, size)
    return [Part(s, min(s + size, images), folder / f"{s:012}.safetensors") for s in starts]


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Create the folder of the parts, or reuse the one that an interrupted computation left.

    Args:
        folder: the folder of the parts.
        plan: everything that the parts depend on, as plain values.

    Raises:
        UserError: if the folder holds parts of another plan.
    """
    file, text = folder / "plan.json", json.dumps(plan, indent=2) + "\n"
    if not file.exists():
        write_text(file, text)
    elif file.read_text() != text:
        raise UserError(
            f"{folder} holds an unfinished embedding with another encoder, source or options: "
            "finish it, remove the folder, or give another --out"
        )


def join(parts: Sequence[Part], images: Source, out: Path, about: dict[str, Any]) -> int:
    """Write the parts as one file, and remove their folder.

    Args:
        parts: all parts, already computed.
        images: the source; the images that could not be read are recorded in it.
        out: Parquet file to write.
        about: metadata to store in the file; its "dtype" is that of the vectors.

    Returns:
        The number of embeddings.

    Raises:
        UserError: if more images are broken than the source allows, or no image could be read.
    """
    for part in parts:
        for row, reason in part.skipped():
            images.skip(row, reason)
    count = len(images) - len(images.skipped)
    if not count:
        raise UserError(f"{images.name}: no image could be read")
    features = next(x.shape[1] for x, rows in (part.load() for part in parts) if len(rows))
    write = partial(
        write_table,
        groups=_groups(parts, images, group_size(features, about["dtype"])),
        features=features,
        dtype=about["dtype"],
        labelled=images.labels is not None,
        about={**about, "skipped": len(images.skipped)},
    )
    # Written inside the folder first, so that a process killed here leaves no other file behind.
    folder = parts[0].file.parent
    whole = folder / "whole.parquet"
    write_atomically(whole, write)
    os.replace(whole, out)
    shutil.rmtree(folder)
    return count


def _groups(parts: Sequence[Part], images: Source, size: int) -> Iterator[Rows]:
    """The embeddings of all parts, regrouped to `size` rows at a time."""
    xs, rows = list[Tensor](), list[Tensor]()
    for part in parts:
        x, read = part.load()
        if len(read):
            xs.append(x)
            rows.append(read)
        while (ready := sum(map(len, rows))) >= size or (part is parts[-1] and ready):
            x, read = torch.cat(xs), torch.cat(rows)
            yield _rows(images, x[:size], read[:size].tolist())
            xs, rows = [x[size:]], [read[size:]]


def _rows(images: Source, x: Tensor, rows: list[int]) -> Rows:
    records = [images.records[row] for row in rows] if on_disk(images) else [None] * len(rows)
    paths = [_path(r) if isinstance(r, str) else None for r in records]
    return Rows([images.ids[row] for row in rows], paths, class_names_of(images, rows), x.numpy())


def _path(file: str) -> str | None:
    """The absolute path of a file; None if it is not valid text, which Parquet requires."""
    path = os.path.abspath(file)
    return path if printable(path) == path else None
