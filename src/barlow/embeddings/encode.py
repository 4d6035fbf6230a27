"""Embeddings in memory: computed from images, or read from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from barlow.data import Source, open_source, preprocess_of
from barlow.embeddings.table import open_table
from barlow.evaluation.features import extract, resolve_encoder


class Embeddings(NamedTuple):
    """Images as vectors, in the order of their source.

    Attributes:
        ids: the id of each image.
        embeddings: the encoder's representations, `(N, F)` float32.
        labels: the class of each image, None if it has none; None if no image has one.
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
    """Compute the representation of every image of a source, in memory.

    Images that cannot be read are left out. If the result does not fit in memory, use
    `barlow.embeddings.writing.write_embeddings`, or `barlow embed` on the command line.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        source: source of the images; `::split` at its end picks one split.
        batch_size: images per batch.
        limit: use only the first N images.
        accelerator: device type: auto, cpu, cuda or mps. A module stays on its device.

    Returns:
        Ids, embeddings (the encoder's representations) and labels.

    Raises:
        UserError: if there is no such encoder or source, or more than 5 % of the images cannot be
            read.

    Example:
        >>> import barlow
        >>> encoder = barlow.create_encoder("resnet18", image_size=32, in_chans=1)
        >>> encoder.preprocess = barlow.data.Preprocess(32, in_chans=1)
        >>> found = embed(encoder, "mnist5k::test", limit=2)
        >>> found.embeddings.shape, found.ids, found.labels
        ((2, 512), ['test:0', 'test:1'], ['0', '1'])
    """
    module = resolve_encoder(encoder, accelerator)
    images = open_source(source, in_chans=preprocess_of(module).in_chans, limit=limit)
    x, rows = extract(module, images, batch_size)
    read = rows.tolist()
    return Embeddings([images.ids[row] for row in read], x.numpy(), class_names_of(images, read))


def read_embeddings(file: str | Path) -> Embeddings:
    """Read a file that `barlow embed` wrote.

    Args:
        file: a Parquet file with columns `id` and `embedding`.

    Returns:
        The whole file in memory; float16 is converted to float32.

    Raises:
        UserError: if there is no such file, or it holds no embeddings.
    """
    table = open_table(file)
    x = torch.empty(table.images, table.features)
    for start, block in table.blocks():
        x[start : start + len(block)] = block
    columns = table.columns()
    return Embeddings(columns["id"], x.numpy(), columns.get("label"))


def class_names_of(source: Source, rows: Sequence[int]) -> list[str | None] | None:
    """The class names of some images, None for one without a class; None if no image has one."""
    if source.labels is None:
        return None
    names, labels = source.classes, source.labels[torch.as_tensor(rows, dtype=torch.int64)]
    return [
        None if label < 0 else names[label] if names else str(label) for label in labels.tolist()
    ]
