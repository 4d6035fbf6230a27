"""Nearest neighbours and similar pairs by exact cosine similarity, in bounded memory."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.embeddings.table import EmbeddingTable
from barlow.errors import UserError

_BLOCK = 2**20  # similarities in a block, unless _QUERIES for each query are more
_QUERIES = 4096  # rows compared with the file at a time, in a search for pairs
_MOST_PAIRS = 10_000_000
_ROUNDING = 1e-6  # error of a float32 cosine: a vector and itself may give slightly less than 1


def nearest(table: EmbeddingTable, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of a file for each query.

    Args:
        table: the file.
        queries: `(Q, F)` float32.
        k: how many; all rows if there are fewer.

    Returns:
        Cosine similarities `(Q, k)`, the largest first, and the rows `(Q, k)` int64.

    Raises:
        UserError: if the queries have a different number of features.
    """
    if queries.shape[1] != table.features:
        raise UserError(
            f"{table.path} has {table.features} features per image, the query has "
            f"{queries.shape[1]}: they come from different encoders"
        )
    k = min(k, table.images)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start, similarity in _similarities(table, queries):
        top, at = similarity.topk(min(k, similarity.shape[1]))
        best, rows = torch.cat([best, top], 1), torch.cat([rows, at + start], 1)
        best, order = best.topk(min(k, best.shape[1]))
        rows = rows.gather(1, order)
    return best, rows


def pairs_above(table: EmbeddingTable, threshold: float) -> tuple[Tensor, Tensor]:
    """Find all pairs of rows of a file whose cosine similarity is at least a threshold.

    Args:
        table: the file.
        threshold: the lowest cosine similarity of a pair.

    Returns:
        Pairs of rows `(P, 2)` int64, the smaller row first, and their similarities `(P,)`, both in
        order of decreasing similarity.

    Raises:
        UserError: if there are more than ten million.
    """
    pairs, similarities, count = list[Tensor](), list[Tensor](), 0
    for first in range(0, table.images, _QUERIES):
        queries = table.vectors(first, min(first + _QUERIES, table.images))
        for start, similarity in _similarities(table, queries, first):
            i, j = (similarity >= threshold - _ROUNDING).nonzero(as_tuple=True)
            later = start + j > first + i
            i, j = i[later], j[later]
            pairs.append(torch.stack([first + i, start + j], 1))
            similarities.append(similarity[i, j])
            count += len(i)
            if count > _MOST_PAIRS:
                raise UserError(
                    f"{table.path} has more than {_MOST_PAIRS:,} pairs with similarity "
                    f"{threshold:g} or more: raise the threshold"
                )
    found, order = torch.cat(similarities).sort(descending=True, stable=True)
    return torch.cat(pairs)[order], found


def _similarities(
    table: EmbeddingTable, queries: Tensor, first: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Cosine similarities of the queries `(Q, F)` and the rows from `first` on, in blocks.

    Yields:
        The first row of a block and its similarities `(Q, n)`, which the next block overwrites.
    """
    queries = F.normalize(queries)
    size = max(_QUERIES, _BLOCK // len(queries))
    held = torch.empty(len(queries), size)
    start, filled = first, 0
    for _, block in table.blocks(first):
        for some in torch.split(block, size):
            if filled + len(some) > size:
                yield start, held[:, :filled]
                start, filled = start + filled, 0
            # Dividing by the norms afterwards reads the block twice but does not copy it.
            lengths = torch.linalg.vector_norm(some, dim=1).clamp_min_(1e-12)
            held[:, filled : filled + len(some)] = (queries @ some.T).div_(lengths)
            filled += len(some)
    if filled:
        yield start, held[:, :filled]
