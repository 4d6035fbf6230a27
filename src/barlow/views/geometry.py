"""Crop, resize, mirror, turn: resampling of whole batches."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from barlow.views.parameters import Parameters

Interpolation = Literal["bicubic", "bilinear"]


def resample(
    images: Tensor,
    box: Tensor,
    size: int,
    interpolation: Interpolation = "bilinear",
    hflip: Tensor | None = None,
    vflip: Tensor | None = None,
) -> Tensor:
    """Crop each image to its box and resize that, antialiased: two batched matrix products.

    Args:
        images: (N, C, H, W) uint8.
        box: (N, 4) top, left, height, width.
        size: height and width of the result.
        interpolation: the filter, as Pillow and torchvision define it.
        hflip: (N,) bool, which to mirror left and right.
        vflip: (N,) bool, which to mirror top and bottom.

    Returns:
        (N, C, size, size) float32 in [0, 1].
    """
    n, c, height, width = images.shape
    rows = weights(box[:, 0], box[:, 2], height, size, interpolation, vflip)  # (N, size, H)
    columns = weights(box[:, 1], box[:, 3], width, size, interpolation, hflip)  # (N, size, W)
    columns /= 255
    x = images.float().view(n, c * height, width)
    x = torch.bmm(x, columns.mT).view(n, c, height, size)
    x = torch.matmul(rows[:, None], x)  # (N, C, size, size)
    return x.clamp_(0, 1) if interpolation == "bicubic" else x  # bicubic overshoots


def weights(
    start: Tensor,
    length: Tensor,
    pixels: int,
    size: int,
    interpolation: Interpolation,
    flip: Tensor | None = None,
) -> Tensor:
    """What each of `size` new pixels takes from each of `pixels` old ones, along one axis.

    Args:
        start: (N,) first old pixel of the crop.
        length: (N,) old pixels of the crop.
        pixels: of the image.
        size: of the result.
        interpolation: the filter.
        flip: (N,) bool, which to mirror.

    Returns:
        (N, size, pixels) float32; each row sums to 1.
    """
    start, length = start.float()[:, None], length.float()[:, None]  # (N, 1)
    scale = length / size
    new = torch.arange(size, device=start.device) + 0.5
    place = new if flip is None else torch.where(flip[:, None], size - new, new)
    centre = start + place * scale  # (N, size)
    old = torch.arange(pixels, device=start.device) + 0.5
    # The filter is as wide as a new pixel, or an old one where those are larger.
    width = scale.clamp(min=1.0)
    distance = ((old - centre[..., None]) / width[..., None]).abs_()  # (N, size, pixels)
    w = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    inside = (old > start) & (old < start + length)  # (N, pixels)
    w *= inside[:, None]
    return w.div_(w.sum(-1, keepdim=True))


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each (square) image by its number of quarter turns against the clock, in place."""
    for k in range(1, 4):
        which = (turns == k).nonzero()[:, 0]
        if len(which):
            x[which] = x[which].rot90(k, (2, 3))
    return x


def move(x: Tensor, p: Parameters, fill: Literal["reflect", "zeros"]) -> Tensor:
    """Rotate, zoom and shift each image: one bilinear resampling.

    Args:
        x: (N, C, size, size).
        p: angle, zoom and shift.
        fill: what is seen beyond the border.

    Returns:
        (N, C, size, size).
    """
    cos, sin = p.angle.cos() / p.zoom, p.angle.sin() / p.zoom
    dx, dy = (p.shift * 2).unbind(1)  # a size is 2 units long in grid_sample
    theta = torch.stack(
        [cos, -sin, -(cos * dx - sin * dy), sin, cos, -(sin * dx + cos * dy)], 1
    ).view(-1, 2, 3)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    padding = "reflection" if fill == "reflect" else "zeros"
    return grid_sample(x, grid, padding_mode=padding, align_corners=False)


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1.0).clamp_(min=0.0)


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, as Pillow has it."""
    near = (t * 1.5 - 2.5) * t * t + 1.0
    far = ((t * -0.5 + 2.5) * t - 4.0) * t + 2.0
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
