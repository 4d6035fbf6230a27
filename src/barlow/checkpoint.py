"""Checkpoints: saved atomically, loaded without executing anything in them."""

import logging
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from barlow.atomic import write_atomically
from barlow.errors import UserError, one_line

log = logging.getLogger(__name__)

# What reading a file that is not a checkpoint may raise, besides an UnpicklingError.
_UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically; every record in the file has a checksum.

    Args:
        path: for example `RUN/checkpoints/epoch-0040.ckpt`.
        state: dictionaries, lists, numbers, strings and tensors.
    """
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:
        # On a full disk, torch.save also fails to close its archive, which hides the first error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint at `path`, and keep the one that was there beside it until the next time.

    If the disk damages a file, this loses one checkpoint, not the run.
    """
    new = _new(path)
    save_checkpoint(new, state)
    if path.exists():
        os.replace(path, previous(path))
    os.replace(new, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing anything in it.

    Raises:
        UserError: if the file is damaged, is not a checkpoint, or holds more than tensors and plain
            values.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = f"code ({named[1]})" if named else "code"
        raise UserError(
            f"refusing to load {path}: it is damaged, or holds more than tensors and plain values "
            f"and would execute {code} if loaded; nothing was executed"
        ) from error
    except UserError:
        raise
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {one_line(error, 200)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def load_last(path: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint at `path` or beside it; None if none was ever written.

    Raises:
        UserError: if there are files but none is intact.
    """
    # The new file is still there if the process was killed before moving it to `path`.
    places = (_new(path), path, previous(path))
    candidates = [place for place in places if place.exists()]
    for candidate in candidates:
        try:
            return load_checkpoint(candidate)
        except UserError as error:
            log.warning("%s; trying the previous checkpoint", error)
    if candidates:
        raise UserError(
            f"no intact checkpoint in {path.parent}: start again in a new folder, "
            "or from a kept checkpoint with --init"
        )
    return None


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def _new(path: Path) -> Path:
    return path.with_name(f"{path.stem}-new{path.suffix}")
