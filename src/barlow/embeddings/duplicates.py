"""Near-duplicate images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from barlow.atomic import write_csv
from barlow.embeddings.images import thumbnails
from barlow.embeddings.neighbours import pairs_above
from barlow.embeddings.sheet import Card, Listing, write_sheet
from barlow.embeddings.table import open_table
from barlow.errors import UserError


def find_duplicates(
    file: str,
    threshold: float = 0.99,
    *,
    top: int = 20,
    out: str | None = None,
    html: str | None = None,
) -> Listing:
    """Find all pairs of near-duplicate images in a file, by cosine similarity of their embeddings.

    Pairs that share an image form a group.

    Args:
        file: Parquet file written by `barlow embed`.
        threshold: smallest similarity of a pair. A good value depends on the encoder: look at the
            pairs.
        top: number of pairs to show, most similar first.
        out: CSV file to write, with all pairs and their groups.
        html: HTML page to write, with the images of the pairs shown; needs no network.

    Returns:
        The first pairs, and how many there are.

    Raises:
        UserError: if the file holds no embeddings, or more than ten million pairs are at or above
            the threshold.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}: a cosine similarity is between -1 and 1")
    table = open_table(file)
    pairs, similarity = pairs_above(table, threshold)
    rows, at = torch.unique(pairs, return_inverse=True)  # (M,), (P, 2)
    names = table.names(rows.tolist())
    group, groups = _groups(at, len(rows))

    def lines(some: slice) -> Iterator[list[str]]:
        for (i, j), s in zip(at[some].tolist(), similarity[some].tolist(), strict=True):
            yield [f"{s:.4f}", names[i], names[j], str(group[i])]

    headings = ["similarity", "image", "other image", "group"]
    if out is not None:
        write_csv(Path(out), headings, lines(slice(None)))
    top_lines = list(lines(slice(top)))
    if html is not None:
        pictures = thumbnails(table, pairs[:top].flatten().tolist())
        sections = [
            (f"{s}, group {number}", [Card(pictures.get(i), a, ""), Card(pictures.get(j), b, "")])
            for (s, a, b, number), (i, j) in zip(top_lines, pairs[:top].tolist(), strict=True)
        ]
        write_sheet(html, f"Near-duplicates in {file}", sections)
    note = (
        f"{len(pairs)} pairs among {table.images} images, in {groups} groups: keeping one image "
        f"of each group would remove {len(rows) - groups}"
    )
    return Listing(headings, top_lines, note)


def _groups(pairs: Tensor, images: int) -> tuple[list[int], int]:
    """The group of every image, numbered from 1 in the order of the pairs; the number of groups."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = pairs.numpy().T
    groups, group = connected_components(
        coo_array((np.ones(len(i), np.int8), (i, j)), (images, images)), directed=False
    )
    place = np.empty(groups, np.int64)
    first = dict.fromkeys(group[i].tolist())  # groups in order of first appearance
    place[list(first)] = np.arange(1, groups + 1)
    return place[group].tolist(), int(groups)
