"""Hashes of a source's images: of the names, sizes and times of files, of the bytes of others."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import numpy as np

from barlow.data.source import Source

# On a network disk every `stat` is a round trip, so many threads share them. On a local disk it
# takes less time than handing a file to a thread, so each thread gets many files at a time.
_THREADS, _TOGETHER = 16, 64


def content_hash(source: Source) -> str:
    """A hash of the images: of all their bytes or, for files, of their names, sizes and times."""
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
    """`file_state` of each image in order, read in parallel; "" for an image that is not a file."""

    def states(start: int) -> list[str]:
        rows = range(start, min(start + _TOGETHER, len(source)))
        raws = (source.records[row] for row in rows)
        return [file_state(raw) if isinstance(raw, str) else "" for raw in raws]

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from chain.from_iterable(pool.map(states, range(0, len(source), _TOGETHER)))


def file_state(file: str) -> str:
    """A file's size and modification time, which change with its content, or "missing"."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # ValueError: no file can have this name
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"
