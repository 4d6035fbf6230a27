"""Which labels may be used: balanced, seeded parts of the labelled images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow.address import HELD_OUT, SUBSET, key, permutation
from barlow.errors import UserError


def labels_per_class(
    y: Tensor, k: int, seed: int = 0, names: Sequence[str] | None = None
) -> Tensor:
    """Choose k images of every class.

    A larger k with the same seed takes the same images and more, so that different k can be
    compared.

    Args:
        y: `(M,)` int64 labels.
        k: images of each class; a class without any is left out.
        seed: seed of the choice.
        names: what the classes are called in the error.

    Returns:
        Sorted int64 indices into `y`.

    Raises:
        UserError: if a class has fewer than k images.

    Example:
        >>> labels_per_class(torch.tensor([0, 1, 0, 1, 1, 0]), 1).shape
        torch.Size([2])
    """
    if k < 1:
        raise UserError(f"labels per class is {k}: it must be at least 1")
    counts = torch.bincount(y)
    present = counts.nonzero().flatten()
    fewest = int(present[counts[present].argmin()])
    if counts[fewest] < k:
        name = names[fewest] if names else fewest
        raise UserError(
            f"{k} labels per class asked for, but class {name} has only {int(counts[fewest])}: "
            f"ask for {int(counts[fewest])} or fewer"
        )
    return _of_each_class(y, [k if count else 0 for count in counts.tolist()], seed, SUBSET)


def label_fraction(y: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Choose the same share of every class, at least one image of each.

    Args:
        y: `(M,)` int64 labels.
        fraction: above 0, at most 1; the papers use 0.01 and 0.1.
        seed: seed of the choice.

    Returns:
        Sorted int64 indices into `y`.

    Raises:
        UserError: if the fraction is out of range.

    Example:
        >>> label_fraction(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), 0.5).shape
        torch.Size([4])
    """
    if not 0 < fraction <= 1:
        raise UserError(f"label fraction is {fraction}: it must be above 0 and at most 1")
    wanted = [max(1, round(fraction * n)) if n else 0 for n in torch.bincount(y).tolist()]
    return _of_each_class(y, wanted, seed, SUBSET)


def split(y: Tensor, held_out: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Divide images into two parts with the same share of every class.

    Args:
        y: `(M,)` int64 labels.
        held_out: share of the second part; a class with one image stays in the first.
        seed: seed of the division.

    Returns:
        Sorted int64 indices of the first and of the second part.
    """
    counts = torch.bincount(y).tolist()
    wanted = [min(n - 1, max(1, round(held_out * n))) if n > 1 else 0 for n in counts]
    second = _of_each_class(y, wanted, seed, HELD_OUT)
    return _others(second, len(y)), second


def folds(y: Tensor, number: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Divide images `number` times, so that each is in a second part once, classes in balance.

    Args:
        y: `(M,)` int64 labels.
        number: number of folds.
        seed: seed of the division.

    Returns:
        For each fold the sorted int64 indices of the first and of the second part.
    """
    place = torch.empty_like(y)
    offset = 0  # continues from class to class, so that the folds are equally large
    for c, of_class in enumerate(_by_class(y)):
        order = permutation(len(of_class), key(seed, HELD_OUT, c))
        place[of_class[order]] = (torch.arange(len(of_class)) + offset) % number
        offset += len(of_class)
    parts = [(place == i).nonzero().flatten() for i in range(number)]
    return [(_others(part, len(y)), part) for part in parts if len(part)]


def _of_each_class(y: Tensor, wanted: list[int], seed: int, stream: int) -> Tensor:
    chosen = []
    for c, (of_class, k) in enumerate(zip(_by_class(y), wanted, strict=True)):
        chosen.append(of_class[permutation(len(of_class), key(seed, stream, c))[:k]])
    return torch.cat(chosen).sort().values


def _by_class(y: Tensor) -> tuple[Tensor, ...]:
    """For each class the indices of its images, in order."""
    return torch.split(y.argsort(stable=True), torch.bincount(y).tolist())


def _others(indices: Tensor, number: int) -> Tensor:
    mask = torch.ones(number, dtype=torch.bool)
    mask[indices] = False
    return mask.nonzero().flatten()
