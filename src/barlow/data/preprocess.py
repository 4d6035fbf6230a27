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
        batch = self.prepare(batch, resize=min(batch.shape[-2:]) != self.image_size)
        return batch if images.ndim == 4 else batch[0]

    def prepare(self, batch: Tensor, resize: bool) -> Tensor:
        """What `forward` does with a batch; can be traced for images of every size.

        Args:
            batch: uint8 (N, C, H, W).
            resize: leave it out where the shorter side is right.

        Returns:
            float32 (N, C, S, S).
        """
        size, batch = self.image_size, batch.float()
        if resize:
            short: Any = torch.sym_min(*batch.shape[-2:])
            # Whole numbers, rounded half up: a float's rounding cannot be traced.
            sides = [(2 * side * size + short) // (2 * short) for side in batch.shape[-2:]]
            batch = F.interpolate(batch, sides, mode="bilinear", antialias=True)
        top, left = ((side - size) // 2 for side in batch.shape[-2:])
        if resize:  # by index: whether a slice is the whole cannot be traced
            square = torch.arange(size, device=batch.device)
            batch = batch.index_select(2, square + top).index_select(3, square + left)
        else:
            batch = batch.narrow(2, top, size).narrow(3, left, size)
        # mean and std are no buffers: an encoder's state_dict holds what was learnt, only.
        mean = batch.new_tensor(self.mean)[:, None, None] * 255
        std = batch.new_tensor(self.std)[:, None, None] * 255
        return (batch - mean) / std

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
