"""Fine-tuning: how good the whole network gets with the labels available."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow.data import preprocess_of
from barlow.errors import TrainingError, UserError
from barlow.evaluation.baselines import NamedEncoder, views_of_run, with_baselines
from barlow.evaluation.classifier import (
    Classifier,
    keep_classifier,
    require_classifier_folder,
    scores_of,
)
from barlow.evaluation.features import resolve_encoder, warn_unread
from barlow.evaluation.metrics import classification_metrics, is_correct
from barlow.evaluation.result import Result, Row
from barlow.evaluation.subsets import split
from barlow.evaluation.task import LabelledImages, open_task
from barlow.evaluation.training import train_classifier

RATES = (3e-4, 1e-3, 3e-3)  # of AdamW; one is chosen on held-out training images
_STEPS = 400  # the least, even with few labels, unless the number of epochs is given
_EPOCHS = 20  # Zbontar et al. 2021, section 3.2


@dataclass(frozen=True)
class _Training:
    """The settings that all trainings of a row share."""

    epochs: int
    batch_size: int
    views: str
    view1: dict[str, Any]
    classes: list[str]


def finetune(
    encoder: str | Path | nn.Module,
    train: str,
    test: str | None = None,
    *,
    labels: str | None = None,
    test_labels: str | None = None,
    label_fraction: float | None = None,
    labels_per_class: int | None = None,
    epochs: int | None = None,
    baseline: str | None = None,
    seeds: int = 3,
    seed: int = 0,
    rate: float | None = None,
    views: str | None = None,
    crop: float | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    out: str | None = None,
    accelerator: str = "auto",
) -> Result:
    """Fine-tune the whole network on labelled images, with several seeds, and measure it.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        train: source of the labelled training images (its training split, if it has splits).
        test: source of the test images (its test split, else its validation split), which influence
            no choice. Default: the training source; if it has neither split, a fifth of it is held
            out, always the same images.
        labels: CSV file of file names and classes, instead of the source's own labels.
        test_labels: CSV file of the test images' classes; default: the same file.
        label_fraction: use this share of the training labels of every class.
        labels_per_class: use this many training labels of every class.
        epochs: passes over the labelled images; default: 20 (Zbontar et al. 2021), or as many as
            make 400 steps if that is more.
        baseline: also fine-tune, in the same table: "random" (the same architecture from scratch),
            "supervised" (timm's weights, downloaded), or both, separated by a comma.
        seeds: number of trainings. Each has its own label subset (if only a part is used), image
            order and crops; the table shows mean and standard deviation.
        seed: first of the seeds.
        rate: learning rate of AdamW; default: chosen on held-out training images, for each row of
            the table separately.
        views: preset of the crops and flips; default: those of the pretraining run, or "small" if
            the encoder is not given as a run.
        crop: smallest share of an image that a training crop keeps; where no crop keeps that much
            (at 0.8, on images longer than 5:3), the centre is taken. Default: as in `views`.
        batch_size: images per step.
        limit: use only the first N images of each source.
        out: folder to save the classifier of the first seed in, for `barlow predict`.
        accelerator: device type: auto, cpu, cuda or mps. A module stays on its device.

    Returns:
        Mean and standard deviation over the seeds of loss and accuracy, on the training and on the
        test images.

    Raises:
        UserError: if the sources have no labels or different classes, or an option is out of range.
        OSError: if nothing can be written to `out`.
        TrainingError: if a training diverges at a given rate, or at every rate tried.
    """
    _check(epochs, seeds, rate, crop, batch_size)
    if out is not None:
        require_classifier_folder(Path(out))
    module = resolve_encoder(encoder, accelerator)
    encoders = with_baselines(module, baseline, ("random", "supervised"))
    in_chans = preprocess_of(module).in_chans
    task = open_task(
        train, test, labels=labels, test_labels=test_labels, in_chans=in_chans, limit=limit
    )
    if task.kind != "classes":
        raise UserError(
            f"fine-tuning needs class labels, and {labels} has {task.kind}: use protocol linear"
        )
    tasks = [task.with_few_labels(label_fraction, labels_per_class, seed + i) for i in range(seeds)]
    if epochs is None:
        steps = -(-len(tasks[0].train.rows) // batch_size)
        epochs = max(_EPOCHS, -(-_STEPS // steps))
    preset, changes = (views, {}) if views else views_of_run(encoder)
    if crop is not None:
        changes = changes | {"crop_scale": (crop, 1.0)}
    training = _Training(epochs, batch_size, preset, changes, task.names)
    rows = []
    subsets = [task_of_seed.train for task_of_seed in tasks]
    for named_encoder in encoders:
        row, classifier = _row(named_encoder, subsets, task.test, training, rate, seed)
        rows.append(row)
    if out is not None:  # the last row is the one with pretraining
        keep_classifier(classifier, out)
    settled = {"epochs": epochs, "views": preset} | ({"view1": changes} if changes else {})
    return Result("finetune", tuple(rows), settled, tasks[0].summary())


def _row(
    named_encoder: NamedEncoder,
    subsets: list[LabelledImages],
    test: LabelledImages,
    training: _Training,
    rate: float | None,
    seed: int,
) -> tuple[Row, Classifier]:
    """One line of the table, and the classifier of its first seed."""
    name, make = named_encoder
    found, correct_by_seed = list[dict[str, float]](), list[tuple[Tensor, Tensor]]()
    first: Classifier | None = None
    for i, train in enumerate(subsets):
        start = make(seed + i)
        if rate is None:  # once per row, as the labels of another seed need no other rate
            rate = choose_rate(start, train, training, seed)
        classifier = _train(start, train, training, rate, seed + i)
        values, read, correct = _measure(classifier, train, test, training.batch_size)
        if not i:
            warn_unread(test.source, test.rows, read)
        found.append(values)
        correct_by_seed.append((read, correct))
        first = first or classifier
    assert first is not None
    columns = {key: [values[key] for values in found] for key in found[0]}
    by_seed = columns if len(found) > 1 else {}
    spread = {k: statistics.stdev(v) for k, v in by_seed.items()}
    mean = {k: statistics.fmean(v) for k, v in columns.items()}
    chosen = {"rate": rate, "seeds": len(found)}
    return Row(name, mean, spread, by_seed, chosen, **test.pack_correct(correct_by_seed)), first


def choose_rate(encoder: nn.Module, train: LabelledImages, training: _Training, seed: int) -> float:
    """The rate with the best accuracy on held-out training images; of equals, the lowest loss.

    Accuracy is averaged over the classes if their sizes are unequal; otherwise always predicting
    the largest class could win. A fifth of the training images is held out; if no class has two
    images, the middle rate is taken.
    """
    fit, held_out = split(train.y, 0.2, seed)
    if not len(held_out):
        return RATES[len(RATES) // 2]
    scored = []
    for rate in RATES:
        try:
            classifier = _train(encoder, train.take(fit), training, rate, seed)
        except TrainingError:  # the rate is too high, but another may work
            continue
        values, *_ = _measure(classifier, None, train.take(held_out), training.batch_size)
        best = values.get("val_recall", values["val_top1"])
        scored.append((-best, values["val_loss"], rate))
    if not scored:
        raise TrainingError(f"fine-tuning diverged at every rate in {RATES}: give a lower one")
    return min(scored)[2]


def _train(
    encoder: nn.Module, train: LabelledImages, training: _Training, rate: float, seed: int
) -> Classifier:
    return train_classifier(
        encoder,
        train,
        training.classes,
        rate=rate,
        epochs=training.epochs,
        batch_size=training.batch_size,
        seed=seed,
        views=training.views,
        view1=training.view1,
    )


def _measure(
    classifier: Classifier,
    train: LabelledImages | None,
    test: LabelledImages,
    batch_size: int,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """The metrics, the test rows that could be read, and whether each is classified correctly."""
    values: dict[str, float] = {}
    if train is not None:
        scores, rows = _scores(classifier, train, batch_size)
        warn_unread(train.source, train.rows, rows)
        values |= classification_metrics(scores, train.labels_for(rows), "train")
    scores, rows = _scores(classifier, test, batch_size)
    y = test.labels_for(rows)
    return values | classification_metrics(scores, y, "val"), rows, is_correct(scores, y)


def _scores(
    classifier: Classifier, images: LabelledImages, batch_size: int
) -> tuple[Tensor, Tensor]:
    found = list(scores_of(classifier, images.source.part(images.rows), batch_size))
    return torch.cat([s for s, _ in found]), images.rows[torch.cat([r for _, r in found])]


def _check(
    epochs: int | None, seeds: int, rate: float | None, crop: float | None, batch_size: int
) -> None:
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs is {epochs}: it must be at least 1")
    if seeds < 1:
        raise UserError(f"seeds is {seeds}: it must be at least 1; use 3 to see the spread")
    if rate is not None and rate <= 0:
        raise UserError(f"rate is {rate}: it must be greater than 0, or omitted to have it chosen")
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"crop is {crop}: it must be a share of the image, above 0 and at most 1")
    if batch_size < 2:
        raise UserError(f"batch size is {batch_size}: batch norm needs 2 or more")
