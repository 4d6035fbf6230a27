"""Random by address: numbers that are a function of where they are used, not of what came before.

A counter-based generator (splitmix64's mixing, Steele et al. 2014) in int64 tensor arithmetic:
the same on every device, rank and worker, and at any place without the numbers before it.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_ROUNDS = 6  # of the Feistel network; four make a pseudo-random permutation, two are a margin


def key(*parts: int) -> int:
    """Mix integers such as (seed, epoch, stream) into one key.

    Args:
        *parts: any integers; their order matters.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> key(0, 1) == key(0, 1), key(0, 1) == key(1, 0)
        (True, False)
    """
    state = _GOLDEN
    for part in parts:
        state = _mix_int((state + _GOLDEN) ^ _mix_int((part + _GOLDEN) & _MASK))
    return state >> 1


def bits(key: int, position: Tensor, columns: int) -> Tensor:
    """64 random bits for each position and column.

    Args:
        key: from `key`.
        position: (N,) int64.
        columns: how many values a position gets; more of them do not change the first ones.

    Returns:
        (N, columns) int64 on the device of `position`.
    """
    column = torch.arange(1, columns + 1, device=position.device)
    row = _mix(position * _signed(_GOLDEN) + key)  # (N,)
    return _mix(row[:, None] + column * _signed(_GOLDEN))  # (N, columns)


def uniform(key: int, position: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (key, position, column).

    Args:
        key: from `key`.
        position: (N,) int64, such as the positions of a batch's samples in the epoch.
        columns: how many numbers a position gets.

    Returns:
        (N, columns) float32 on the device of `position`, multiples of 2**-24.

    Example:
        >>> whole = uniform(key(0), torch.arange(8), 3)
        >>> torch.equal(whole[5:], uniform(key(0), torch.arange(5, 8), 3))
        True
    """
    return _shift(bits(key, position, columns), 40).float() * 2.0**-24


def normal(key: int, position: Tensor, columns: int) -> Tensor:
    """Standard normal numbers, a pure function of (key, position, column).

    Args:
        key: from `key`.
        position: (N,) int64.
        columns: how many numbers a position gets.

    Returns:
        (N, columns) float32 on the device of `position`.
    """
    # Box and Muller: one hash gives a radius and an angle, and those two numbers.
    pairs = bits(key, position, (columns + 1) // 2)
    radius = (_shift(pairs, 40).float().add_(1.0).mul_(2.0**-24)).log_().mul_(-2.0).sqrt_()
    angle = (pairs & 0xFFFFFF).float().mul_(2.0**-24 * 2 * torch.pi)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :columns]


def permuted(position: Tensor, n: int, key: int) -> Tensor:
    """The elements at some places of a random order of range(n), without making all of it.

    Args:
        position: (N,) int64 in [0, n).
        n: length of the order.
        key: from `key`; another key is another order.

    Returns:
        (N,) int64 in [0, n); distinct for distinct positions.

    Example:
        >>> sorted(permuted(torch.arange(5), 5, key(0)).tolist())
        [0, 1, 2, 3, 4]
    """
    # A Feistel network permutes range(4**half); what falls outside range(n) walks on until it
    # falls inside, which keeps it a permutation of range(n).
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    value = _feistel(position, half, key)
    while bool((outside := value >= n).any()):
        value = torch.where(outside, _feistel(value, half, key), value)
    return value


def permutation(n: int, key: int) -> Tensor:
    """A random order of range(n).

    Args:
        n: how many.
        key: from `key`.

    Returns:
        (n,) int64, each of range(n) once.
    """
    return permuted(torch.arange(n), n, key)


def _feistel(value: Tensor, half: int, key: int) -> Tensor:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for turn in range(_ROUNDS):
        scrambled = _mix(right + _signed(_mix_int((key + turn * _GOLDEN) & _MASK)))
        left, right = right, left ^ (scrambled & mask)
    return (left << half) | right


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # logical: torch's shift keeps the sign


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
