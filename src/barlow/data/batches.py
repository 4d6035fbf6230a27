"""Images in the source's order, for evaluation."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from barlow.data.decode import BrokenImage
from barlow.data.preprocess import Preprocess
from barlow.data.source import Source

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
        batch_size: how many at a time; the last batch may be smaller.
        device: where the batches go.
        workers: threads that decode (decoders and resizing let go of Python's lock).

    Yields:
        Images, float32 (B, C, S, S), channels last, and their indices in the source, (B,).

    Raises:
        UserError: if more images are broken than the source lets pass.

    Example:
        >>> from barlow.data import open_source
        >>> digits = open_source("mnist5k", "test", in_chans=1)
        >>> images, rows = next(eval_batches(digits, Preprocess(28, in_chans=1), 100))
        >>> images.shape, rows[:3]
        (torch.Size([100, 1, 28, 28]), tensor([0, 1, 2]))
    """

    def read(start: int) -> _Read:
        images, rows, broken = [], [], []
        for i in range(start, min(start + batch_size, len(source))):
            try:
                image = source[i]
            except BrokenImage as error:
                broken.append((i, str(error)))
                continue
            images.append(image)
            rows.append(i)
        return preprocess.together(images) if images else None, rows, broken

    with ThreadPoolExecutor(max(1, workers)) as pool:
        starts = iter(range(0, len(source), batch_size))
        ahead: deque[Future[_Read]] = deque()
        for start in starts:
            ahead.append(pool.submit(read, start))
            if len(ahead) > workers:
                break
        while ahead:
            images, rows, broken = ahead.popleft().result()
            if (start := next(starts, -1)) >= 0:
                ahead.append(pool.submit(read, start))
            for i, reason in broken:
                source.skip(i, reason)
            if images is not None:
                batch = images.to(device, memory_format=torch.channels_last)
                yield batch, torch.tensor(rows)
