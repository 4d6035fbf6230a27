"""The table that recognises a source from one string."""

import difflib
from collections.abc import Callable
from pathlib import Path

from barlow.data.builtin import open_mnist5k
from barlow.data.folder import open_folder
from barlow.data.source import MAX_BROKEN, Source, Table
from barlow.data.splits import Choose, NoSuchSplit, chooser
from barlow.data.tables import open_parquet
from barlow.errors import UserError

NAMED: dict[str, Callable[[Choose], Table]] = {"mnist5k": open_mnist5k}


def open_source(
    source: str,
    split: str | None = None,
    *,
    in_chans: int = 3,
    limit: int | None = None,
    max_broken: float = MAX_BROKEN,
) -> Source:
    """Open images wherever they are.

    Args:
        source: a name ("mnist5k", "cifar10"), a folder, Parquet files; `::split` at its end picks
            one split.
        split: "train" or "test" (else the validation split), everything if the source has no
            splits; None is everything.
        in_chans: channels every image is brought to.
        limit: only the first so many images.
        max_broken: largest share of images that may turn out to be broken.

    Returns:
        The source; its images are read when asked for.

    Raises:
        UserError: if there is no such source, no such split, or no image in it.

    Example:
        >>> digits = open_source("mnist5k", "test", in_chans=1)
        >>> len(digits), digits[0].shape
        (1000, torch.Size([1, 28, 28]))
    """
    name, _, explicit = source.partition("::")
    choose = chooser(name, explicit or split, explicit=bool(explicit))
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    return Source(source, _open(name, choose), in_chans, limit, max_broken)


def open_held_out(
    source: str, *, in_chans: int = 3, limit: int | None = None, max_broken: float = MAX_BROKEN
) -> Source | None:
    """The validation or test split, or None if the source has neither.

    Example:
        >>> open_held_out("mnist5k")
        Source('mnist5k', 1000 images)
    """
    name, _, explicit = source.partition("::")
    if explicit:  # who picks a split by hand gets this split and no other
        return None
    try:
        table = _open(name, chooser(name, "held_out", explicit=False))
    except NoSuchSplit:
        return None
    return Source(source, table, in_chans, limit, max_broken)


def _open(name: str, choose: Choose) -> Table:
    if name in NAMED:
        return NAMED[name](choose)
    path = Path(name).expanduser()
    if path.is_dir():
        opener = open_parquet if any(path.rglob("*.parquet")) else open_folder
        return opener(path, choose)
    if path.is_file():
        if path.suffix == ".parquet":
            return open_parquet(path, choose)
        raise UserError(f"{name} is a file of no known kind: expected .parquet")
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    if any(sign in name for sign in "/\\.~"):
        parent = Path(name).expanduser().parent
        while not parent.exists():
            parent = parent.parent
        return f"{name} does not exist; {parent} does"
    near = difflib.get_close_matches(name, NAMED, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(NAMED)}"
    return f"no source {name!r}: there is no such file or folder, and {hint}"
