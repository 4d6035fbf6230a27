"""Files that are whole or not there: checkpoints and everything else that a run writes."""

import contextlib
import errno
import logging
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from barlow.errors import UserError, one_line

log = logging.getLogger(__name__)

UNFINISHED = ".*.part"
"""Names of files that were being written."""

# What reading bytes that are no checkpoint ends in, besides an UnpicklingError.
_UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, flush it to disk, and rename it into place.

    Args:
        path: where the file is to be.
        write: called with the open binary file.

    Raises:
        OSError: if the disk is full or the folder not writable; what was at `path` is untouched.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left when its process was killed."""
    for part in folder.glob(UNFINISHED):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically; every record in the file has a checksum.

    Args:
        path: for example `RUN/checkpoints/epoch-0040.ckpt`.
        state: dictionaries, lists, numbers, strings and tensors.
    """
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:
        # torch.save cannot close its archive on a full disk, and hides why.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(path: Path, state: dict[str, Any]) -> None:
    """`save_checkpoint`, and what was at `path` stays beside it until the next time.

    A file that the disk damages costs one checkpoint, not the run.
    """
    new = _new(path)
    save_checkpoint(new, state)
    if path.exists():
        os.replace(path, previous(path))
    os.replace(new, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing anything in it.

    Raises:
        UserError: if the file is damaged, holds more than tensors and plain values, or is none.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = f"code ({named[1]})" if named else "code"
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values and "
            f"would have to execute {code} to load; none was executed"
        ) from error
    except UserError:
        raise
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {one_line(error, 200)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def load_last(path: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint at `path` or beside it; None if none was ever written.

    Raises:
        UserError: if there are files but none is whole.
    """
    # The new one is there if a kill came before it took its place.
    places = (_new(path), path, previous(path))
    candidates = [place for place in places if place.exists()]
    for candidate in candidates:
        try:
            return load_checkpoint(candidate)
        except UserError as error:
            log.warning("%s; looking for the one before", error)
    if candidates:
        raise UserError(
            f"no whole checkpoint in {path.parent}: start again in a new folder, "
            "or from a kept checkpoint with --init"
        )
    return None


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def _new(path: Path) -> Path:
    return path.with_name(f"{path.stem}-new{path.suffix}")
