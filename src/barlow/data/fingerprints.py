"""Hashes of what images are: files by name, size and time, images in memory by their bytes."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import numpy as np

from barlow.data.source import Source

# Over a network each file is a round trip; on a disk it is quicker than handing it to a thread.
_THREADS, _TOGETHER = 16, 64


def content_hash(source: Source) -> str:
    """A hash of what the images are: all bytes, or for files their names, sizes and times."""
    digest = hashlib.sha256(f"{len(source)} {source.in_chans}".encode())
    on_disk = len(source) > 0 and isinstance(source.records[0], str)
    states: Iterator[str] = file_states(source) if on_disk else repeat("")
    for i, state in zip(range(len(source)), states, strict=False):
        raw = source.records[i]
        if isinstance(raw, str):
            digest.update(os.fsencode(f"{raw} {state or file_state(raw)}\n"))
        elif isinstance(raw, bytes):
            digest.update(f"{len(raw)}\n".encode() + raw)
        else:
            digest.update(f"{raw.dtype} {raw.shape}\n".encode())
            digest.update(np.asarray(raw).tobytes())
    return digest.hexdigest()[:16]


def file_states(source: Source) -> Iterator[str]:
    """`file_state` of each image in order, many asked for at a time; "" for one that is no file."""

    def states(start: int) -> list[str]:
        rows = range(start, min(start + _TOGETHER, len(source)))
        raws = (source.records[row] for row in rows)
        return [file_state(raw) if isinstance(raw, str) else "" for raw in raws]

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from chain.from_iterable(pool.map(states, range(0, len(source), _TOGETHER)))


def file_state(file: str) -> str:
    """Size and time of a file, which change with it, or that it cannot be found."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"
