"""Random crops of labelled images, with unchanged colours, for training classifiers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from barlow.data import memory, preprocess_of
from barlow.data.decode import BrokenImage
from barlow.evaluation.features import device_of
from barlow.evaluation.task import LabelledImages
from barlow.views import TwoViews


def geometric_views(
    encoder: nn.Module, views: str, view1: Mapping[str, Any] | None = None
) -> TwoViews:
    """The crops, flips and rotations of a preset, without its changes to colours and sharpness.

    Args:
        encoder: the encoder that will take the views; they are drawn on its device.
        views: the preset.
        view1: fields of its first view to replace.
    """
    preprocess = preprocess_of(encoder)
    unchanged = {"jitter": 0.0, "greyscale": 0.0, "blur": 0.0, "solarise": 0.0, "noise": 0.0}
    return TwoViews(
        preprocess.image_size,
        views,
        in_chans=preprocess.in_chans,
        mean=preprocess.mean,
        std=preprocess.std,
        view1={**(view1 or {}), **unchanged},
        view2=unchanged,
    ).to(device_of(encoder))


class CroppedImages:
    """Labelled images by index: decoded once if they fit in memory, else on access."""

    def __init__(self, images: LabelledImages, views: TwoViews) -> None:
        self._views = views
        self._source = images.source.part(images.rows)
        self._held = memory.load_if_fits(self._source, memory.default_budget(), views.image_size)

    def draw(self, chosen: Tensor, key: int, start: int) -> tuple[Tensor, Tensor]:
        """Views `(B, C, S, S)` of the chosen images that can be read, and the indices of those.

        The views are on the device of the `TwoViews` that draws them.
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
