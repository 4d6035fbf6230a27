"""The training of a whole classifier, encoder and all, on labelled images."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow.address import key, permutation
from barlow.data import Preprocess, memory
from barlow.data.decode import BrokenImage
from barlow.errors import TrainingError
from barlow.evaluation.classifier import Classifier
from barlow.evaluation.features import device_of, features_of
from barlow.evaluation.linear import LinearClassifier, logistic_probe
from barlow.evaluation.task import Part
from barlow.optim import parameter_groups, warmup_cosine
from barlow.progress import slow
from barlow.views import TwoViews

_ORDER, _VIEWS, _LAYERS = 105, 106, 107  # streams of random numbers
_DECAY = 1e-4
_WARMUP = 0.1  # of the steps: AdamW's first estimates of the variance are poor


def tune(
    encoder: nn.Module,
    part: Part,
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
    "linear probing then fine-tuning"): from a random one, the first steps would pull the
    representation after a layer that knows nothing yet. Then AdamW, warm-up and cosine, on
    crops and flips without changes of colour.

    Args:
        encoder: left as it is.
        part: labelled images.
        classes: names of all classes.
        rate: of AdamW.
        epochs: passes over the images.
        batch_size: images a step; of the last, smaller batch only a single image is left out.
        seed: of the order, the crops, and random layers such as dropout.
        views: preset whose crops, flips and turns are drawn.
        view1: fields of its first view to replace.

    Returns:
        The classifier, in eval mode.

    Raises:
        TrainingError: if the loss is not finite.
    """
    classifier = Classifier(copy.deepcopy(encoder), classes)
    device = device_of(encoder)
    x, rows = features_of(encoder, part.source, part.rows, batch_size=batch_size)
    with torch.no_grad():
        with slow(f"a logistic regression on {len(x):,} images, where fine-tuning starts"):
            probe = _probe(x, part.known(rows), len(classes), seed)
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
    images = Images(part, geometry(encoder, views, view1))
    starts = _starts(len(part.rows), batch_size)
    steps, step = epochs * len(starts), 0
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        slow(f"fine-tuning at rate {rate:g}, seed {seed}, {steps:,} steps") as reached,
    ):
        torch.manual_seed(key(seed, _LAYERS))
        for epoch in range(epochs):
            classifier.train()
            order = permutation(len(part.rows), key(seed, _ORDER, epoch))
            for start, end in starts:
                for group in optimiser.param_groups:
                    factor = warmup_cosine(step + 1, steps=steps, warmup=int(_WARMUP * steps))
                    group["lr"] = group["initial_lr"] * factor
                batch, chosen = images.draw(order[start:end], key(seed, _VIEWS, epoch), start)
                y = part.y[chosen]
                step += 1
                reached(f"{step:,} done")
                if len(y) < 2:  # batch norm has no variance of one image
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


def geometry(encoder: nn.Module, views: str, view1: Mapping[str, Any] | None = None) -> TwoViews:
    """The crops, flips and turns of a preset, without what changes colours and sharpness.

    Args:
        encoder: takes the views, on its device.
        views: the preset.
        view1: fields of its first view to replace.
    """
    preprocess = encoder.preprocess
    assert isinstance(preprocess, Preprocess)
    plain = {"jitter": 0.0, "greyscale": 0.0, "blur": 0.0, "solarise": 0.0, "noise": 0.0}
    return TwoViews(
        preprocess.image_size,
        views,
        in_chans=preprocess.in_chans,
        mean=preprocess.mean,
        std=preprocess.std,
        view1={**(view1 or {}), **plain},
        view2=plain,
    ).to(device_of(encoder))


class Images:
    """Labelled images by number: decoded once where they fit in memory, else when asked for."""

    def __init__(self, part: Part, views: TwoViews) -> None:
        self._views = views
        self._source = part.source.part(part.rows)
        self._held = memory.load(self._source, memory.default_budget(), views.image_size)

    def draw(self, chosen: Tensor, key: int, start: int) -> tuple[Tensor, Tensor]:
        """Views `(B, C, S, S)` of the chosen images that can be read, and which those are.

        The views are on the device of what draws them.
        """
        images: Tensor | list[Tensor]
        if self._held is not None:
            decoded, replacement = self._held
            chosen = chosen[replacement[chosen] == chosen]
            images = decoded[chosen]
        else:
            images, good = [], []
            for i in chosen.tolist():
                try:
                    images.append(self._source[i])
                    good.append(i)
                except BrokenImage as error:
                    self._source.skip(i, str(error))
            chosen = torch.tensor(good, dtype=torch.long)
        position = torch.arange(start, start + len(chosen))
        device = self._views.mean.device
        crops1, crops2 = (c.to(device) for c in self._views.crop(images, key, position))
        view, _ = self._views.finish(crops1, crops2, key, position)
        return view, chosen


def _starts(images: int, batch_size: int) -> list[tuple[int, int]]:
    ends = [(s, min(s + batch_size, images)) for s in range(0, images, batch_size)]
    return ends[:-1] if len(ends) > 1 and ends[-1][1] - ends[-1][0] == 1 else ends


def _probe(x: Tensor, y: Tensor, classes: int, seed: int) -> LinearClassifier:
    probe, _ = logistic_probe(x, y, classes, seed=seed)
    return probe
