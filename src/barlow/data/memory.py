"""Images that fit in memory: decoded once, kept as one uint8 tensor."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from barlow.data.decode import BrokenImage, Raw, decode
from barlow.data.source import Records, Source

# The most images that are decoded before the first batch: at 0.13 ms for a small PNG on one core,
# they take 40 seconds. Larger sources are streamed, which starts at once and gives the same views.
MOST = 300_000
# Files with a container's memory limit, in versions 2 and 1 of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def default_budget(world_size: int = 1) -> int:
    """A quarter of this machine's or container's memory, in bytes, shared among the ranks."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # no such file; "max" means no limit
            sizes.append(int(Path(file).read_text()))
    return min(sizes) // 4 // world_size


def load_if_fits(source: Source, budget: int, view_size: int) -> tuple[Tensor, Tensor] | None:
    """Decode every image, if all have the same size and fit in memory.

    More than `MOST` images are streamed, because decoding them would delay the first batch. JPEGs
    at least twice as large as the views are always streamed too, because streaming decodes them at
    a reduced size where a crop allows it. So whether images fit affects the speed but no pixel.

    Args:
        source: the images.
        budget: bytes that they may take.
        view_size: side of the views.

    Returns:
        The images, uint8 (N, C, H, W), and for each the row to use, (N,): its own, or that of the
        next good image if it is broken. None if they do not fit or differ in size.
    """
    if len(source) > MOST or source.is_remote:
        return None
    shape = _common_shape(source, 2 * view_size)
    if shape is None or len(source) * shape.numel() > budget:
        return None
    if isinstance(source.records, np.ndarray) and source.records.ndim == 3:  # (N, H, W), grey
        images = torch.from_numpy(source.records[: len(source)])[:, None]
        return images.expand(-1, source.in_chans, -1, -1), torch.arange(len(source))
    images = torch.empty((len(source), *shape), dtype=torch.uint8)
    good = torch.ones(len(source), dtype=torch.bool)
    for i, image in enumerate(_decoded(source, threads=_threads(shape))):
        if isinstance(image, BrokenImage):
            source.skip(i, str(image))
            good[i] = False
        elif image.shape != shape:
            return None
        else:
            images[i] = image
    return images, next_good(good)


def in_memory(source: Source, images: Tensor) -> Source:
    """The same source, with its images taken from a tensor (N, C, H, W) instead of its files."""
    source = copy(source)
    source.records = images
    return source


def _decoded(source: Source, threads: int) -> Iterator[Tensor | BrokenImage]:
    def read(raw: Raw) -> Tensor | BrokenImage:
        try:
            return decode(raw, source.in_chans)
        except BrokenImage as error:
            return error

    raws = islice(_all(source.records), len(source))
    if threads == 1:
        yield from map(read, raws)
        return
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(raws, 64 * threads)):
            yield from pool.map(read, some)


def _all(records: Records) -> Iterator[Raw]:
    return iter(records) if isinstance(records, Iterable) else map(records.__getitem__, count())


def _threads(shape: torch.Size) -> int:
    """Number of decoding threads; one for small images, as only decoders release Python's lock."""
    return 1 if shape.numel() <= 3 * 64 * 64 else min(8, os.cpu_count() or 1)


def next_good(good: Tensor) -> Tensor:
    """For each row, the row itself if it is good, else the next good row, wrapping at the end.

    Example:
        >>> next_good(torch.tensor([True, False, False, True, False]))
        tensor([0, 3, 3, 3, 0])
    """
    rows = good.nonzero()[:, 0]
    after = torch.searchsorted(rows, torch.arange(len(good)))
    return rows[after % len(rows)]


def _common_shape(source: Source, reduced_from: int, tries: int = 32) -> torch.Size | None:
    """The shape of images spread over the source; None if it differs or one can be reduced."""
    shape = None
    for i in np.unique(np.linspace(0, len(source) - 1, tries).round().astype(int)):
        try:
            picture = source.open(int(i))
            if picture.reducible and min(picture.size) >= reduced_from:
                return None
            pixels = picture.decode()
        except BrokenImage:
            continue
        if shape is not None and pixels.shape != shape:
            return None
        shape = pixels.shape
    return shape
