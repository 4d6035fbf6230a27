"""The random numbers of a view: drawn by address, for a whole batch at once."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from barlow import address
from barlow.views.settings import ViewSettings

_TRIES = 10  # crops drawn before falling back on the central one, as torchvision does

# Which columns of the generator an operation reads: fixed, so that an operation switched off or
# added does not change what the others draw.
_FLIPS, _TURNS, _AFFINE, _JITTER, _ORDER, _GREY, _BLUR, _SOLARISE, _PLACE, _CROP = (
    0, 2, 4, 8, 13, 14, 15, 17, 18, 20
)  # fmt: skip
_COLUMNS = _CROP + 2 * _TRIES


@dataclass(frozen=True)
class Parameters:
    """What is done to each of N images to make a view of it."""

    box: Tensor  # (N, 4) top, left, height, width of the crop in whole pixels
    hflip: Tensor  # (N,) bool
    vflip: Tensor  # (N,) bool
    turns: Tensor  # (N,) quarter turns against the clock, 0 to 3
    angle: Tensor  # (N,) radians against the clock
    shift: Tensor  # (N, 2) right and down, in parts of the size
    zoom: Tensor  # (N,)
    jitter: Tensor  # (N,) bool
    brightness: Tensor  # (N,)
    contrast: Tensor  # (N,)
    saturation: Tensor  # (N,)
    hue: Tensor  # (N,) turns
    order: Tensor  # (N,) 0 to 23: which of the orders of the four changes of colour
    grey: Tensor  # (N,) bool
    blur: Tensor  # (N,) bool
    sigma: Tensor  # (N,) pixels
    solarise: Tensor  # (N,) bool

    def take(self, index: Tensor) -> "Parameters":
        """Those of some images, in a given order."""
        return Parameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def draw(
    settings: ViewSettings, key: int, position: Tensor, height: int | Tensor, width: int | Tensor
) -> Parameters:
    """Draw the parameters of N images; those of image i depend on (key, position[i]) only.

    Args:
        settings: the distribution.
        key: from `address.key`.
        position: (N,) int64.
        height: of the images, one number or (N,).
        width: likewise.
    """
    u = address.uniform(key, position, _COLUMNS)  # (N, columns)
    s = settings

    def between(column: int, low: float, high: float) -> Tensor:
        return u[:, column] * (high - low) + low

    def factor(column: int, strength: float) -> Tensor:
        return between(column, max(0.0, 1 - strength), 1 + strength)

    turning = u[:, _TURNS] < s.quarter_turns
    angle = math.radians(s.rotation)
    return Parameters(
        box=_crop_boxes(s, u, height, width),
        hflip=u[:, _FLIPS] < s.hflip,
        vflip=u[:, _FLIPS + 1] < s.vflip,
        turns=(u[:, _TURNS + 1] * 4).long() * turning,
        angle=between(_AFFINE, -angle, angle),
        shift=(u[:, _AFFINE + 1 : _AFFINE + 3] * 2 - 1) * s.translate,
        zoom=between(_AFFINE + 3, *s.zoom),
        jitter=u[:, _JITTER] < s.jitter,
        brightness=factor(_JITTER + 1, s.brightness),
        contrast=factor(_JITTER + 2, s.contrast),
        saturation=factor(_JITTER + 3, s.saturation),
        hue=between(_JITTER + 4, -s.hue, s.hue),
        order=(u[:, _ORDER] * 24).long(),
        grey=u[:, _GREY] < s.grey,
        blur=u[:, _BLUR] < s.blur,
        sigma=between(_BLUR + 1, *s.blur_sigma),
        solarise=u[:, _SOLARISE] < s.solarise,
    )


def _crop_boxes(s: ViewSettings, u: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: (N, 4) int64."""
    n = u.shape[0]
    height, width = (torch.as_tensor(x, device=u.device).expand(n) for x in (height, width))
    tries = u[:, _CROP:].view(n, _TRIES, 2)
    area = (height * width)[:, None] * (
        tries[..., 0] * (s.crop_scale[1] - s.crop_scale[0]) + s.crop_scale[0]
    )
    low, high = math.log(s.crop_ratio[0]), math.log(s.crop_ratio[1])
    ratio = (tries[..., 1] * (high - low) + low).exp()
    w = (area * ratio).sqrt().round().long()  # (N, tries)
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    none = ~fits.any(1)
    if bool(none.any()):  # the largest central crop of a permitted shape
        shape = (width / height).clamp(*s.crop_ratio)
        w = torch.where(none, torch.minimum(width, (height * shape).round().long()), w)
        h = torch.where(none, torch.minimum(height, (width / shape).round().long()), h)
    place = u[:, _PLACE : _PLACE + 2]
    top = (place[:, 0] * (height - h + 1)).long()
    left = (place[:, 1] * (width - w + 1)).long()
    top = torch.where(none, (height - h) // 2, top)
    left = torch.where(none, (width - w) // 2, left)
    return torch.stack([top, left, h, w], 1)
