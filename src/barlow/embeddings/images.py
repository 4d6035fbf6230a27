"""The images behind a file of embeddings: whether they have changed, and their thumbnails."""

from collections.abc import Iterable
from io import BytesIO
from itertools import chain

from PIL import Image

from barlow.data import Source, open_source
from barlow.data.decode import BrokenImage, Raw, decode
from barlow.data.fingerprints import file_states
from barlow.data.source import hash_of
from barlow.embeddings.table import EmbeddingTable
from barlow.errors import UserError

_SIDE = 160  # pixels of a thumbnail, at most
_SMALL = 64  # images up to this size are kept as they are


def fingerprint_of_images(images: Source) -> str:
    """A hash that identifies the images without reading them: files by their size and time."""
    return hash_of([images.fingerprint, *(file_states(images) if on_disk(images) else ())])


def on_disk(images: Source) -> bool:
    """Whether each image is a file of its own, judged by the first."""
    return isinstance(images.records[0], str)


def thumbnails(
    table: EmbeddingTable, rows: Iterable[int], images: Source | None = None
) -> dict[int, bytes]:
    """Small pictures of some rows, as PNG or JPEG files.

    Args:
        table: the embeddings; their images are looked for at the recorded places.
        rows: rows of the table.
        images: their source, if it is open already.

    Returns:
        A file for every row whose image is still there and can be read.
    """
    rows = sorted(set(rows))
    columns = table.columns(rows)
    paths = columns.get("path", [None] * len(rows))
    found: dict[int, bytes] = {}
    elsewhere: list[tuple[int, str]] = []
    for row, name, path in zip(rows, columns["id"], paths, strict=True):
        if path is None:
            elsewhere.append((row, name))
        elif picture := picture_of(path):
            found[row] = picture
    if elsewhere and (images := images or source_of(table)):
        ids, at = images.ids, 0
        for row, name in elsewhere:
            # The file keeps the source's order without unreadable images, so an image is at its row
            # number or later in the source: search from there to the end, then from the start.
            start = min(max(at, row), len(ids))
            for i in chain(range(start, len(ids)), range(start)):
                if ids[i] == name:
                    at = i
                    if picture := picture_of(images.records[i], images.in_chans):
                        found[row] = picture
                    break
    return found


def source_of(table: EmbeddingTable) -> Source | None:
    """Open the source of a file of embeddings again; None if it is gone or has changed."""
    about = table.about
    try:
        images = open_source(
            about["source"], in_chans=about["preprocess"]["in_chans"], limit=about["limit"]
        )
    except (UserError, KeyError):
        return None
    return images if fingerprint_of_images(images) == about["images"] else None


def picture_of(raw: Raw, in_chans: int = 3) -> bytes | None:
    """A small picture of one image, as a PNG or JPEG file; None if it cannot be read."""
    try:
        pixels = decode(raw, in_chans)
    except BrokenImage:
        return None
    if in_chans not in (1, 3):
        pixels = pixels[:1]
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    file = BytesIO()
    if max(image.size) <= _SMALL:
        image.save(file, "PNG")
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(file, "JPEG", quality=80)
    return file.getvalue()
