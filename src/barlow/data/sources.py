"""Opening a source, whose kind is recognised from one string."""

import difflib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

from barlow.data.decode import BrokenImage, max_16bit_value
from barlow.data.folder import entries_of, open_folder, some_of, walk
from barlow.data.hub import PREFIX, open_hub
from barlow.data.lists import metadata_files, open_metadata, open_text
from barlow.data.mnist5k import open_mnist5k
from barlow.data.parquet import holds_images, open_parquet
from barlow.data.shards import open_shards
from barlow.data.source import MAX_BROKEN, Source, Table, spread
from barlow.data.splits import NAMES, NoSuchSplit, SplitChooser, split_chooser
from barlow.data.torchvision_sets import TORCHVISION_SETS, open_torchvision
from barlow.errors import UserError

log = logging.getLogger(__name__)

_LOOKED_AT = 8  # images of a 16-bit source that are checked for being dark
_DARK = 65536 // 4
_warned = set[str]()  # sources; a command opens one again for its test images, trackers and page

NAMED: dict[str, Callable[[SplitChooser], Table]] = {
    "mnist5k": open_mnist5k,
    **{name: partial(open_torchvision, name) for name in TORCHVISION_SETS},
}
FILES: dict[str, Callable[[Path, SplitChooser], Table]] = {
    ".parquet": open_parquet,
    ".tar": open_shards,
    ".txt": open_text,
}


def open_source(
    source: str,
    split: str | None = None,
    *,
    in_chans: int = 3,
    limit: int | None = None,
    max_broken: float = MAX_BROKEN,
) -> Source:
    """Open a source of images.

    Args:
        source: a name ("mnist5k", "cifar10"), a folder of images, Parquet files or tar shards, a
            single such file, a .txt list of paths, or hf://owner/name. `::split` at the end picks
            one split.
        split: "train", "test" (else the validation split) or another name; None reads everything,
            as does a source without splits. A split in `source` takes precedence.
        in_chans: number of channels that every image is converted to.
        limit: use only the first `limit` images.
        max_broken: largest share of images that may turn out to be broken.

    Returns:
        The source; its images are read on access.

    Raises:
        UserError: if there is no such source or split, or no image in it.

    Example:
        >>> digits = open_source("mnist5k", "test", in_chans=1)
        >>> len(digits), digits[0].shape
        (1000, torch.Size([1, 28, 28]))
    """
    name, explicit = _parse(source)
    choose = split_chooser(name, explicit or split, explicit=bool(explicit))
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    images = Source(source, _open(name, choose), in_chans, limit, max_broken)
    _warn_if_dark(images)
    return images


def open_held_out(source: str, *, in_chans: int = 3) -> Source | None:
    """Open the validation split, else the test split.

    None if the source has neither, if it names a split itself (`::split`), or if it has a single
    split, which is for training whatever its name.

    Example:
        >>> open_held_out("mnist5k")
        Source('mnist5k', 1000 images)
    """
    name, explicit = _parse(source)
    if explicit:  # a user who names a split gets that split and no other
        return None
    try:
        table = _open(name, split_chooser(name, "held_out", explicit=False))
    except NoSuchSplit:
        return None
    return Source(source, table, in_chans)


def _warn_if_dark(images: Source) -> None:
    """Warn once if 16-bit images use little of their range; any other image ends the check."""
    if images.is_remote or images.name in _warned:
        return
    most = 0
    for row in spread(len(images), _LOOKED_AT):
        with suppress(BrokenImage):
            value = max_16bit_value(images.records[row], images.in_chans)
            if value is None or value >= _DARK:
                return
            most = max(most, value)
    if most:
        _warned.add(images.name)
        log.warning(
            "%s: its brightest 16-bit value seen is %d of 65535, so its images are read as "
            "near-black; rescale them beforehand (docs/data.md)",
            images.name,
            most,
        )


def _parse(source: str) -> tuple[str, str]:
    """The source without its split, and the split ("" if none is named)."""
    name, _, split = source.partition("::")
    if name.startswith(PREFIX) and not split:  # hf://owner/name:split, as the hub writes it
        head, _, split = name.removeprefix(PREFIX).partition(":")
        name = PREFIX + head
    return name, split


def _open(name: str, choose: SplitChooser) -> Table:
    if name in NAMED:
        return NAMED[name](choose)
    if name.startswith(PREFIX):
        return open_hub(name.removeprefix(PREFIX), choose)
    path = Path(name).expanduser()
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{name} cannot be read: permission denied")
        return _opener(path)(path, choose)
    if path.is_file():
        if path.suffix.lower() in FILES:
            return FILES[path.suffix.lower()](path, choose)
        raise UserError(f"{name} has an unsupported file type: expected {', '.join(FILES)}")
    raise UserError(_unknown(name))


def _opener(folder: Path) -> Callable[[Path, SplitChooser], Table]:
    """The opener for what a folder holds: Parquet with images, shards, listed images, or images."""
    for place in [folder, *(folder / name for name in sorted({"data", *NAMES}))]:
        if not place.is_dir():
            continue
        names = sorted(entry.name for entry in entries_of(place))
        if any(holds_images(place / name) for name in names if name.endswith(".parquet")):
            return open_parquet
        tars = [name for name in names if name.endswith(".tar")]
        if tars and not _outnumbered(folder, tars):
            return open_shards
    return open_metadata if metadata_files(folder) else open_folder


def _outnumbered(folder: Path, tars: list[str]) -> bool:
    """Whether a folder has more images than tar files; the tar files are then not shards."""
    images = (name for name, is_image in walk(folder) if is_image)
    some = list(islice(images, len(tars) + 1))
    more = len(some) > len(tars)
    if some:
        read, left_out = ("images", tars) if more else ("tar files", some)
        log.warning("%s: its %s are read; left out: %s", folder, read, some_of(left_out))
    return more


def _unknown(name: str) -> str:
    if any(sign in name for sign in "/\\.~"):
        parent = Path(name).expanduser().parent
        while not parent.exists():
            parent = parent.parent
        return f"{name} does not exist; {parent} does"
    near = difflib.get_close_matches(name, NAMED, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(NAMED)}"
    return f"unknown source {name!r}: no such file or folder; {hint}"
