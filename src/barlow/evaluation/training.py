"""Training a whole classifier, encoder included, on labelled images."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from barlow.address import FINETUNE_LAYERS, FINETUNE_ORDER, FINETUNE_VIEWS, key, permutation
from barlow.errors import TrainingError
from barlow.evaluation.classifier import Classifier
from barlow.evaluation.crops import CroppedImages, geometric_views
from barlow.evaluation.features import device_of, features_of
from barlow.evaluation.linear import logistic_probe
from barlow.evaluation.task import LabelledImages
from barlow.optim import parameter_groups, warmup_cosine
from barlow.progress import log_if_slow

_DECAY = 1e-4
_WARMUP = 0.1  # share of the steps, because AdamW's first estimates of the variance are poor


def train_classifier(
    encoder: nn.Module,
    train: LabelledImages,
    classes: list[str],
    *,
    rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    views: str,
    view1: Mapping[str, Any] | None = None,
) -> Classifier:
    """Train a copy of an encoder with a linear layer on top.

    The layer starts as the logistic regression on the frozen representation (Kumar et al. 2022,
    "linear probing then fine-tuning"): from a random one, the first steps would change the
    representation to suit a layer that knows nothing yet. All weights are then trained by AdamW
    with warm-up and a cosine schedule, on crops and flips without colour changes.

    Args:
        encoder: the encoder, which is not changed.
        train: labelled images.
        classes: names of all classes.
        rate: learning rate of AdamW.
        epochs: passes over the images.
        batch_size: images per step; the last, smaller batch is left out only if it is one image.
        seed: seed of the order, the crops, and random layers such as dropout.
        views: preset whose crops, flips and rotations are drawn.
        view1: fields of its first view to replace.

    Returns:
        The classifier, in eval mode.

    Raises:
        TrainingError: if the loss is not finite.
    """
    classifier = Classifier(copy.deepcopy(encoder), classes)
    device = device_of(encoder)
    x, rows = features_of(encoder, train.source, train.rows, batch_size=batch_size)
    with torch.no_grad():
        with log_if_slow(f"fitting a logistic regression to {len(x):,} images before fine-tuning"):
            probe, _ = logistic_probe(x, train.labels_for(rows), len(classes), seed=seed)
        classifier.head.weight.copy_(probe.weight.T)
        classifier.head.bias.copy_(probe.bias)
    classifier.to(device)
    for parameter in classifier.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        parameter_groups(classifier, lr=rate, lr_bias_norm=rate, weight_decay=_DECAY)
    )
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    images = CroppedImages(train, geometric_views(encoder, views, view1))
    starts = _starts(len(train.rows), batch_size)
    steps, step = epochs * len(starts), 0
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        log_if_slow(f"fine-tuning at rate {rate:g}, seed {seed}, {steps:,} steps") as reached,
    ):
        torch.manual_seed(key(seed, FINETUNE_LAYERS))
        for epoch in range(epochs):
            classifier.train()
            order = permutation(len(train.rows), key(seed, FINETUNE_ORDER, epoch))
            for start, end in starts:
                for group in optimiser.param_groups:
                    factor = warmup_cosine(step + 1, steps=steps, warmup=int(_WARMUP * steps))
                    group["lr"] = group["initial_lr"] * factor
                batch, chosen = images.draw(
                    order[start:end], key(seed, FINETUNE_VIEWS, epoch), start
                )
                y = train.y[chosen]
                step += 1
                reached(f"{step:,} done")
                if len(y) < 2:  # batch norm cannot take the variance of one image
                    continue
                loss = F.cross_entropy(classifier(batch), y.to(device))
                if not loss.isfinite():
                    raise TrainingError(
                        f"fine-tuning at rate {rate:g} diverged in epoch {epoch + 1}: "
                        f"give a lower rate, for example {rate / 10:g}"
                    )
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return classifier.eval()


def _starts(images: int, batch_size: int) -> list[tuple[int, int]]:
    ends = [(s, min(s + batch_size, images)) for s in range(0, images, batch_size)]
    return ends[:-1] if len(ends) > 1 and ends[-1][1] - ends[-1][0] == 1 else ends
