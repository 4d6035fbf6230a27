"""Images that do not fit in memory: workers decode each image once and cut both crops from it."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow.data.decode import BrokenImage, Picture
from barlow.data.source import Source
from barlow.errors import UserError
from barlow.signals import SIGNALS
from barlow.views import TwoViews, geometry

_MAX_TRIES = 100  # broken images in a row after which no further replacement is tried
_AT_ONCE = 32  # files that are open at a time, so that their boxes are drawn together

Address = tuple[Tensor, Tensor]  # rows of the source and positions in the epoch, both (n,)


@dataclass(frozen=True)
class Crops:
    """What a worker sends back for one batch."""

    view1: Tensor  # (n, C, S, S), uint8 or float 0 to 1, as `views.crop` returns them
    view2: Tensor
    position: Tensor  # (n,)
    broken: list[tuple[int, str]] = field(default_factory=list)  # (row, reason)


def stream(
    source: Source, views: TwoViews, addresses: Iterable[Address], key: int, workers: int
) -> Iterator[Crops]:
    """Yield the crops of one batch after another, cut by worker processes.

    Args:
        source: the images.
        views: determines the crops.
        addresses: for each batch, its rows and their positions in the epoch.
        key: the key of the epoch's views.
        workers: number of processes; 0 does the work in the calling process.
    """
    # fork: a worker starts in milliseconds and shares the list of files. torch's and Python's
    # defaults on Linux have moved to forkserver, which starts by importing torch again.
    fork = workers > 0 and sys.platform == "linux"
    with warnings.catch_warnings():
        # Python 3.12 warns that fork may deadlock in a process with threads; the workers run none
        # of the threads that the parent had.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        # If there are more workers than cores, the user asked for them.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(
            DataLoader(
                _Batches(source, views, key),
                sampler=addresses,
                batch_size=None,
                num_workers=workers,
                multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
                worker_init_fn=partial(_ignore_signals, _ending()),
            )
        )
    for crops in batches:
        if isinstance(crops, UserError):
            raise crops
        yield crops


@cache
def _ending() -> Any:
    """A byte in memory shared with the workers: 1 once the process that started them is exiting."""
    byte = multiprocessing.RawValue("b", 0)
    # Runs before multiprocessing sends SIGTERM to the remaining workers and waits for them.
    Finalize(None, setattr, (byte, "value", 1), exitpriority=0)
    return byte


def _ignore_signals(ending: Any, worker: int) -> None:
    """Ignore signals to the process group: the main process handles them and ends its workers."""

    def heard(*_: object) -> None:
        if ending.value:
            os._exit(0)

    for name in SIGNALS:
        signal.signal(getattr(signal, name), heard)


class _Batches(Dataset[Crops | UserError]):
    """A data set whose items are whole batches, asked for by rows and positions."""

    def __init__(self, source: Source, views: TwoViews, key: int) -> None:
        """See `stream`."""
        self.source, self.key = source, key
        # Not the views themselves: their buffers may be on a device, and a spawned worker could not
        # receive those.
        self.size, self.settings = views.image_size, views.settings

    def __getitem__(self, address: Address) -> Crops | UserError:
        """One batch, or the UserError, returned because torch would wrap one raised in a worker."""
        try:
            return self._batch(*address)
        except UserError as error:
            return error

    def _batch(self, rows: Tensor, position: Tensor) -> Crops:
        broken: list[tuple[int, str]] = []
        parts = [
            self._cut(rows[i : i + _AT_ONCE].tolist(), position[i : i + _AT_ONCE], broken)
            for i in range(0, len(rows), _AT_ONCE)
        ]
        view1, view2 = (torch.cat(_alike(crops)) for crops in zip(*parts, strict=True))
        return Crops(view1, view2, position, broken)

    def _cut(
        self, rows: list[int], position: Tensor, broken: list[tuple[int, str]]
    ) -> tuple[Tensor, Tensor]:
        opened = [self._open(row, broken) for row in rows]
        sizes = torch.tensor([picture.size for _, picture in opened])  # (n, 2)
        view_boxes = geometry.view_boxes(self.settings, self.key, position, sizes)
        boxes = torch.stack(view_boxes, 1)  # (n, 2, 6)
        crops: list[tuple[Tensor, Tensor]] = []
        for (row, picture), box, place in zip(opened, boxes, position, strict=True):
            try:
                crops.append(cut(picture, box, self.size))
            except BrokenImage as error:  # the header could be read, but not the pixels
                broken.append((row, str(error)))
                self._check(row, broken)
                next_row = (row + 1) % len(self.source)
                crops.append(self._cut([next_row], place[None], broken))
        view1, view2 = (torch.cat(_alike(view)) for view in zip(*crops, strict=True))
        return view1, view2

    def _open(self, row: int, broken: list[tuple[int, str]]) -> tuple[int, Picture]:
        """Open an image, or the next good one in the source's order so that the batch is full."""
        while True:
            try:
                return row, self.source.open(row)
            except BrokenImage as error:
                broken.append((row, str(error)))
                self._check(row, broken)
                row = (row + 1) % len(self.source)

    def _check(self, row: int, broken: list[tuple[int, str]]) -> None:
        """Give up after too many broken images in a row."""
        run = min(_MAX_TRIES, len(self.source))
        if len(broken) >= run and broken[-run][0] == (row - run + 1) % len(self.source):
            raise UserError(
                f"{self.source.name}: {run} images in a row are broken, the last is "
                f"{self.source.ids[row]} ({broken[-1][1]})"
            )


def cut(picture: Picture, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Decode an image no larger than its crops need, and cut them.

    Args:
        picture: the opened image.
        boxes: (2, 6), one for each view, from `geometry.view_boxes`.
        size: side of the crops.

    Returns:
        Two crops, each (1, C, size, size), as `TwoViews.crop` returns them.
    """
    reduction = reduction_for(boxes, size) if picture.reducible else 1
    pixels = picture.decode(reduction)
    if reduction > 1:
        boxes = _shrink(boxes, picture.size, pixels.shape)
    view1, view2 = geometry.crop(pixels[None], list(boxes[:, None]), size)
    return view1, view2


def reduction_for(boxes: Tensor, size: int) -> int:
    """The factor by which a JPEG can be decoded smaller so that no crop has to be magnified for it.

    A JPEG's blocks of 8 x 8 can be decoded to 4 x 4, 2 x 2 or 1 x 1, at a lower cost than in full.
    """
    spare = int(boxes[:, 2:4].min()) // size
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(spare, 1))


def _shrink(boxes: Tensor, size: tuple[int, int], shape: torch.Size) -> Tensor:
    """Convert boxes to the pixels of an image that was decoded smaller."""
    height, width = shape[1:]
    down, right = height / size[0], width / size[1]
    scale = torch.tensor([down, right, down, right], dtype=torch.float64)
    corners = (boxes[:, :4] * scale).round().long()
    # Rounding may push an edge over the border by a pixel.
    limit = torch.tensor([height, width])
    corners[:, 2:] = torch.minimum(corners[:, 2:], limit - corners[:, :2])
    return torch.cat([corners, boxes[:, 4:]], 1)


def _alike(crops: Sequence[Tensor]) -> list[Tensor]:
    """Make all crops floats if some are: those of small images are floats, others are uint8."""
    if len({crop.dtype for crop in crops}) == 1:
        return list(crops)
    return [crop if crop.is_floating_point() else crop.float().div_(255) for crop in crops]
