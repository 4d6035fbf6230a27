"""A lock that lets only one training at a time write to the folder of a run."""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from barlow.errors import UserError
from barlow.ranks import all_gather

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

NAME = ".lock"
_GRACE = 5.0  # seconds to wait for processes that outlive a killed parent or a restart by torchrun


@contextmanager
def exclusive(fabric: "Fabric", folder: Path) -> Iterator[None]:
    """Within it, no other training writes to the folder; the first rank holds the lock for all.

    The operating system releases the lock when the process ends, however that happens, so a killed
    process leaves no lock behind. On Windows, and on file systems without such locks, training goes
    on without one.

    Args:
        fabric: of this process.
        folder: of the run; created if it does not exist.

    Raises:
        UserError: on every rank, if another process holds the lock and does not end, or the folder
            cannot be written.
    """
    lock, refused = None, list[str]()
    if fabric.is_global_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take(folder / NAME)
        except BlockingIOError:
            holder = (folder / NAME).read_text() or "another process"
            refused = [
                f"{holder} is already training in --out {folder}: wait for it to end, or use "
                "another folder"
            ]
        except OSError as error:
            refused = [
                f"cannot write to --out {folder} ({error}): free up space, or use another folder"
            ]
    try:
        for what in all_gather(fabric, refused):
            raise UserError(what)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _take(file: Path) -> int:
    """Open and lock the file, and write into it which process holds it; returns the descriptor."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    if sys.platform == "win32":
        return opened
    last = time.monotonic() + _GRACE
    while True:
        try:
            # Not flock: the loader's worker processes would inherit that lock and keep it.
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            if time.monotonic() > last:
                os.close(opened)
                raise BlockingIOError from error
            time.sleep(0.1)
        except OSError as error:
            log.warning("cannot lock %s (%s): do not start a second training there", file, error)
            return opened
    with suppress(OSError):  # the disk may be full
        os.ftruncate(opened, 0)
        os.write(opened, f"process {os.getpid()} on host {socket.gethostname()}".encode())
    return opened
