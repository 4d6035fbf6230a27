"""What every image goes through before a trained encoder sees it."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from barlow.data.decode import from_pil

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocess(nn.Module):
    """Resize the shorter side, crop the centre, normalise; nothing random, nothing learnt.

    Args:
        image_size: side of the square that comes out, in pixels.
        mean: mean of each channel on the scale 0 to 1; ImageNet's for 3 channels, else 0.5.
        std: standard deviation of each channel; ImageNet's for 3 channels, else 0.25.
        in_chans: channels of the images.

    Raises:
        ValueError: if `mean` or `std` does not have one number a channel.

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
            mean = IMAGENET_MEAN if in_chans == 3 else (0.5,) * in_chans
        if std is None:
            std = IMAGENET_STD if in_chans == 3 else (0.25,) * in_chans
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != in_chans:
                raise ValueError(f"{name} has {len(values)} numbers for {in_chans} channels")
        self.image_size = image_size
        self.in_chans = in_chans
        self.mean = tuple(float(m) for m in mean)
        self.std = tuple(float(s) for s in std)

    def forward(self, images: Tensor | Image.Image) -> Tensor:
        """A PIL image, uint8 (C, H, W) or (N, C, H, W); float32 of the same number of axes."""
        if isinstance(images, Image.Image):
            images = from_pil(images, self.in_chans)
        batch = images if images.ndim == 4 else images[None]
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != self.in_chans:
            raise ValueError(
                f"got {images.dtype} {tuple(images.shape)}, expected uint8 "
                f"({self.in_chans}, H, W) or (N, {self.in_chans}, H, W)"
            )
        batch = self._square(batch.float())  # (N, C, S, S)
        # mean and std are no buffers: an encoder's state_dict holds what was learnt, only.
        mean = batch.new_tensor(self.mean)[:, None, None] * 255
        std = batch.new_tensor(self.std)[:, None, None] * 255
        batch = (batch - mean) / std
        return batch if images.ndim == 4 else batch[0]

    def _square(self, batch: Tensor) -> Tensor:
        size, (height, width) = self.image_size, batch.shape[-2:]
        if min(height, width) != size:
            scale = size / min(height, width)
            height = max(size, round(height * scale))
            width = max(size, round(width * scale))
            batch = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
        top, left = (height - size) // 2, (width - size) // 2
        return batch[..., top : top + size, left : left + size]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments: `Preprocess(**p.to_dict())` is the same."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "in_chans": self.in_chans,
        }

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.image_size}, mean={self.mean}, std={self.std}, in_chans={self.in_chans}"
