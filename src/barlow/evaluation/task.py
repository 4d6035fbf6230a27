"""The labelled images of an evaluation: opening them, aligning labels, keeping test separate."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from barlow.address import TEST_SPLIT, key, permutation
from barlow.data import Source, open_source
from barlow.data.splits import NoSuchSplit
from barlow.errors import UserError
from barlow.evaluation.labels import AnyKind, Kind, Labels, labels_of, read_labels
from barlow.evaluation.result import pack
from barlow.evaluation.subsets import label_fraction, labels_per_class, split

log = logging.getLogger(__name__)

_TEST_SHARE = 0.2
_ONE = {"classes": "class", "tags": "tag", "numbers": "column"}


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images of a source.

    Attributes:
        source: the source that they are in.
        rows: `(M,)` int64, which of its images.
        y: their labels: `(M,)` int64 classes, `(M, T)` float32 tags of 0 or 1, or numbers.
    """

    source: Source
    rows: Tensor
    y: Tensor

    def take(self, indices: Tensor) -> "LabelledImages":
        """Some of the images."""
        return LabelledImages(self.source, self.rows[indices], self.y[indices])

    def labels_for(self, rows: Tensor) -> Tensor:
        """Labels of the given rows, which must be among `self.rows`."""
        place = torch.full((len(self.source),), -1)
        place[self.rows] = torch.arange(len(self.rows))
        return self.y[place[rows]]

    def pack_correct(self, found: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """`correct` and `read` of a `Row`, with one bit per image.

        Args:
            found: for each seed the rows that could be read, in order, and whether each was right.
        """
        everyone, correct = torch.ones(len(self.rows), dtype=torch.bool), list[str]()
        for rows, is_correct in found:
            read = torch.isin(self.rows, rows)
            correct.append(pack(torch.zeros_like(read).masked_scatter(read, is_correct)))
            everyone &= read
        return {"correct": correct, "read": "" if everyone.all() else pack(everyone)}

    def summary(self) -> dict[str, Any]:
        """Name, size and fingerprint, for the record."""
        chosen = hashlib.sha256(self.rows.numpy().tobytes() + self.y.numpy().tobytes())
        return {
            "name": self.source.name,
            "images": len(self.rows),
            "fingerprint": f"{self.source.fingerprint}-{chosen.hexdigest()[:8]}",
        }


@dataclass(frozen=True)
class Task:
    """Training and test images with labels of the same meaning.

    Attributes:
        train: images to learn and choose from.
        test: images to measure on, which influence no choice.
        names: names of the classes, the tags, or the columns of numbers.
        kind: which of the three the labels are.
    """

    train: LabelledImages
    test: LabelledImages
    names: list[str]
    kind: Kind = "classes"

    def with_few_labels(self, fraction: float | None, per_class: int | None, seed: int) -> "Task":
        """The task with only some of the training labels, classes in balance.

        Raises:
            UserError: if both are given, there are too few labels, or they are not classes.
        """
        if fraction is None and per_class is None:
            return self
        if fraction is not None and per_class is not None:
            raise UserError("label fraction and labels per class are both given: give only one")
        if self.kind != "classes":
            raise UserError(
                f"label fraction and labels per class need class labels, and these are {self.kind}"
            )
        y = self.train.y
        if fraction is not None:
            chosen = label_fraction(y, fraction, seed)
        else:
            assert per_class is not None
            class_names = [f"{name!r} of {self.train.source.name}" for name in self.names]
            chosen = labels_per_class(y, per_class, seed, class_names)
        return replace(self, train=self.train.take(chosen))

    def summary(self) -> dict[str, Any]:
        """Both parts and what their labels are, for the record."""
        return {
            "train": self.train.summary(),
            "test": self.test.summary(),
            self.kind: len(self.names) if self.kind == "classes" else self.names,
        }


def open_task(
    train: str,
    test: str | None = None,
    *,
    labels: str | None = None,
    test_labels: str | None = None,
    kind: AnyKind = "auto",
    in_chans: int = 3,
    limit: int | None = None,
) -> Task:
    """Open the labelled images of an evaluation.

    Args:
        train: a source; if it has splits, its training split.
        test: a source; if it has splits, its test or validation split. Default: the training
            source; if it has no such split, a fifth of its images, always the same ones, classes in
            balance.
        labels: CSV file of the labels, instead of the source's own.
        test_labels: CSV file of the test images' labels; default: `labels`.
        kind: what the files hold; "auto" infers it.
        in_chans: number of channels that the encoder takes.
        limit: use only the first `limit` images of each source.

    Returns:
        The task; images without a label are left out.

    Raises:
        UserError: if there are no labels, the test images have some that the training images lack,
            an image is in both parts, or a source that has to be divided lists an image twice.
    """
    if labels is None and (test_labels is not None or kind != "auto"):
        raise UserError("test labels and kind require labels from a file: give labels too")
    test = train if test is None else test
    first = open_source(train, "train", in_chans=in_chans, limit=limit)
    try:
        second = open_source(test, "test", in_chans=in_chans, limit=limit)
    except NoSuchSplit:
        if test != train:
            raise
        second = first  # its only split is for training, so it is divided as if it had no splits
    same = _place(train) == _place(test) and first.fingerprint == second.fingerprint
    known = read_labels(labels, first.ids, kind, _folder(train)) if labels else labels_of(first)
    if same and test_labels is None:
        _refuse_twice(first, known.rows)
        known, held_out = _divided(known)
    else:
        file = test_labels or labels
        found = (
            read_labels(file, second.ids, known.kind, _folder(test)) if file else labels_of(second)
        )
        held_out = _aligned(known, found, second.name)
        both = known.rows[torch.isin(known.rows, held_out.rows)].tolist()
        if same and both:
            raise UserError(
                f"{test_labels} labels {len(both)} images that {labels} labels too, such as "
                f"{first.ids[both[0]]}: test on images not used for training"
            )
    if known.kind == "classes":
        unseen = ~torch.isin(held_out.values, known.values)
        if number := int(unseen.sum()):
            hint = "; --limit takes the first images, which may lack some classes" if limit else ""
            name = known.names[int(held_out.values[unseen][0])]
            log.warning(
                "%d of %d test images belong to classes with no training images, such as %s: none "
                "of them can be classified correctly%s",
                *(number, len(unseen), name, hint),
            )
    return Task(
        LabelledImages(first, known.rows, known.values),
        LabelledImages(second, held_out.rows, held_out.values),
        known.names,
        known.kind,
    )


def _place(source: str) -> str:
    """Where a source is: a file or folder gives the same path however the user wrote it."""
    path = os.path.expanduser(source.partition("::")[0])
    return os.path.realpath(path) if os.path.exists(path) else source


def _folder(source: str) -> str:
    """The name of the folder that a source's images are below; "" if the source is no folder."""
    path = os.path.abspath(os.path.expanduser(source.partition("::")[0]))
    return os.path.basename(path) if os.path.isdir(path) else ""


def _refuse_twice(source: Source, rows: Tensor) -> None:
    seen = set[str]()
    for row in rows.tolist():
        raw = source.records[row]
        if not isinstance(raw, str):
            return
        file = os.path.normpath(raw)
        if file in seen:
            raise UserError(
                f"{source.name} lists {source.ids[row]} twice, so training and test may share it: "
                "list each image once, or give a test source"
            )
        seen.add(file)


def _divided(known: Labels) -> tuple[Labels, Labels]:
    """Training and test labels, divided the same for every seed, so that the test is the same."""
    if known.kind == "classes":
        kept, held_out = split(known.values, _TEST_SHARE)
    else:
        order = permutation(len(known.rows), key(0, TEST_SPLIT))
        number = round(_TEST_SHARE * len(order))
        held_out, kept = order[:number].sort().values, order[number:].sort().values
    if not len(held_out):
        raise UserError(
            f"{len(known.rows)} labelled images are too few to hold any out for testing: "
            "label more, or give a test source"
        )
    return known.take(kept), known.take(held_out)


def _aligned(known: Labels, test: Labels, name: str) -> Labels:
    """The test labels, numbered and ordered as the training labels are."""
    place = {name: i for i, name in enumerate(known.names)}
    used = set(test.values.tolist()) if test.kind == "classes" else range(len(test.names))
    if unknown := [test.names[i] for i in sorted(used) if test.names[i] not in place]:
        raise UserError(
            f"test source {name} has {_ONE[known.kind]} {unknown[0]!r}, which is not among the "
            f"training labels ({', '.join(known.names[:5])}"
            f"{', ...' if len(known.names) > 5 else ''}): label both sources the same way"
        )
    at = torch.tensor([place.get(n, -1) for n in test.names])
    if known.kind == "classes":
        return replace(test, names=known.names, values=at[test.values])
    if known.kind == "numbers" and len(test.names) < len(known.names):
        missing = next(n for n in known.names if n not in test.names)
        raise UserError(f"the labels of test source {name} lack column {missing!r}")
    values = torch.zeros(len(test.values), len(known.names))
    values[:, at] = test.values
    return replace(test, names=known.names, values=values)
