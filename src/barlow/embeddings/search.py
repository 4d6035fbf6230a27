"""Search for images that are similar to given ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.data import preprocess_of
from barlow.data.decode import BrokenImage, decode
from barlow.data.folder import printable
from barlow.embeddings.images import picture_of, thumbnails
from barlow.embeddings.neighbours import nearest
from barlow.embeddings.sheet import Card, Listing, write_sheet
from barlow.embeddings.table import EmbeddingTable, open_table
from barlow.errors import UserError
from barlow.evaluation.features import fingerprint_of


class Hit(NamedTuple):
    """An image that was found."""

    row: int
    similarity: float
    id: str
    label: str | None
    path: str | None


def search(encoder: str, queries: Sequence[str], file: str, top: int = 20) -> list[list[Hit]]:
    """Find the images of a file that are most similar to some others, by exact cosine similarity.

    Args:
        encoder: the encoder that the embeddings were computed with: a run, a checkpoint, a timm
            folder, or anything else that `load_encoder` takes.
        queries: image files, or ids of images in the Parquet file.
        file: Parquet file written by `barlow embed`.
        top: number of images to find for each query.

    Returns:
        The images found for each query, most similar first.

    Raises:
        UserError: if the embeddings are from another encoder, or a query cannot be read.
    """
    if top < 1:
        raise UserError(f"top is {top}: it must be at least 1")
    table = open_table(file)
    similarity, rows = nearest(table, _embed_queries(encoder, queries, table), top)
    columns = table.columns(rows.flatten().tolist())
    none = [None] * rows.numel()
    hit_fields = zip(
        rows.flatten().tolist(),
        similarity.flatten().tolist(),
        columns["id"],
        columns.get("label", none),
        columns.get("path", none),
        strict=True,
    )
    hits = [Hit(*fields) for fields in hit_fields]
    k = rows.shape[1]
    return [hits[i : i + k] for i in range(0, len(hits), k)]


def search_and_show(
    encoder: str, queries: Sequence[str], file: str, top: int = 20, html: str | None = None
) -> Listing:
    """Run `search` and present its hits as a table and, if `html` is given, a page of thumbnails.

    Args:
        encoder: the encoder that the embeddings were computed with: a run, a checkpoint, a timm
            folder, or anything else that `load_encoder` takes.
        queries: image files, or ids of images in the Parquet file.
        file: Parquet file written by `barlow embed`.
        top: number of images to find for each query.
        html: HTML page to write, with each query and the images found; needs no network.
    """
    found = search(encoder, queries, file, top)
    lines = [
        [printable(query), str(rank), f"{hit.similarity:.4f}", hit.label or "", hit.path or hit.id]
        for query, hits in zip(queries, found, strict=True)
        for rank, hit in enumerate(hits, 1)
    ]
    headings = ["query", "rank", "similarity", "label", "image"]
    if html is not None:
        table = open_table(file)
        pictures = thumbnails(table, [hit.row for hits in found for hit in hits])
        sections = []
        for query, hits in zip(queries, found, strict=True):
            cards = [
                Card(pictures.get(hit.row), hit.id, f"{hit.similarity:.4f} {hit.label or ''}")
                for hit in hits
            ]
            name = printable(query)
            asked = [Card(picture_of(query), name, "query")] if Path(query).is_file() else []
            sections.append((name, [*asked, *cards]))
        write_sheet(html, f"Search in {file}", sections)
    return Listing(headings, lines, f"page: {html}" if html else "")


def _embed_queries(encoder: str, queries: Sequence[str], table: EmbeddingTable) -> Tensor:
    """Vectors of the queries `(Q, F)`: files are encoded, ids are looked up in the table."""
    from barlow.share import load_encoder

    files = [query for query in queries if Path(query).is_file()]
    named = [query for query in queries if query not in files]
    vectors: dict[str, Tensor] = {}
    if named:
        place = {name: row for row, name in enumerate(table.columns()["id"])}
        for query in named:
            if query not in place:
                raise UserError(
                    f"no image {query!r}: it is neither a file nor an id in {table.path}"
                )
            row = place[query]
            vectors[query] = table.vectors(row, row + 1)[0]
    model = load_encoder(encoder)
    if table.about and table.about["encoder"] != fingerprint_of(model):
        raise UserError(
            f"the embeddings in {table.path} come from another encoder than {encoder}: "
            "search with the one that made them, or embed again"
        )
    preprocess = preprocess_of(model)
    for query in files:
        try:
            image = decode(query, preprocess.in_chans)
        except BrokenImage as error:
            raise UserError(f"{query} cannot be read: {error}") from None
        with torch.inference_mode():
            vectors[query] = model(preprocess(image)[None])[0].float()
    return torch.stack([vectors[query] for query in queries])
