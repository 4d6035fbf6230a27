"""Images in the source's order, for evaluation."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from barlow.data.decode import BrokenImage
from barlow.data.preprocess import Preprocess
from barlow.data.source import Source

_Map = Callable[[Callable[[int], Tensor | BrokenImage], range], Iterable[Tensor | BrokenImage]]
_Read = tuple[Tensor | None, list[int], list[tuple[int, str]]]  # images, rows, (row, reason)


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, preprocessed, in the source's order; broken ones are left out.

    Args:
        source: the images.
        preprocess: brings them to one size.
        batch_size: images at a time; the last batch may be smaller.
        device: where the batches go.
        workers: threads that decode while a GPU works, or while images arrive over a network
            (decoding and resizing release Python's lock). If the encoder is on the CPU and the
            images are local, all cores decode between two batches instead.

    Yields:
        Images, float32 (B, C, S, S), channels last, and their indices in the source, (B,).

    Raises:
        UserError: if more images are broken than the source allows.

    Example:
        >>> from barlow.data import open_source
        >>> digits = open_source("mnist5k", "test", in_chans=1)
        >>> images, rows = next(eval_batches(digits, Preprocess(28, in_chans=1), 100))
        >>> images.shape, rows[:3]
        (torch.Size([100, 1, 28, 28]), tensor([0, 1, 2]))
    """

    device = torch.device(device)

    def decode(i: int) -> Tensor | BrokenImage:
        try:
            return preprocess.square(source[i])
        except BrokenImage as error:
            return error

    def read(start: int, each: _Map = map) -> _Read:
        rows = range(start, min(start + batch_size, len(source)))
        found = list(zip(rows, each(decode, rows), strict=True))
        images = [image for _, image in found if isinstance(image, Tensor)]
        broken = [(row, str(image)) for row, image in found if isinstance(image, BrokenImage)]
        good = [row for row, image in found if isinstance(image, Tensor)]
        return preprocess.normalise(torch.cat(images)) if images else None, good, broken

    starts = range(0, len(source), batch_size)
    if device.type == "cpu" and not source.is_remote:
        # The encoder uses every core, so decoding at the same time would make its threads wait.
        pool = ThreadPoolExecutor(torch.get_num_threads())
        batches: Iterator[_Read] = (read(start, pool.map) for start in starts)
    else:
        pool = ThreadPoolExecutor(max(1, workers))
        batches = _ahead(pool, read, starts, workers)
    with pool:
        for images, rows, broken in batches:
            for i, reason in broken:
                source.skip(i, reason)
            if images is not None:
                batch = images.to(device, memory_format=torch.channels_last)
                yield batch, torch.tensor(rows)


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], _Read], starts: range, count: int
) -> Iterator[_Read]:
    """The result of `read` for every start, in order, with up to `count` more read ahead."""
    ahead: deque[Future[_Read]] = deque()
    for start in starts:
        ahead.append(pool.submit(read, start))
        if len(ahead) > count:
            yield ahead.popleft().result()
    for future in ahead:
        yield future.result()
