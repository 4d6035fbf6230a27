"""The cache of features: one file per encoder and set of images, named by a hash of both."""

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
    """Read what `save` wrote, features and rows; None if it is missing or damaged."""
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        with contextlib.suppress(OSError):  # the file may be another user's
            os.utime(path)  # mark it as recently used
        return found["features"], found["rows"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("cached features in %s are damaged and will be recomputed: %s", path, error)
        return None


def save(path: Path, x: Tensor, rows: Tensor) -> None:
    """Write features `(M, F)` and their rows `(M,)`; remove others if the cache is too large."""
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
