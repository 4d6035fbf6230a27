"""The cache of features: one file for an encoder and its images, found by a hash of both."""

import contextlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from barlow.atomic import write_atomically

log = logging.getLogger(__name__)

_BYTES = 4 * 2**30  # the least recently used features beyond this are removed


def load(path: Path) -> tuple[Tensor, Tensor] | None:
    """What `save` wrote, features and rows; None if it is not there, or damaged."""
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(path)  # recently used
        return found["features"], found["rows"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("cached features in %s are damaged and will be recomputed: %s", path, error)
        return None


def save(path: Path, x: Tensor, rows: Tensor) -> None:
    """Write features `(M, F)` and their rows `(M,)`; others make room for them."""
    from safetensors.torch import save as to_bytes

    try:
        write_atomically(path, lambda f: f.write(to_bytes({"features": x, "rows": rows})))
        files = sorted(path.parent.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > _BYTES and file != path:
                file.unlink(missing_ok=True)
    except OSError as error:  # a full disk must not cost the evaluation
        log.warning("could not cache the features: %s", error)
