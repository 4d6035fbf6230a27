"""Where a view's pixels come from: crop, resize, flip; then rotation, shift, zoom and shear."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from barlow import address
from barlow.views.settings import ViewSettings

_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten, then crops the middle
_CROP = 0  # stream of random numbers; those of the steps after the crop are in `two_views`
_BATCHED_UP_TO = 64  # pixels a side; above, dense weight matrices cost more than a call per image


def crop_boxes(
    settings: ViewSettings, key: int, position: Tensor, height: Tensor, width: Tensor
) -> Tensor:
    """Draw crops as torchvision's `RandomResizedCrop` does, and flips, for every sample at once.

    Args:
        settings: the view's distribution.
        key: this view's key.
        position: `(N,)` int64 on the CPU.
        height: `(N,)` or `()` pixels of each image.
        width: the same.

    Returns:
        `(N, 6)` int64: top, left, height, width, flipped left to right, flipped upside down.
    """
    n = len(position)
    draws = address.uniform(key, position, 2 * _ATTEMPTS + 4).double()
    height, width = height.double().expand(n)[:, None], width.double().expand(n)[:, None]
    low, high = settings.crop_scale
    area = height * width * (low + (high - low) * draws[:, :_ATTEMPTS])  # (N, attempts)
    low, high = (math.log(r) for r in settings.crop_ratio)
    ratio = (low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS]).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # argmax returns the first of equal values
    failed = ~fits.any(1, keepdim=True)
    whole_w = torch.minimum(width, (height * settings.crop_ratio[1]).round())
    whole_h = torch.minimum(height, (width / settings.crop_ratio[0]).round())
    w = torch.where(failed, whole_w, w.gather(1, first))  # (N, 1)
    h = torch.where(failed, whole_h, h.gather(1, first))
    place = draws[:, 2 * _ATTEMPTS :]
    top = torch.where(failed, (height - h) / 2, place[:, 0:1] * (height - h + 1)).floor()
    left = torch.where(failed, (width - w) / 2, place[:, 1:2] * (width - w + 1)).floor()
    mirrored = place[:, 2:3] < settings.horizontal_flip
    upside_down = place[:, 3:4] < settings.vertical_flip
    return torch.cat([top, left, h, w, mirrored.double(), upside_down.double()], 1).long()


def view_boxes(
    settings: Sequence[ViewSettings], key: int, position: Tensor, sizes: Tensor
) -> list[Tensor]:
    """Draw the crops and flips of every view.

    `TwoViews` and the loader's workers both draw here, so that an image gets the same views
    whether it is held in memory or streamed.

    Args:
        settings: the distribution of each view.
        key: from `barlow.address.key`; each view derives its own from it.
        position: `(N,)` int64 on the CPU.
        sizes: `(N, 2)` height and width of each image, or `(1, 2)` if all have the same.

    Returns:
        For each view `(N, 6)` from `crop_boxes`.
    """
    height, width = sizes.T
    return [
        crop_boxes(distribution, address.key(key, view, _CROP), position, height, width)
        for view, distribution in enumerate(settings)
    ]


def crop_one(image: Tensor, box: Tensor, size: int) -> Tensor:
    """Crop, resize and flip one image, uint8 in and out.

    Args:
        image: `(C, H, W)` uint8.
        box: `(6,)` from `crop_boxes`.
        size: pixels of each side of the result.

    Returns:
        `(C, size, size)` uint8.
    """
    top, left, h, w, mirrored, upside_down = box.tolist()
    part = image[:, top : top + h, left : left + w]
    if (h, w) != (size, size):
        # torch resizes uint8 with antialiasing on the CPU only.
        pixels = part[None] if part.is_cpu else part[None].float()
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        part = (pixels if part.is_cpu else pixels.round_().to(torch.uint8))[0]
    axes = [axis for axis, on in ((1, upside_down), (2, mirrored)) if on]
    return part.flip(axes) if axes else part


def crop_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop, resize and flip a batch of small images.

    Resizing along one axis is a product with a matrix of interpolation weights, and the weights
    include the crop and the flip, so all this takes two batched matrix products.

    Args:
        images: `(N, C, H, W)` uint8.
        boxes: `(N, 6)` from `crop_boxes`.
        size: pixels of each side of the result.

    Returns:
        `(C, N, size, size)` float32 in 0 to 1.
    """
    n, c, height, width = images.shape
    boxes = to_device(boxes, images.device)
    rows = _weights(boxes[:, 0], boxes[:, 2], boxes[:, 5], height, size, 1 / 255).mT
    columns = _weights(boxes[:, 1], boxes[:, 3], boxes[:, 4], width, size)  # (N, W, size)
    planes = images.to(torch.float32, memory_format=torch.contiguous_format)
    half = planes.view(n, c * height, width) @ columns
    half = half.view(n, c, height, size)
    out = half.new_empty(c, n, size, size)
    for channel in range(c):
        torch.bmm(rows, half[:, channel], out=out[channel])
    return out


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; copied to a GPU from pinned memory, so that nothing has to wait."""
    if device.type == "cuda" and x.is_cpu:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def fits_batched_crop(images: Tensor | Sequence[Tensor], size: int) -> bool:
    """Whether to crop with `crop_batch`: one tensor, images and crops of up to 64 pixels a side."""
    return isinstance(images, Tensor) and max(*images.shape[-2:], size) <= _BATCHED_UP_TO


def crop(images: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> list[Tensor]:
    """Crop a batch, or images of different sizes, several views at once.

    Args:
        images: `(N, C, H, W)` uint8, or a sequence of `(C, H, W)` uint8.
        boxes: for each view, `(N, 6)` from `crop_boxes`.
        size: pixels of each side of the result.

    Returns:
        For each view `(N, C, size, size)`: float32 in 0 to 1 where the images are a batch of
        small ones (up to 64 pixels), uint8 otherwise.
    """
    if isinstance(images, Tensor) and fits_batched_crop(images, size):
        with torch.autocast(images.device.type, enabled=False):
            return [crop_batch(images, box, size).transpose(0, 1) for box in boxes]
    return [
        torch.stack([crop_one(image, one, size) for image, one in zip(images, box, strict=True)])
        for box in boxes
    ]


def _weights(
    start: Tensor, length: Tensor, flipped: Tensor, source: int, size: int, total: float = 1.0
) -> Tensor:
    """Antialiased bilinear weights from `source` pixels to `size`: `(N, source, size)`.

    The triangle filter of PIL and of torch's `antialias=True`: as wide as the shrinking factor,
    never narrower than a pixel, cut off at the crop's edge and normalised to `total`.
    """
    device = start.device
    factor = (length / size)[:, None]  # (N, 1)
    out = torch.arange(size, device=device)
    out = torch.where(flipped[:, None] != 0, size - 1 - out, out)  # (N, size)
    first, last = start[:, None], (start + length - 1)[:, None]
    centre = (out + 0.5) * factor + (first - 0.5)  # in pixels of the source
    pixel = torch.arange(source, device=device, dtype=torch.float32)[:, None]
    if source <= size:  # nothing shrinks; beyond the centre of an edge pixel, only that one counts
        distance = (pixel - centre.clamp(first, last)[:, None]).abs_()  # (N, source, size)
        return torch.rsub(distance, total, alpha=total).clamp_(min=0)
    distance = (pixel - centre[:, None]).mul_(1 / factor.clamp(min=1)[:, None]).abs_()
    weights = torch.rsub(distance, 1).clamp_(min=0)
    weights *= (pixel >= first[:, None]) & (pixel <= last[:, None])
    return weights.div_(weights.sum(1, keepdim=True).div_(total))


def affine(images: Tensor, settings: ViewSettings, draws: Tensor) -> Tensor:
    """Rotate, shift, magnify and shear about the middle, in torchvision's `affine` convention.

    Args:
        images: `(N, C, S, S)` float.
        settings: the view's distribution.
        draws: `(N, 5)` uniform numbers: angle, right, down, zoom, shear.

    Returns:
        `(N, C, S, S)` float, bilinearly sampled.
    """
    sides = 2 * draws - 1
    angle = torch.deg2rad(sides[:, 0] * settings.rotation)
    shear = torch.deg2rad(sides[:, 4] * settings.shear)
    low, high = settings.zoom
    zoom = low + (high - low) * draws[:, 3]
    # torchvision shifts by whole pixels; in units of the grid, the image is 2 wide.
    size = images.shape[-1]
    right, down = ((sides[:, i] * settings.translation * size).round() * 2 / size for i in (1, 2))
    cos, sin = angle.cos(), angle.sin()
    # Forward: p' = R(angle) [[1, -tan(shear)], [0, 1]] zoom p + shift. The grid is its inverse.
    a, b, c, d = cos / zoom, sin / zoom, -sin / zoom, cos / zoom
    a, b = a + shear.tan() * c, b + shear.tan() * d
    theta = torch.stack([a, b, -(a * right + b * down), c, d, -(c * right + d * down)], 1).view(
        -1, 2, 3
    )
    theta = to_device(theta, images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=settings.border, align_corners=False)
