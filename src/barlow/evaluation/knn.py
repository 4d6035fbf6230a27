"""Weighted nearest neighbours, which measure a representation without fitting anything."""

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.errors import UserError

# Similarities in memory at a time: 512 × 65,536 float32, 128 MiB, are enough for a fast product.
_QUERIES, _BANK = 512, 65_536


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of a bank by cosine; exact, in bounded memory.

    Args:
        queries: `(Q, F)` float32.
        bank: `(B, F)` float32.
        k: at most B.

    Returns:
        Similarities `(Q, k)`, the largest first, and the rows of the bank `(Q, k)` int64.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> nearest(torch.tensor([[2.0, 0.1]]), bank, 2)[1]
        tensor([[0, 2]])
    """
    bank = F.normalize(bank)
    found = [_nearest_of_chunk(F.normalize(q), bank, k) for q in torch.split(queries, _QUERIES)]
    return torch.cat([s for s, _ in found]), torch.cat([i for _, i in found])


def _nearest_of_chunk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, rows = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0).long()
    for start in range(0, len(bank), _BANK):
        similarity = queries @ bank[start : start + _BANK].T  # (q, b)
        top, at = _top(similarity, min(k, similarity.shape[1]))
        best, rows = torch.cat([best, top], 1), torch.cat([rows, at + start], 1)
        best, order = best.topk(min(k, best.shape[1]))
        rows = rows.gather(1, order)
    return best, rows


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A faster `similarity.topk(k)`: the k largest are in the k groups with the largest maxima."""
    queries, columns = similarity.shape
    size = round((columns / k) ** 0.5)  # of a group; leaves the fewest numbers to select from
    number = columns // size
    if number < 2 * k:
        return similarity.topk(k)
    # Column c is in group c % number, so that taking the maxima reads memory in order.
    grouped = similarity[:, : size * number].view(queries, size, number)
    groups = grouped.amax(1).topk(k, sorted=False).indices  # (q, k)
    candidates = grouped.gather(2, groups[:, None].expand(-1, size, -1)).flatten(1)  # (q, size * k)
    top, at = torch.cat([candidates, similarity[:, size * number :]], 1).topk(k)
    within = groups.gather(1, at % k) + at // k * number
    return top, torch.where(at < size * k, within, at + size * (number - k))


def weights(similarity: Tensor, temperature: float) -> Tensor:
    """The neighbours' shares of the vote, softmax of similarity / temperature: `(Q, k)`.

    Args:
        similarity: `(Q, k)` float32, the largest first.
        temperature: 0.07 in Wu et al. 2018, 0.1 in later work.
    """
    # The largest is subtracted, so that nothing overflows at small temperatures.
    return ((similarity - similarity[:, :1]) / temperature).softmax(1)


def vote(
    similarity: Tensor, targets: Tensor, temperature: float, k: int, classes: int = 0
) -> Tensor:
    """Average the targets of the k nearest, by their `weights`.

    Args:
        similarity: `(Q, K)` float32, the largest first.
        targets: of the same neighbours: `(Q, K)` int64 classes, or `(Q, K, C)` float32.
        temperature: of the weights.
        k: how many of the K to use.
        classes: C, where targets are classes.

    Returns:
        `(Q, C)` float32; for classes, the share of the vote of each.
    """
    shares, targets = weights(similarity[:, :k], temperature), targets[:, :k]
    if targets.ndim == 2:
        return shares.new_zeros(len(shares), classes).scatter_add_(1, targets, shares)
    return torch.einsum("qk,qkc->qc", shares, targets)


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    targets: Tensor,
    ks: tuple[int, ...] = (20, 200),
    temperatures: tuple[float, ...] = (0.07, 0.1),
    classes: int = 0,
) -> dict[tuple[int, float], Tensor]:
    """Weighted k-NN (Wu et al. 2018, section 3.4) for several k and temperatures in one search.

    Args:
        queries: `(Q, F)` float32.
        bank: `(B, F)` float32.
        targets: of the bank: `(B,)` int64 classes, or `(B, C)` float32.
        ks: numbers of neighbours; one larger than the bank takes all of it.
        temperatures: of the weights.
        classes: C, where targets are classes.

    Returns:
        For each (k, temperature) the weighted mean of the neighbours' targets, `(Q, C)`; for
        classes, the share of the vote of each.

    Raises:
        UserError: if the bank is empty or a k or temperature is not positive.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_scores(bank, bank, torch.tensor([0, 1]), ks=(1,), classes=2)[1, 0.1]
        tensor([[1., 0.],
                [0., 1.]])
    """
    if not len(bank):
        raise UserError("no labelled training images to compare with: give at least one")
    if min(ks) < 1 or min(temperatures) <= 0:
        raise UserError(f"k is {ks} and temperature {temperatures}: both must be positive")
    largest = min(max(ks), len(bank))
    similarity, rows = nearest(queries, bank, largest)
    scores: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    # In parts, so that only (512, 200, C) targets are gathered at a time.
    for s, r in zip(torch.split(similarity, _QUERIES), torch.split(rows, _QUERIES), strict=True):
        of_neighbours = targets[r]  # (q, K) or (q, K, C)
        for k, t in scores:
            scores[k, t].append(vote(s, of_neighbours, t, k, classes))
    return {setting: torch.cat(parts) for setting, parts in scores.items()}
