"""The papers' linear probe with augmentation: every epoch sees new crops of the images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from barlow.address import AUGMENTED_ORDER, AUGMENTED_VIEWS, key, permutation
from barlow.errors import UserError
from barlow.evaluation.crops import CroppedImages, geometric_views
from barlow.evaluation.features import evaluating, features_of
from barlow.evaluation.linear import LinearClassifier, fold_in, standardisation
from barlow.evaluation.sgd import RATE_UNCHOSEN, RATES, Descent, with_ones
from barlow.evaluation.subsets import split
from barlow.evaluation.task import LabelledImages


def augmented_probe(
    encoder: nn.Module,
    train: LabelledImages,
    classes: int,
    epochs: int = 100,
    rate: float | None = None,
    seed: int = 0,
    views: str = "small",
    view1: Mapping[str, Any] | None = None,
    batch_size: int = 256,
) -> tuple[LinearClassifier, float]:
    """Train a linear classifier on the frozen encoder's features of random crops and flips.

    Zbontar et al. 2021, appendix A. The encoder runs over every image once per epoch, whatever the
    number of rates: for every rate, a trial classifier learns from nine tenths of each batch and a
    final one from all of it, so that nothing has to be trained again once the rate is chosen.

    Args:
        encoder: the frozen encoder, in eval mode meanwhile.
        train: labelled training images.
        classes: C.
        epochs: passes over the images.
        rate: learning rate to use instead of choosing one.
        seed: seed of the order, the crops and the division.
        views: preset whose crops, flips and rotations are drawn.
        view1: fields of its first view to replace.
        batch_size: images per step.

    Returns:
        A classifier for features as the encoder gives them, and the rate.

    Raises:
        UserError: if `epochs` is below 1.
    """
    if epochs < 1:
        raise UserError(f"epochs is {epochs}: with augmentation, it must be at least 1")
    # Features of the images without augmentation, because test images are not augmented either.
    x, rows = features_of(encoder, train.source, train.rows, batch_size=batch_size)
    train = LabelledImages(train.source, rows, train.labels_for(rows))
    standardise = standardisation(x)
    x = standardise(x)
    rates = RATES if rate is None else (rate,)
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    if rate is None:
        held_out[split(train.y, 0.1, seed)[1]] = True
    trial, final = (Descent(x.shape[1], classes, rates) for _ in range(2))
    images = CroppedImages(train, geometric_views(encoder, views, view1))
    size = min(batch_size, len(rows))
    steps = len(rows) // size
    with evaluating(encoder):
        for epoch in range(epochs):
            order = permutation(len(rows), key(seed, AUGMENTED_ORDER, epoch))
            for step in range(steps):
                chosen = order[step * size : (step + 1) * size]
                done = (epoch * steps + step) / (epochs * steps)
                batch, drawn = images.draw(chosen, key(seed, AUGMENTED_VIEWS, epoch), step * size)
                z = with_ones(standardise(_features(encoder, batch)))  # (B, F + 1)
                y, learns = train.y[drawn], ~held_out[drawn]
                final.step(z, y, done)
                if held_out.any() and learns.any():
                    trial.step(z[learns], y[learns], done)
    if rate is not None:
        best = 0
    elif held_out.any():
        best = trial.best(x[held_out], train.y[held_out])
    else:
        best = RATES.index(RATE_UNCHOSEN)
    return fold_in(final.classifier(best), standardise), rates[best]


def _features(encoder: nn.Module, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        y: Tensor = encoder(batch).float().cpu()
    return y.clone()  # the copy is not an inference tensor
