"""Changes of colour on whole batches, each sample with its own parameters, in place."""

from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import pad

from barlow.views.parameters import Parameters

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_ORDERS = list(permutations(range(4)))
# Hue is the one change that is no mixture of the pixel, its grey and the mean grey. An order of
# the four is then: which of the three mixtures is first, second, third, and how many of them
# come before hue.
_MIXTURES = torch.tensor([[change for change in order if change != _HUE] for order in _ORDERS])
_BEFORE_HUE = torch.tensor([order.index(_HUE) for order in _ORDERS])
_LUMA = (0.299, 0.587, 0.114)


def hue_place(p: Parameters) -> Tensor:
    """How many changes come before that of hue, 0 to 3, or 4 for samples without jitter: (N,)."""
    return torch.where(p.jitter, _BEFORE_HUE.to(p.order.device)[p.order], 4)


def jitter(x: Tensor, p: Parameters) -> Tensor:
    """Change brightness, contrast, saturation and hue, in each sample's own order.

    Args:
        x: (N, C, H, W) in [0, 1], sorted by `hue_place`; saturation and hue need 3 channels.
        p: factors, shift and order, sorted likewise.

    Returns:
        x, changed in place.
    """
    place = hue_place(p)
    ends = torch.searchsorted(place, torch.arange(1, 5, device=place.device)).tolist()
    changed = ends[-1]  # samples from here on have no jitter
    if not changed:
        return x
    mixtures = _MIXTURES.to(place.device)[p.order[:changed]]  # (n, 3)
    start = 0
    for turn in range(4):
        shift_hue(x[start : ends[turn]], p.hue[start : ends[turn]])
        start = ends[turn]
        if turn < 3:
            _mix(x[:changed], mixtures[:, turn], p)
    return x


def shift_hue(x: Tensor, hue: Tensor) -> Tensor:
    """Turn the colour circle of HSV by `hue` turns: (N, 3, H, W) in place; other C untouched."""
    if x.shape[1] != 3 or not len(x):
        return x
    r, g, b = x.unbind(1)  # (N, H, W)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # The hue in sixths of a turn; without chroma it is anything, and is 0.
    is_r, is_g = r == value, g == value
    difference = torch.where(is_r, g - b, torch.where(is_g, b - r, r - g))
    h = difference.div_(chroma.clamp(min=1e-12))
    h += torch.where(is_r, 0.0, torch.where(is_g, 2.0, 4.0))
    h += hue.view(-1, 1, 1) * 6
    h -= torch.floor(h / 6).mul_(6)  # [0, 6)
    # Each primary is at full value within a sixth of its own hue and away from it by a third.
    torch.sub(value, (2 - (h - 3).abs_()).clamp_(0, 1).mul_(chroma), out=r)
    torch.sub(value, (h - 2).abs_().sub_(1).clamp_(0, 1).mul_(chroma), out=g)
    torch.sub(value, (h - 4).abs_().sub_(1).clamp_(0, 1).mul_(chroma), out=b)
    return x


def greyscale(x: Tensor, which: Tensor) -> Tensor:
    """Take the colour from some samples, in place: (N, 3, H, W), (N,) bool."""
    index = which.nonzero()[:, 0]
    if x.shape[1] == 3 and len(index):
        x[index] = luminance(x[index]).expand(-1, 3, -1, -1)
    return x


def solarise(x: Tensor, which: Tensor) -> Tensor:
    """Invert the values above one half of some samples, in place."""
    index = which.nonzero()[:, 0]
    if len(index):
        chosen = x[index]
        x[index] = torch.minimum(chosen, 1 - chosen)
    return x


def blur(x: Tensor, which: Tensor, sigma: Tensor) -> Tensor:
    """Blur some samples with their own Gaussians, in place, reflecting at the border."""
    index = which.nonzero()[:, 0]
    if len(index):
        size = x.shape[-1]
        band = _gaussian(sigma[index], size)[:, None]  # (n, 1, size, size)
        x[index] = torch.matmul(torch.matmul(band, x[index]), band.mT)
    return x


def luminance(x: Tensor) -> Tensor:
    """The grey of an image: (N, C, H, W) to (N, 1, H, W); of 3 channels Pillow's, else the mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, 1)
    return (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])


def _mix(x: Tensor, change: Tensor, p: Parameters) -> None:
    """Brightness, contrast or saturation: pixel, its grey and the mean grey, mixed and clamped."""
    n = len(change)
    saturates = change == _SATURATION
    if x.shape[1] != 3:
        saturates = torch.zeros_like(saturates)
    factor = torch.where(
        change == _BRIGHTNESS,
        p.brightness[:n],
        torch.where(change == _CONTRAST, p.contrast[:n], 1.0),
    )
    factor = torch.where(saturates, p.saturation[:n], factor)
    grey = luminance(x)  # (n, 1, H, W)
    mean = grey.mean((1, 2, 3)) * (1 - factor) * (change == _CONTRAST)  # (n,)
    grey *= ((1 - factor) * saturates).view(-1, 1, 1, 1)
    grey += mean.view(-1, 1, 1, 1)
    x.mul_(factor.view(-1, 1, 1, 1)).add_(grey).clamp_(0, 1)


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """(N, size, size): what each blurred pixel of a line takes from each pixel."""
    radius = min(size - 1, int(4 * float(sigma.max()) + 0.5))
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel /= kernel.sum(1, keepdim=True)  # (N, taps)
    line = torch.arange(size, device=sigma.device, dtype=torch.float32)[None]
    source = pad(line, (radius, radius), mode="reflect")[0].long()  # (size + 2 radius,)
    band = torch.zeros(len(sigma), size, size, device=sigma.device)
    rows = torch.arange(size, device=sigma.device)
    for tap in range(2 * radius + 1):
        band[:, rows, source[rows + tap]] += kernel[:, tap, None]
    return band
