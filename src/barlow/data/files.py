"""Bytes from files that may be far away."""

import errno
import os
import time
from pathlib import Path

from barlow.errors import UserError

_AWAY = {  # no fault of a file's: of the network behind it, or of a machine that has run short
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
_WAITS = (0.1, 1.0, 10.0, 30.0)  # seconds before a file is tried again


def read_bytes(file: str | Path, start: int = 0, size: int = -1) -> bytes:
    """A file or a piece of it, tried again while its disk is away.

    Raises:
        UserError: if the disk stays away.
        OSError: if it is the file that cannot be read.
    """
    tried = 0
    while True:
        try:
            with open(file, "rb") as opened:
                opened.seek(start)
                return opened.read(size)
        except OSError as error:
            away = error.errno in _AWAY
            if not away and error.errno != errno.EIO:
                raise
            # A bad sector stays bad; over a network, EIO passes in a second or two.
            waits = _WAITS if away else _WAITS[:2]
            if tried < len(waits):
                time.sleep(waits[tried])
                tried += 1
            elif away:
                name = os.fsencode(file).decode(errors="backslashreplace")
                raise UserError(
                    f"cannot read {name} ({error.strerror}) after {len(_WAITS) + 1} attempts: "
                    "run the same command again once it is readable"
                ) from None
            else:
                raise
