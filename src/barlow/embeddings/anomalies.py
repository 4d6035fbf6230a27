"""Images that are unlike the training images, or unlike the rest of their file."""

from pathlib import Path

import torch
from torch import Tensor

from barlow.atomic import write_csv
from barlow.embeddings.images import thumbnails
from barlow.embeddings.neighbours import nearest
from barlow.embeddings.sheet import Card, Listing, write_sheet
from barlow.embeddings.table import EmbeddingTable, open_table
from barlow.errors import UserError

_AT_ONCE = 4096  # images judged in one pass over the training images


def find_anomalies(
    file: str,
    train: str | None = None,
    *,
    k: int = 5,
    top: int = 20,
    out: str | None = None,
    html: str | None = None,
) -> Listing:
    """Rank images by their distance to the nearest training images, or to the rest of their file.

    The distance is 1 minus the mean cosine similarity to the k nearest images. Within one file, an
    image is not compared with itself.

    Args:
        file: Parquet file written by `barlow embed`, with the images to judge.
        train: Parquet file of the training images, by the same encoder; default: compare the images
            of the first file with each other.
        k: number of nearest images to average over.
        top: number of images to show, most distant first.
        out: CSV file to write, with the distance of every image.
        html: HTML page to write, with the images shown and the nearest image of each.

    Returns:
        The first images.

    Raises:
        UserError: if the two files are from different encoders, or a single file has only one
            image.
    """
    if k < 1:
        raise UserError(f"k is {k}: it must be at least 1")
    table, known = open_table(file), open_table(train or file)
    if len({t.about["encoder"] for t in (table, known) if t.about}) > 1:
        raise UserError(
            f"{file} and {train} come from different encoders: embed both with the same one"
        )
    same_file = known.path.samefile(table.path)
    if same_file and table.images == 1:
        raise UserError(f"{file} has one image: give --train with images to compare it with")
    found = [
        _nearest_others(
            known, table, range(start, min(start + _AT_ONCE, table.images)), k, same_file
        )
        for start in range(0, table.images, _AT_ONCE)
    ]
    distance = torch.cat([1 - similarity.mean(1) for similarity, _ in found])  # (N,)
    rows = torch.cat([rows[:, 0] for _, rows in found])  # (N,)
    order = distance.argsort(descending=True, stable=True)[: None if out else top].tolist()
    names = table.names(order)
    nearest_row = rows[order].tolist()
    labels = table.columns(order).get("label", [None] * len(order))
    lines = [
        [f"{d:.4f}", name, label or "", other]
        for d, name, label, other in zip(
            distance[order].tolist(), names, labels, known.names(nearest_row), strict=True
        )
    ]
    kind = "other" if same_file else "training"
    headings = ["distance", "image", "label", f"nearest {kind} image"]
    if out is not None:
        write_csv(Path(out), headings, lines)
    if html is not None:
        pictures = thumbnails(table, order[:top])
        others = thumbnails(known, nearest_row[:top])
        sections = [
            (line[0], [Card(pictures.get(i), line[1], line[2]), Card(others.get(j), line[3], "")])
            for line, i, j in zip(lines, order[:top], nearest_row[:top], strict=False)
        ]
        write_sheet(html, f"Anomalies in {file}", sections)
    return Listing(headings, lines[:top])


def _nearest_others(
    known: EmbeddingTable, table: EmbeddingTable, of: range, k: int, same_file: bool
) -> tuple[Tensor, Tensor]:
    """The nearest images to the rows `of`; within one file, each image itself is left out."""
    similarity, rows = nearest(known, table.vectors(of.start, of.stop), k + same_file)
    if not same_file:
        return similarity, rows
    others = rows != torch.arange(of.start, of.stop)[:, None]
    others[others.all(1), -1] = False  # with over k exact copies, the image itself may be missing
    return similarity[others].view(len(rows), -1), rows[others].view(len(rows), -1)
