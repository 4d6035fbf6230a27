"""The preprocessing of every image that a trained encoder sees."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from barlow.data.decode import from_pil
from barlow.errors import UserError
from barlow.views.settings import default_mean_std

_STRIP = 32  # aspect ratio above which an image's ends are cut off before it is magnified
_IN_CACHE = 2**18  # floats (1 MB) that stay in a core's cache from one operation to the next


class Preprocess(nn.Module):
    """Resize the shorter side, crop the centre, normalise; nothing random, nothing learnt.

    Args:
        image_size: height and width of the output in pixels.
        mean: mean of each channel on the scale from 0 to 1. Default: ImageNet's for 3 channels,
            else 0.5.
        std: standard deviation of each channel. Default: ImageNet's for 3 channels, else 0.25.
        in_chans: number of image channels.

    Raises:
        ValueError: if `image_size` is below 1, or `mean` or `std` does not have one number per
            channel.

    Example:
        >>> Preprocess(32)(torch.zeros(5, 3, 48, 64, dtype=torch.uint8)).shape
        torch.Size([5, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_chans: int = 3,
    ) -> None:
        """See the class."""
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: it must be at least 1")
        if mean is None:
            mean, _ = default_mean_std(in_chans)
        if std is None:
            _, std = default_mean_std(in_chans)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != in_chans:
                raise ValueError(f"{name} has {len(values)} numbers for {in_chans} channels")
        self.image_size = image_size
        self.in_chans = in_chans
        # mean and std are not buffers, so that an encoder's state_dict holds only what was learnt.
        self.mean = tuple(float(m) for m in mean)
        self.std = tuple(float(s) for s in std)

    def forward(self, images: Tensor | Image.Image) -> Tensor:
        """A PIL image or uint8 (C, H, W) to float32 (C, S, S); a uint8 batch to a float32 batch."""
        if isinstance(images, Image.Image):
            images = from_pil(images, self.in_chans)
        batch = images if images.ndim == 4 else _alone(images)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != self.in_chans:
            raise ValueError(
                f"got {images.dtype} {tuple(images.shape)}, expected uint8 "
                f"({self.in_chans}, H, W) or (N, {self.in_chans}, H, W)"
            )
        # torch resizes uint8 with antialiasing on the CPU only.
        batch = self.normalise(self._square(batch)) if batch.is_cpu else self.prepare(batch)
        return batch if images.ndim == 4 else batch[0]

    def square(self, image: Tensor) -> Tensor:
        """Resize and crop one image on the CPU: uint8 (C, H, W) to uint8 (1, C, S, S)."""
        return self._square(_alone(image))

    def _square(self, batch: Tensor) -> Tensor:
        """Resize and crop, rounding to whole grey levels as Pillow does: uint8 (N, C, S, S)."""
        size = self.image_size
        if min(batch.shape[-2:]) != size:
            sides, short = self._sides(batch), min(batch.shape[-2:])
            if short < size and max(batch.shape[-2:]) > _STRIP * short:
                batch, sides = _middle(batch, sides)
            batch = F.interpolate(batch, sides, mode="bilinear", antialias=True)
        top, left = ((side - size) // 2 for side in batch.shape[-2:])
        return batch[:, :, top : top + size, left : left + size]

    def normalise(self, squares: Tensor) -> Tensor:
        """The last step alone: uint8 (N, C, S, S) on the CPU to float32, channels last."""
        size = self.image_size
        rows = squares.permute(0, 2, 3, 1).flatten(2)  # (N, S, S * C)
        mean, std = (torch.tensor(v).mul_(255).repeat(size) for v in (self.mean, self.std))
        out = torch.empty(rows.shape)
        images = max(1, _IN_CACHE // rows.shape[1:].numel())
        for pixels, some in zip(torch.split(rows, images), torch.split(out, images), strict=True):
            some.copy_(pixels).sub_(mean).div_(std)
        return out.view(-1, size, size, self.in_chans).permute(0, 3, 1, 2)

    def prepare(self, batch: Tensor) -> Tensor:
        """`forward` in float32 throughout, on any device; traceable for images of any size.

        An image that is resized differs from that of `forward` by its rounding, at most one grey
        level; one whose shorter side already fits does not differ.

        Args:
            batch: uint8 (N, C, H, W).

        Returns:
            float32 (N, C, S, S).
        """
        sides, batch = self._sides(batch), batch.float()
        batch = F.interpolate(batch, sides, mode="bilinear", antialias=True)
        # By index, because tracing cannot decide whether a slice would cover the whole side.
        rows, columns = (
            torch.arange(self.image_size, device=batch.device) + (side - self.image_size) // 2
            for side in batch.shape[-2:]
        )
        batch = batch.index_select(2, rows).index_select(3, columns)
        mean, std = (batch.new_tensor(v)[:, None, None] * 255 for v in (self.mean, self.std))
        return (batch - mean) / std

    def _sides(self, batch: Tensor) -> list[int]:
        """Height and width to resize to: the shorter one becomes `image_size`."""
        short: Any = torch.sym_min(*batch.shape[-2:])
        # Integer arithmetic, rounding half up, because the rounding of a float cannot be traced.
        return [(2 * side * self.image_size + short) // (2 * short) for side in batch.shape[-2:]]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments: `Preprocess(**p.to_dict())` is equivalent."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "in_chans": self.in_chans,
        }

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.image_size}, mean={self.mean}, std={self.std}, in_chans={self.in_chans}"


def preprocess_of(encoder: nn.Module) -> Preprocess:
    """The preprocessing that belongs to an encoder; a UserError if it has none."""
    preprocess = getattr(encoder, "preprocess", None)
    if not isinstance(preprocess, Preprocess):
        raise UserError(
            f"this {type(encoder).__name__} has no preprocess: load it with barlow.load_encoder, "
            "or set encoder.preprocess = barlow.data.Preprocess(image_size, mean=..., std=...)"
        )
    return preprocess


def _alone(image: Tensor) -> Tensor:
    """(C, H, W) as a batch of one.

    The batch axis gets the stride that it has in a larger batch: if a pixel's channels are next to
    each other in memory, torch then resizes them together, in half the time.
    """
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2) if image.ndim == 3 else image


def _middle(batch: Tensor, sides: list[int]) -> tuple[Tensor, list[int]]:
    """Cut the ends off a strip; return the rest and the sides to resize it to.

    For a square of 224, an uncut strip of 2 x 50,000 pixels would be resized to 224 x 5.6 million.
    """
    axis = 2 if batch.shape[2] > batch.shape[3] else 3
    long, short, resized = batch.shape[axis], min(batch.shape[2:]), sides[axis - 2]
    most = (long - _STRIP // 2 * short) // 2

    def off(ends: int) -> int:
        """How far a cut after `ends` old pixels is from an edge between two new pixels."""
        return abs((ends * resized + long // 2) % long - long // 2)

    ends = min(range(most, most - _STRIP // 4 * short, -1), key=off)
    sides = list(sides)
    sides[axis - 2] -= 2 * ((2 * ends * resized + long) // (2 * long))
    return batch.narrow(axis, ends, long - 2 * ends), sides
