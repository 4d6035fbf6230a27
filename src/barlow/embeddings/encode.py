"""Embeddings in memory: computed from images, or read from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from barlow.data import Source, open_source, preprocess_of
from barlow.embeddings.table import open_table
from barlow.evaluation.compared import encoder_at
from barlow.evaluation.features import extract


class Embeddings(NamedTuple):
    """Images as vectors, in the order of their source.

    Attributes:
        ids: one for each row.
        embeddings: `(N, F)` float32.
        labels: the class of each image, None where it has none; None if no image has one.
    """

    ids: list[str]
    embeddings: np.ndarray[Any, np.dtype[np.float32]]
    labels: list[str | None] | None = None


def embed(
    encoder: str | Path | nn.Module,
    source: str,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    accelerator: str = "auto",
) -> Embeddings:
    """Run an encoder over every image of a source.

    Broken images are left out. For more images than fit in memory there is
    `barlow.embeddings.writing.write_embeddings`, or `barlow embed` on the command line.

    Args:
        encoder: a run, a checkpoint, a timm folder, or a module with its `preprocess`.
        source: where the images are; `::split` at its end picks one split.
        batch_size: images at a time.
        limit: only the first so many images.
        accelerator: auto, cpu, cuda or mps, for an encoder that is loaded; a module stays where it
            is.

    Returns:
        Ids, embeddings and labels.

    Raises:
        UserError: if there is no such encoder or source, or no image can be read.

    Example:
        >>> import barlow
        >>> encoder = barlow.create_encoder("resnet18", image_size=32, in_chans=1)
        >>> encoder.preprocess = barlow.data.Preprocess(32, in_chans=1)
        >>> found = embed(encoder, "mnist5k::test", limit=2)
        >>> found.embeddings.shape, found.ids, found.labels
        ((2, 512), ['test:0', 'test:1'], ['0', '1'])
    """
    module = encoder_at(encoder, accelerator)
    images = open_source(source, in_chans=preprocess_of(module).in_chans, limit=limit)
    x, rows = extract(module, images, batch_size)
    read = rows.tolist()
    return Embeddings([images.ids[row] for row in read], x.numpy(), labels_of(images, read))


def read_embeddings(file: str | Path) -> Embeddings:
    """Read what `barlow embed` wrote.

    Args:
        file: a Parquet file with a column `embedding`.

    Returns:
        All of it in memory, float16 as float32.

    Raises:
        UserError: if there is no such file, or no embedding in it.
    """
    table = open_table(file)
    x = torch.empty(table.images, table.features)
    for start, block in table.blocks():
        x[start : start + len(block)] = block
    columns = table.columns()
    return Embeddings(columns["id"], x.numpy(), columns.get("label"))


def labels_of(source: Source, rows: Sequence[int]) -> list[str | None] | None:
    """The names of the classes of some images, None where one has none; None if no image has."""
    if source.labels is None:
        return None
    names, labels = source.classes, source.labels[torch.as_tensor(rows, dtype=torch.int64)]
    return [
        None if label < 0 else names[label] if names else str(label) for label in labels.tolist()
    ]
