"""Reading bytes from files that may be on a network disk."""

import errno
import os
import time
from pathlib import Path

from barlow.errors import UserError

_AWAY = {  # not the file's fault: the network failed, or the machine ran out of resources
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
_WAITS = (0.1, 1.0, 10.0, 30.0)  # seconds to wait before each further attempt


def read_bytes(file: str | Path, start: int = 0, size: int = -1) -> bytes:
    """Read a file or a part of it, and retry while its disk is unavailable.

    Raises:
        UserError: if the disk stays unavailable.
        OSError: if the file itself cannot be read.
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
            # EIO is permanent for a bad sector; from a network disk it passes in a second or two.
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
