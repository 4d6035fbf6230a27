"""The protocols that leave the encoder unchanged: a linear classifier, nearest neighbours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from barlow.data import preprocess_of
from barlow.encoders import spec_of
from barlow.errors import UserError
from barlow.evaluation.baselines import views_of_run, with_baselines
from barlow.evaluation.classifier import Classifier, keep_classifier, require_classifier_folder
from barlow.evaluation.features import (
    cache_folder,
    features_of,
    resolve_encoder,
    warn_unread,
)
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.labels import AnyKind, Kind
from barlow.evaluation.linear import LinearClassifier, logistic_probe
from barlow.evaluation.metrics import compute_metrics, is_correct
from barlow.evaluation.regression import ridge_probe, tag_probe
from barlow.evaluation.result import Result, Row
from barlow.evaluation.sgd import sgd_probe
from barlow.evaluation.task import LabelledImages, Task, open_task
from barlow.progress import log_if_slow

_PASSES = 100  # over augmented images, Zbontar et al. 2021, appendix A


class Features(NamedTuple):
    """Representations of images, `(M, F)`, their labels, and their rows in the source."""

    x: Tensor
    y: Tensor
    rows: Tensor


def linear(
    encoder: str | Path | nn.Module,
    train: str,
    test: str | None = None,
    *,
    labels: str | None = None,
    test_labels: str | None = None,
    kind: AnyKind = "auto",
    label_fraction: float | None = None,
    labels_per_class: int | None = None,
    epochs: int | None = None,
    augment: bool = False,
    baseline: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    limit: int | None = None,
    out: str | None = None,
    cache: bool = True,
    accelerator: str = "auto",
    devices: int = 1,
) -> Result:
    """Fit a linear classifier (or regression) on the frozen encoder and measure it.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        train: source of the labelled training images (its training split, if it has splits).
        test: source of the test images (its test split, else its validation split), which influence
            no choice. Default: the training source; if it has neither split, a fifth of it is held
            out, always the same images.
        labels: CSV file of labels, instead of the source's own: a file name, then a class, tags
            separated by |, or numbers.
        test_labels: CSV file of the test images' labels; default: the same file.
        kind: what the CSV files hold: "classes", "tags" or "numbers"; "auto" infers it.
        label_fraction: use this share of the training labels of every class.
        labels_per_class: use this many training labels of every class.
        epochs: train by this many epochs of SGD (Zbontar et al. 2021, appendix A, use 100) instead
            of solving logistic regression exactly.
        augment: train by SGD on crops and flips drawn anew every epoch, as the papers do; 100
            epochs by default. Every epoch runs the encoder over all training images.
        baseline: also evaluate, in the same table: "random" (the same architecture, untrained),
            "pixels", "supervised" (timm's weights, downloaded), or several, separated by commas.
        seed: random seed: chooses the labels, orders the images, initialises the random baseline.
        batch_size: images per batch through the encoder.
        limit: use only the first N images of each source.
        out: folder to save the encoder and its classifier in, for `barlow predict`.
        cache: cache features in $BARLOW_CACHE (default: ~/.cache/barlow/features).
        accelerator: device type of the encoder: auto, cpu, cuda or mps. A module stays on its
            device. Classifiers are fitted on the CPU.
        devices: processes on this machine that share the images, one per device.

    Returns:
        Loss and accuracy for classes, mean average precision for tags, R2 for numbers, each on the
        training and on the test images.

    Raises:
        UserError: if the labels do not fit, or an option is out of range.
        OSError: if nothing can be written to `out`.
    """
    if out is not None:
        require_classifier_folder(Path(out))
    module = resolve_encoder(encoder, accelerator)
    in_chans = preprocess_of(module).in_chans
    task = open_task(
        train,
        test,
        labels=labels,
        test_labels=test_labels,
        kind=kind,
        in_chans=in_chans,
        limit=limit,
    ).with_few_labels(label_fraction, labels_per_class, seed)
    if task.kind != "classes" and (augment or epochs is not None):
        raise UserError(
            f"SGD needs class labels, and these are {task.kind}: drop augment and epochs"
        )
    if out is not None:
        if task.kind != "classes":
            raise UserError(
                "only class labels yield a classifier to save, and these are "
                f"{task.kind}: drop --out"
            )
        spec_of(module)  # raises if the encoder could not be saved
    rows, classes = [], len(task.names)
    for name, one, learnt, held_out in _lines(
        module, task, baseline, seed, batch_size, cache, devices
    ):
        if augment:
            from barlow.evaluation.augmented import augmented_probe

            passes = _PASSES if epochs is None else epochs
            views, view1 = views_of_run(encoder)
            classifier, rate = augmented_probe(
                one, task.train, classes, passes, seed=seed, views=views, view1=view1
            )
            chosen = {"rate": rate}
        else:
            with log_if_slow(f"fitting a classifier to the features of {len(learnt.x):,} images"):
                classifier, chosen = _fit(task.kind, learnt, classes, epochs, seed)
        scores = classifier(held_out.x)
        values = compute_metrics(task.kind, classifier(learnt.x), learnt.y, "train")
        values |= compute_metrics(task.kind, scores, held_out.y, "val")
        rows.append(Row(name, values, chosen=chosen, **_pack_correct(task, scores, held_out)))
    if out is not None:  # the last row is the one with pretraining
        whole = Classifier(module, task.names)
        whole.head.load_state_dict({"weight": classifier.weight.T, "bias": classifier.bias})
        keep_classifier(whole, out)
    return Result("linear", tuple(rows), data=task.summary())


def knn(
    encoder: str | Path | nn.Module,
    train: str,
    test: str | None = None,
    *,
    labels: str | None = None,
    test_labels: str | None = None,
    kind: AnyKind = "auto",
    label_fraction: float | None = None,
    labels_per_class: int | None = None,
    baseline: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    limit: int | None = None,
    cache: bool = True,
    accelerator: str = "auto",
    devices: int = 1,
) -> Result:
    """Evaluate the frozen encoder by weighted nearest neighbours; nothing is trained or tuned.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        train: source of the labelled images to search (its training split, if it has splits).
        test: source of the test images (its test split, else its validation split). Default: the
            training source; if it has neither split, a fifth of it is held out, always the same
            images.
        labels: CSV file of labels, instead of the source's own: a file name, then a class, tags
            separated by |, or numbers.
        test_labels: CSV file of the test images' labels; default: the same file.
        kind: what the CSV files hold: "classes", "tags" or "numbers"; "auto" infers it.
        label_fraction: use this share of the training labels of every class.
        labels_per_class: use this many training labels of every class.
        baseline: also evaluate, in the same table: "random" (the same architecture, untrained),
            "pixels", "supervised" (timm's weights, downloaded), or several, separated by commas.
        seed: random seed: chooses the labels, initialises the random baseline.
        batch_size: images per batch through the encoder.
        limit: use only the first N images of each source.
        cache: cache features in $BARLOW_CACHE (default: ~/.cache/barlow/features).
        accelerator: device type of the encoder: auto, cpu, cuda or mps. A module stays on its
            device. Neighbours are searched on the CPU.
        devices: processes on this machine that share the images, one per device.

    Returns:
        Accuracy, mean average precision or R2 on the test images, for 20 and 200 neighbours and
        temperatures 0.07 and 0.1.

    Raises:
        UserError: if the labels do not fit, or an option is out of range.
    """
    module = resolve_encoder(encoder, accelerator)
    in_chans = preprocess_of(module).in_chans
    task = open_task(
        train,
        test,
        labels=labels,
        test_labels=test_labels,
        kind=kind,
        in_chans=in_chans,
        limit=limit,
    ).with_few_labels(label_fraction, labels_per_class, seed)

    rows = []
    for name, _, bank, queries in _lines(module, task, baseline, seed, batch_size, cache, devices):
        ks = tuple(k for k in (20, 200) if k <= len(bank.x)) or (len(bank.x),)
        found = knn_scores(queries.x, bank.x, bank.y, ks, classes=len(task.names))
        for (k, t), scores in found.items():
            values = compute_metrics(task.kind, scores, queries.y, "val", loss=False)
            correct = _pack_correct(task, scores, queries)
            rows.append(Row(f"{name}, k = {k}, t = {t}", values, **correct))
    return Result("knn", tuple(rows), data=task.summary())


def _lines(
    encoder: nn.Module,
    task: Task,
    baseline: str | None,
    seed: int,
    batch_size: int,
    cache: bool,
    devices: int,
) -> Iterator[tuple[str, nn.Module, Features, Features]]:
    """For each line of the table: its name, its encoder, and its training and test features."""
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "cache": cache_folder() if cache else None,
        "devices": devices,
    }
    for line, (name, make) in enumerate(with_baselines(encoder, baseline)):
        one = make(seed)

        def features(
            images: LabelledImages, one: nn.Module = one, first: bool = not line
        ) -> Features:
            x, rows = features_of(one, images.source, images.rows, **how)
            if first:
                warn_unread(images.source, images.rows, rows)
            return Features(x, images.labels_for(rows), rows)

        yield name, one, features(task.train), features(task.test)


def _fit(
    kind: Kind, learnt: Features, classes: int, epochs: int | None, seed: int
) -> tuple[LinearClassifier, dict[str, Any]]:
    """A classifier, and what was chosen for it; test images are not seen and have no influence."""
    x, y, _ = learnt
    if kind == "tags":
        by_tag, penalties = tag_probe(x, y, seed)
        return by_tag, {"penalties": penalties}
    if kind == "numbers":
        found, penalty = ridge_probe(x, y)
        return found, {"penalty": penalty}
    if epochs is not None:
        found, rate = sgd_probe(x, y, classes, epochs, seed=seed)
        return found, {"rate": rate}
    found, penalty = logistic_probe(x, y, classes, seed=seed)
    return found, {"penalty": penalty}


def _pack_correct(task: Task, scores: Tensor, held_out: Features) -> dict[str, Any]:
    if task.kind != "classes":
        return {}
    return task.test.pack_correct([(held_out.rows, is_correct(scores, held_out.y))])
