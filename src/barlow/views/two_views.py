"""TwoViews: two random views of every image of a batch, on the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from barlow import address
from barlow.errors import UserError
from barlow.views import colour, geometry
from barlow.views.parameters import Parameters, draw
from barlow.views.settings import ViewSettings, normalisation, view_settings

# Values worked on at once: few enough that an operation finds what the one before wrote in the
# cache, many enough that calling it costs little. Measured with benchmarks/views.py.
_CHUNK = 200_000
_NOISE = 2  # stream of the noise, beside those of the parameters


class TwoViews(nn.Module):
    """Draw two views of each image, from two different distributions.

    Args:
        image_size: height and width of a view in pixels.
        preset: "paper" (Zbontar et al. 2021, the default), "small" (images of 64 pixels and less),
            "digits", "aerial" or "microscopy".
        in_chans: channels of the images. Saturation, hue and greyscale need 3 of them,
            solarisation 3 or 1.
        mean: what is taken from values in [0, 1], one number a channel; default ImageNet's.
        std: what they are then divided by; default ImageNet's.
        view1: changes to the first view's distribution, names and values of `ViewSettings`.
        view2: changes to the second's.

    Raises:
        UserError: if there is no such preset or setting, or a value cannot be.

    Example:
        >>> views = TwoViews(32, preset="small")
        >>> images = torch.randint(256, (8, 3, 40, 48), dtype=torch.uint8)
        >>> view1, view2 = views(images)
        >>> view1.shape, view1.dtype
        (torch.Size([8, 3, 32, 32]), torch.float32)
    """

    def __init__(
        self,
        image_size: int = 224,
        preset: str = "paper",
        *,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        view1: Mapping[str, Any] | None = None,
        view2: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.in_chans = in_chans
        self.settings = view_settings(preset, view1, view2)
        default_mean, default_std = normalisation(in_chans)
        self.mean = tuple(default_mean if mean is None else mean)
        self.std = tuple(default_std if std is None else std)
        if len(self.mean) != in_chans or len(self.std) != in_chans:
            raise UserError(
                f"mean and std have {len(self.mean)} and {len(self.std)} numbers for {in_chans} "
                "channels: give one a channel"
            )

    def forward(
        self, images: Tensor, *, key: int | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw the two views of a batch.

        Args:
            images: (N, C, H, W) uint8.
            key: of the random numbers; default a new one from torch's global generator.
            position: (N,) int64, the places of the images in the epoch; default 0 to N - 1. What
                is random about image i depends on (key, position[i]) and nothing else.

        Returns:
            Two (N, C, image_size, image_size) float32, normalised, channels-last.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: "
                f"expected torch.uint8 of shape (N, {self.in_chans}, H, W)"
            )
        if key is None:
            key = int(torch.randint(1 << 62, ()))
        if position is None:
            position = torch.arange(len(images))
        position = position.to(images.device)
        view1, view2 = (
            self._view(s, images, address.key(key, i), position)
            for i, s in enumerate(self.settings)
        )
        return view1, view2

    def _view(self, s: ViewSettings, images: Tensor, key: int, position: Tensor) -> Tensor:
        size = self.image_size
        out = torch.empty(
            (len(images), self.in_chans, size, size),
            device=images.device,
            memory_format=torch.channels_last,
        )
        step = max(1, _CHUNK // (self.in_chans * size * size))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            p = draw(s, key, position[part], *images.shape[2:])
            x = geometry.resample(images[part], p.box, size, s.interpolation, p.hflip, p.vflip)
            if s.quarter_turns:
                x = geometry.turn(x, p.turns)
            self._finish(s, x, p, key, position[part], out[part])
        return out

    def _finish(
        self, s: ViewSettings, x: Tensor, p: Parameters, key: int, position: Tensor, out: Tensor
    ) -> None:
        """From cropped values in [0, 1] to a finished view, written to `out`."""
        if s.rotation or s.translate or s.zoom != (1.0, 1.0):
            x = geometry.move(x, p, s.fill)
        if s.jitter:
            order = colour.hue_place(p).argsort(stable=True)
            x = colour.jitter(x[order], p.take(order))[order.argsort()]
        if s.grey:
            x = colour.greyscale(x, p.grey)
        if s.blur:
            x = colour.blur(x, p.blur, p.sigma)
        if s.solarise and self.in_chans in (1, 3):
            x = colour.solarise(x, p.solarise)
        if s.noise:
            values = x[0].numel()
            noise = address.normal(address.key(key, _NOISE), position, values)
            x = x.add_(noise.view(x.shape), alpha=s.noise)
        mean = x.new_tensor(self.mean).view(-1, 1, 1)
        std = x.new_tensor(self.std).view(-1, 1, 1)
        torch.sub(x, mean, out=out).div_(std)
