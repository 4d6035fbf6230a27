"""The labelled images of an evaluation: opened, their classes aligned, train apart from test."""

from dataclasses import dataclass

import torch
from torch import Tensor

from barlow.data import Source, open_source
from barlow.errors import UserError
from barlow.evaluation.subsets import label_fraction, labels_per_class, split

_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Part:
    """Labelled images of a source.

    Attributes:
        source: where they are.
        rows: `(M,)` int64, which of its images.
        y: `(M,)` int64 labels.
    """

    source: Source
    rows: Tensor
    y: Tensor

    def take(self, indices: Tensor) -> "Part":
        """Some of the images."""
        return Part(self.source, self.rows[indices], self.y[indices])

    def known(self, rows: Tensor) -> Tensor:
        """Labels of those rows, which are among `self.rows`."""
        label = torch.full((len(self.source),), -1)
        label[self.rows] = self.y
        return label[rows]


@dataclass(frozen=True)
class Task:
    """Training and test images with labels of the same classes."""

    train: Part
    test: Part
    classes: list[str]


def open_task(train: str, test: str, in_chans: int = 3, limit: int | None = None) -> Task:
    """Open the labelled images of an evaluation.

    Args:
        train: a source; of one with splits the training split.
        test: a source; of one with splits the test or validation split. The same source without
            splits: a fifth of its images, the same ones every time, classes in balance.
        in_chans: channels the encoder takes.
        limit: only the first so many images of each.

    Returns:
        The task; images without a label are left out.

    Raises:
        UserError: if a source has no labels, or the test has classes that training has not.
    """
    first = open_source(train, "train", in_chans=in_chans, limit=limit)
    second = open_source(test, "test", in_chans=in_chans, limit=limit)
    classes = _classes(first)
    train_part, test_part = _part(first, classes), _part(second, classes)
    if train == test and first.fingerprint == second.fingerprint:
        kept, held_out = split(train_part.y, _TEST_SHARE)
        if not len(held_out):
            raise UserError(f"{train} has one image a class: too few to hold any out for a test")
        train_part, test_part = train_part.take(kept), train_part.take(held_out)
    return Task(train_part, test_part, classes)


def few_labels(
    part: Part, fraction: float | None, per_class: int | None, classes: list[str], seed: int
) -> Part:
    """The part of the training images whose labels may be used.

    Raises:
        UserError: if both are given, or there are not as many labels.
    """
    if fraction is not None and per_class is not None:
        raise UserError("label fraction and labels per class are both given: give one of them")
    if fraction is not None:
        return part.take(label_fraction(part.y, fraction, seed))
    if per_class is not None:
        counts = torch.bincount(part.y, minlength=len(classes))
        fewest = int(counts.argmin())
        if counts[fewest] < per_class:
            raise UserError(
                f"{per_class} labels per class asked for, but class {classes[fewest]!r} of "
                f"{part.source.name} has {int(counts[fewest])}: ask for fewer"
            )
        return part.take(labels_per_class(part.y, per_class, seed))
    return part


def _classes(source: Source) -> list[str]:
    labels = _labels(source)
    if source.classes is not None:
        return list(source.classes)
    return [str(c) for c in range(int(labels.max()) + 1)]


def _labels(source: Source) -> Tensor:
    if source.labels is None or not bool((source.labels >= 0).any()):
        raise UserError(
            f"{source.name} has no labels: put the images into a folder per class, "
            "or give a table that has a label column"
        )
    return source.labels


def _part(source: Source, classes: list[str]) -> Part:
    """The labelled images, their labels numbered as `classes` are."""
    labels = _labels(source)
    rows = (labels >= 0).nonzero().flatten()
    own = source.classes or [str(c) for c in range(int(labels.max()) + 1)]
    number = {name: i for i, name in enumerate(classes)}
    present = [own[i] for i in torch.bincount(labels[rows]).nonzero().flatten().tolist()]
    unknown = [name for name in present if name not in number]
    if unknown:
        raise UserError(
            f"test source {source.name} has class {unknown[0]!r}, which the training source does "
            f"not have (it has {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}): "
            "give sources with the same classes"
        )
    renumber = torch.tensor([number.get(name, -1) for name in own])
    return Part(source, rows, renumber[labels[rows]])
