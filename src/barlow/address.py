"""Random numbers by address: a pure function of where a sample stands, never of what ran before.

A stateful generator makes a sample's augmentation depend on every draw before it, so that resuming
a run or changing the number of workers or ranks would change the training. Here a number is
the hash of (key, position, column): a counter-based generator in the manner of splitmix64
(Steele, Lea and Flood 2014), computed in wrapping int64 arithmetic so that every device agrees
bit for bit.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive counters land far apart
_ROW = 0xD1342543DE82EF95  # a second odd multiplier: rows and columns lie on different lattices
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB

# Streams: the second part of a key, `key(seed, STREAM, ...)`, for draws outside the training loop.
# Changing a number changes the random numbers drawn with it, and so the results.
SUBSET = 101  # the training images of each class that an evaluation uses, if not all of them
HELD_OUT = 102  # the images of each class that are held out, to choose by or to test on
SGD_ORDER = 103  # order of the features in an epoch of SGD
SGD_SWEEP_ORDER = 104  # the same while several learning rates are compared
FINETUNE_ORDER = 105  # order of the images in an epoch of fine-tuning
FINETUNE_VIEWS = 106  # their crops and flips
FINETUNE_LAYERS = 107  # dropout and other randomness inside the encoder
AUGMENTED_ORDER = 108  # order of the images in an epoch of SGD on augmented images
AUGMENTED_VIEWS = 109  # their crops and flips
TEST_SPLIT = 110  # the test images, if a source of tags or numbers has no test split
HEALTH_VIEWS = 105  # views of an image that should be encoded alike
MATRIX_VIEWS = 106  # views for the cross-correlation matrix of a run
SPREAD = 107  # rows spread over a source; used as a key by itself, without a seed
REPORT_VIEWS = 108  # views shown on a run's page
# Some keys coincide: those of HEALTH_VIEWS and FINETUNE_ORDER, and of REPORT_VIEWS and
# AUGMENTED_ORDER. The keys of MATRIX_VIEWS and FINETUNE_VIEWS have different lengths, so they
# differ; so do those of SPREAD and FINETUNE_LAYERS. The training loop has no streams: (seed, epoch)
# orders an epoch, (seed, epoch, 1) draws its views and (seed, step, rank) seeds dropout. So an
# epoch's views share a key with the dropout of rank 1 at the step of the same number, and epochs
# and steps 101 to 110 share keys with streams. This does no harm, because the same numbers then
# serve different purposes, such as the order of images and their crops, or a training and an
# evaluation after it.


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, because torch accepts no larger scalars."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _mix(value: Tensor) -> Tensor:
    """Mix int64s in place; `>>` on int64 copies the sign bit, so a mask makes the shift logical."""
    value ^= (value >> 30) & ((1 << 34) - 1)
    value *= _signed(_MIX1)
    value ^= (value >> 27) & ((1 << 37) - 1)
    value *= _signed(_MIX2)
    value ^= (value >> 31) & ((1 << 33) - 1)
    return value


def key(*parts: int) -> int:
    """Mix integers, such as a seed, an epoch and a stream's number, into one key.

    Args:
        parts: any integers; their order matters.

    Returns:
        A non-negative integer below 2**63, which `torch.manual_seed` accepts too.

    Example:
        >>> key(0, 1) == key(0, 1), key(0, 1) == key(1, 0)
        (True, False)
    """
    state = len(parts)
    for part in parts:
        state = _mix_int((state * _ROW + part + _GOLDEN) & _MASK)
    return state >> 1


def bits(key: int, position: Tensor, columns: int) -> Tensor:
    """64 random bits for every (position, column), as int64.

    Args:
        key: from `key`.
        position: `(N,)` int64, where each sample stands, for example in the global batch.
        columns: how many numbers each sample needs.

    Returns:
        `(N, columns)` int64 on the device of `position`.

    Example:
        >>> bits(7, torch.tensor([3]), 2).shape
        torch.Size([1, 2])
    """
    row = _mix(position * _signed(_ROW) + _signed(_mix_int((key + _GOLDEN) & _MASK)))  # (N,)
    column = torch.arange(1, columns + 1, device=position.device) * _signed(_GOLDEN)
    return _mix(row[:, None] + column)  # (N, columns)


def uniform(key: int, position: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (key, position, column).

    The same on every device, rank and worker. A column's number does not change when more
    columns are asked for.

    Args:
        key: from `key`.
        position: `(N,)` int64, where each sample stands, for example in the global batch.
        columns: how many numbers each sample needs.

    Returns:
        `(N, columns)` float32 on the device of `position`.

    Example:
        >>> alone = uniform(7, torch.tensor([3]), 4)
        >>> torch.equal(alone, uniform(7, torch.tensor([1, 2, 3]), 4)[2:])
        True
    """
    high = (bits(key, position, columns) >> 40) & ((1 << 24) - 1)  # all a float32 holds exactly
    return high.to(torch.float32) * 2.0**-24


def permutation(n: int, key: int) -> Tensor:
    """The order of `n` samples under `key`.

    Args:
        n: how many samples.
        key: from `key`, usually of (seed, epoch).

    Returns:
        `(n,)` int64 on the CPU: every number below `n` once.

    Example:
        >>> permutation(5, key(0, 0)).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(key))


def block_permutation(starts: np.ndarray[Any, Any], n: int, together: int, key: int) -> Tensor:
    """An order that reads blocks of neighbouring samples a few at a time.

    Args:
        starts: where each block begins, and where the last one ends.
        n: how many samples to order, counted from the first.
        together: number of blocks whose samples are shuffled among each other.
        key: from `key`, usually of (seed, epoch).

    Returns:
        `(n,)` int64 on the CPU: every number below `n` once.

    Example:
        >>> order = block_permutation(np.array([0, 2, 4, 6, 8]), 8, 2, key=0)
        >>> order.sort().values.tolist(), len({int(i) // 2 for i in order[:4]})
        ([0, 1, 2, 3, 4, 5, 6, 7], 2)
    """
    blocks = int(np.searchsorted(starts, n))
    order = permutation(blocks, key).tolist()
    parts: list[Tensor] = []
    for first in range(0, blocks, together):
        window = order[first : first + together]
        rows = torch.cat([torch.arange(starts[i], min(starts[i + 1], n)) for i in window])
        parts.append(rows[permutation(len(rows), _mix_int(key + first + 1) >> 1)])
    return torch.cat(parts)
