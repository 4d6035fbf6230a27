"""Features kept in files, found again by what they are of."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from barlow.checkpoint import write_atomically
from barlow.data import Source

log = logging.getLogger(__name__)

_BYTES = 4 * 2**30  # the least recently used features beyond this are removed
# Over a network each file is a round trip; on a disk it is quicker than handing it to a thread.
_THREADS, _TOGETHER = 16, 64


def content_of(source: Source) -> str:
    """A hash of what the images are: all bytes, or for files their names, sizes and times."""
    digest = hashlib.sha256(f"{len(source)} {source.in_chans}".encode())
    on_disk = len(source) > 0 and isinstance(source.records[0], str)
    states: Iterator[str] = states_of(source) if on_disk else repeat("")
    for i, state in zip(range(len(source)), states, strict=False):
        raw = source.records[i]
        if isinstance(raw, str):
            digest.update(os.fsencode(f"{raw} {state or state_of(raw)}\n"))
        elif isinstance(raw, bytes):
            digest.update(f"{len(raw)}\n".encode() + raw)
        else:
            digest.update(f"{raw.dtype} {raw.shape}\n".encode())
            digest.update(np.asarray(raw).tobytes())
    return digest.hexdigest()[:16]


def states_of(source: Source) -> Iterator[str]:
    """`state_of` each image in order, many asked for at a time; "" for one that is no file."""

    def states(start: int) -> list[str]:
        rows = range(start, min(start + _TOGETHER, len(source)))
        raws = (source.records[row] for row in rows)
        return [state_of(raw) if isinstance(raw, str) else "" for raw in raws]

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from chain.from_iterable(pool.map(states, range(0, len(source), _TOGETHER)))


def state_of(file: str) -> str:
    """Size and time of a file, which change with it, or that it cannot be found."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read(path: Path) -> tuple[Tensor, Tensor] | None:
    """What `keep` wrote, features and rows; None if it is not there, or damaged."""
    from safetensors.torch import load_file

    try:
        kept = load_file(path)
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(path)  # recently used
        return kept["features"], kept["rows"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("kept features in %s are damaged and made again: %s", path, error)
        return None


def keep(path: Path, x: Tensor, rows: Tensor) -> None:
    """Write features `(M, F)` and their rows `(M,)`; others make room for them."""
    from safetensors.torch import save

    try:
        write_atomically(path, lambda f: f.write(save({"features": x, "rows": rows})))
        files = sorted(path.parent.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > _BYTES and file != path:
                file.unlink(missing_ok=True)
    except OSError as error:  # a full disk must not cost the evaluation
        log.warning("features are not kept: %s", error)
