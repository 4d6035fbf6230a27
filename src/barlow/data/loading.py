"""From a source to batches of two views, in an order that depends only on seed and epoch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from barlow import address
from barlow.data import memory
from barlow.data.source import Source
from barlow.data.streaming import stream
from barlow.errors import UserError
from barlow.views import TwoViews
from barlow.views.geometry import fits_batched_crop, to_device


class Loader:
    """Batches of two views, epoch after epoch.

    The order of an epoch is a function of (seed, epoch), a view of (seed, epoch, position in that
    order). Neither the number of workers or ranks nor the step at which the epoch is entered
    changes a pixel.

    Args:
        source: the images.
        views: draws the two views.
        batch_size: images per step, over all ranks; an epoch leaves out what does not fill a batch.
        seed: random seed of the order and the views.
        rank: which slice of every batch to yield.
        world_size: number of slices.
        device: where the views are drawn.
        workers: processes that read and crop images; not needed for images of up to 64 pixels that
            fit in memory.
        memory_budget: bytes that decoded images may take on this rank. Default: a quarter of the
            memory of the machine or container, shared among the ranks.

    Raises:
        UserError: if the source has fewer images than a batch, or the batch size is not a multiple
            of the number of ranks.

    Example:
        >>> from barlow.data import open_source
        >>> views = TwoViews(28, preset="digits", in_chans=1)
        >>> loader = Loader(open_source("mnist5k", "test", in_chans=1), views, 100, seed=0)
        >>> view1, view2 = next(loader.epoch(0))
        >>> loader.steps_per_epoch, view1.shape
        (10, torch.Size([100, 1, 28, 28]))
    """

    def __init__(
        self,
        source: Source,
        views: TwoViews,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 2,
        memory_budget: int | None = None,
    ) -> None:
        """See the class."""
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch size {batch_size} cannot be split evenly over {world_size} ranks: "
                f"use a multiple of {world_size}"
            )
        if len(source) < batch_size:
            raise UserError(
                f"{source.name} has {len(source)} images, fewer than one batch of {batch_size}: "
                f"use a batch size of {len(source) - len(source) % world_size} or less"
            )
        self.source, self.views, self.batch_size, self.seed = source, views, batch_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.workers = workers
        self.steps_per_epoch = len(source) // batch_size
        if memory_budget is None:
            memory_budget = memory.default_budget(world_size)
        self._read = source
        self._images: Tensor | None = None
        self._rows: Tensor | None = None
        if loaded := memory.load_if_fits(source, memory_budget, views.image_size):
            images, self._rows = loaded
            if fits_batched_crop(images, views.image_size):
                self._images = images  # cropped as a batch, on the device
            else:  # the workers crop the decoded images one by one
                self._read = memory.in_memory(source, images)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's slice of both views of every batch, from `first_step` on.

        Args:
            epoch: number of the epoch.
            first_step: how many of its steps to skip.

        Yields:
            Two views, each float (batch_size / world_size, C, S, S), on the device.
        """
        order = self.source.order(address.key(self.seed, epoch))
        key = address.key(self.seed, epoch, 1)
        positions = self._positions(first_step)
        if self._rows is not None:
            order = self._rows[order]
        if self._images is not None:
            for position in positions:
                batch = to_device(self._images[order[position]], self.device)
                yield self.views(batch, key=key, position=position)
        else:
            addresses = ((order[position], position) for position in positions)
            for crops in stream(self._read, self.views, addresses, key, self.workers):
                for row, reason in crops.broken:
                    self.source.skip(row, reason)
                view1, view2 = (to_device(view, self.device) for view in (crops.view1, crops.view2))
                yield self.views.finish(view1, view2, key, crops.position)

    def _positions(self, first_step: int) -> Iterator[Tensor]:
        """Positions of this rank's images, (batch_size / world_size,) for each step."""
        share = self.batch_size // self.world_size
        for step in range(first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.rank * share
            yield torch.arange(start, start + share)
