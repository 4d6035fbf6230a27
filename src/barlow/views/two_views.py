"""The module that turns a batch of images into two batches of views."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from barlow import address
from barlow.distributed import rank
from barlow.errors import UserError
from barlow.views import colour, geometry
from barlow.views.settings import ViewSettings, default_mean_std, view_settings

_PIXELS, _NOISE = 1, 2  # streams of random numbers, one key each; 0 is the crop in `geometry`
_CHUNK = 100_000  # pixels that a thread works on at a time, so that their floats stay in its cache

Cut = Callable[[int, Tensor], Tensor]
"""Takes a view's index and sample indices; returns their crops as floats from 0 to 1,
`(C, n, S, S)`, in new memory."""


class TwoViews(nn.Module):
    """Draw two views of every image, each from its own distribution, on whole batches.

    The views of a sample depend only on the key, its position and its pixels: not on the rest of
    the batch, earlier draws or autocast.

    Args:
        image_size: height and width of a view in pixels.
        preset: a name in `barlow.views.PRESETS`; `paper` is Zbontar et al. 2021, appendix A.
        in_chans: number of image channels. Colour changes need 3 channels (brightness and contrast
            3 or 1) and are left out otherwise. Geometry, blur and noise apply to any number.
        mean: per channel, on the scale from 0 to 1. Default: ImageNet's for 3 channels, else 0.5.
        std: the same for the standard deviation. Default: ImageNet's for 3 channels, else 0.25.
        view1: fields of the first view's `ViewSettings` to replace.
        view2: fields of the second view's `ViewSettings` to replace.

    Raises:
        UserError: if there is no such preset or field, or a value is out of range.

    Example:
        >>> views = TwoViews(image_size=32, preset="small", view2={"solarise": 0.0})
        >>> images = torch.randint(0, 256, (4, 3, 40, 48), dtype=torch.uint8)
        >>> view1, view2 = views(images, key=0)
        >>> view1.shape, view1.dtype
        (torch.Size([4, 3, 32, 32]), torch.float32)
    """

    mean: Tensor
    std: Tensor

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
        """See the class."""
        super().__init__()
        if image_size < 1 or in_chans < 1:
            raise UserError(
                f"image_size={image_size} and in_chans={in_chans}: both must be at least 1"
            )
        if mean is None:
            mean, _ = default_mean_std(in_chans)
        if std is None:
            _, std = default_mean_std(in_chans)
        if len(mean) != in_chans or len(std) != in_chans or min(std) <= 0:
            raise UserError(
                f"mean and std need {in_chans} numbers each, with std above 0, not {mean} and {std}"
            )
        self.image_size = image_size
        self.in_chans = in_chans
        self.settings = view_settings(preset, view1, view2)
        self._scale = [1 / channel for channel in std]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, *, key: int | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw both views of a batch.

        Args:
            images: `(N, C, H, W)` uint8, on any device.
            key: from `barlow.address.key`. Default: drawn from torch's global generator, different
                on each rank of a process group.
            position: `(N,)` int64, the place of each sample in the epoch. Default 0, 1, 2, ...

        Returns:
            Two batches `(N, C, image_size, image_size)` float32, normalised, channels last.

        Raises:
            UserError: if the images have another type or number of channels.
        """
        if key is None:
            key = int(torch.randint(2**63 - 1, ()))
            if number := rank():
                key = address.key(key, number)  # all ranks have the same seed
        if position is None:
            position = torch.arange(len(images))
        if not geometry.fits_batched_crop(images, self.image_size):
            return self.finish(*self.crop(images, key, position), key, position)
        boxes = self._boxes(images, key, position)

        def cut(view: int, rows: Tensor) -> Tensor:
            chosen = images.index_select(0, geometry.to_device(rows, images.device))
            return geometry.crop_batch(chosen, boxes[view][rows], self.image_size)

        return self._both(cut, key, position, images.device)

    def crop(
        self, images: Tensor | Sequence[Tensor], key: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Crop, resize and flip: the part that a loader's worker does right after decoding.

        Args:
            images: `(N, C, H, W)` uint8, or a sequence of `(C, H, W)` uint8 of any sizes.
            key: from `barlow.address.key`.
            position: `(N,)` int64.

        Returns:
            Two batches `(N, C, image_size, image_size)`: uint8, or float32 from 0 to 1 if `images`
            is a batch of up to 64 pixels.

        Raises:
            UserError: if the images have another type or number of channels.
        """
        crops1, crops2 = geometry.crop(images, self._boxes(images, key, position), self.image_size)
        return crops1, crops2

    def _boxes(self, images: Tensor | Sequence[Tensor], key: int, position: Tensor) -> list[Tensor]:
        for image in images[:1] if isinstance(images, Tensor) else images:
            if image.dtype != torch.uint8 or image.shape[:-2] != (self.in_chans,):
                raise UserError(
                    f"expected uint8 images of {self.in_chans} channels, got "
                    f"{tuple(image.shape)} {image.dtype}: set in_chans, or convert the images"
                )
        if isinstance(images, Tensor):
            sizes = torch.tensor([images.shape[-2:]])  # (1, 2)
        else:
            sizes = torch.tensor([image.shape[-2:] for image in images]).view(-1, 2)  # (N, 2)
        return geometry.view_boxes(self.settings, key, position.cpu(), sizes)

    def finish(
        self, crops1: Tensor, crops2: Tensor, key: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply everything that comes after the crop, on whole batches.

        Args:
            crops1: `(N, C, image_size, image_size)`, the first views from `crop`.
            crops2: the second views from `crop`.
            key: the key given to `crop`.
            position: the positions given to `crop`.

        Returns:
            Two batches `(N, C, image_size, image_size)` float32, normalised, channels last.
        """
        crops = (crops1, crops2)

        def cut(view: int, rows: Tensor) -> Tensor:
            on_device = geometry.to_device(rows, crops1.device)
            chosen = crops[view].index_select(0, on_device).transpose(0, 1)
            planes = chosen.to(torch.float32, memory_format=torch.contiguous_format)
            return planes.div_(255) if chosen.dtype == torch.uint8 else planes

        return self._both(cut, key, position, crops1.device)

    def _both(
        self, cut: Cut, key: int, position: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        n, c, size = len(position), self.in_chans, self.image_size
        views = torch.empty(2, n, size, size, c, device=device)
        with torch.autocast(device.type, enabled=False):
            for view, out in enumerate(views):
                self._finish(view, cut, key, position.cpu(), out.view(n, size * size, c))
        view1, view2 = views.permute(0, 1, 4, 2, 3)
        return view1, view2

    def _finish(self, view: int, cut: Cut, key: int, position: Tensor, out: Tensor) -> None:
        """Draw one view into `out`: `(N, P, C)`, which is channels last."""
        settings, device = self.settings[view], out.device
        n, c, size = len(position), self.in_chans, self.image_size
        draws = address.uniform(address.key(key, view, _PIXELS), position, 20)
        order, changes = torch.arange(n), None
        if settings.jitter > 0 and c in (1, 3):
            changes = colour.draw_jitter(settings, draws[:, :9])
            order = changes.ahead.argsort(stable=True)  # as `colour.jitter` requires
            changes = changes.take(order)
            changes = changes._replace(
                blends=geometry.to_device(changes.blends, device),
                hue=geometry.to_device(changes.hue, device),
            )
        draws, position = draws[order], position[order]
        noise_key = address.key(key, view, _NOISE)
        step = n
        if device.type == "cpu":
            step = max(1, _CHUNK * torch.get_num_threads() // size**2)
        for part in (slice(start, start + step) for start in range(0, n, step)):
            rows = order[part]
            planes = cut(view, rows)
            if settings.needs_affine:
                images = geometry.affine(planes.transpose(0, 1), settings, draws[part, 15:20])
                planes = images.transpose(0, 1).contiguous()
            planes = planes.view(c, len(rows), size * size)
            if changes is not None:
                colour.jitter(planes, changes.take(part))
            self._change(settings, planes, draws[part], noise_key, position[part])
            self._normalise(planes, rows, out)

    def _change(
        self,
        settings: ViewSettings,
        planes: Tensor,
        draws: Tensor,
        noise_key: int,
        position: Tensor,
    ) -> None:
        """Apply what follows the colour changes, in place on `(C, n, P)`."""
        device = planes.device

        def drawn(column: int, probability: float) -> Tensor:
            if not probability:
                return draws.new_empty(0, dtype=torch.int64)
            return (draws[:, column] < probability).nonzero()[:, 0]

        def select(samples: Tensor) -> colour.Samples:
            every = len(samples) == len(draws)
            return slice(None) if every else geometry.to_device(samples, device)

        def between(samples: Tensor, column: int, span: tuple[float, float]) -> Tensor:
            values = span[0] + (span[1] - span[0]) * draws[samples, column]
            return geometry.to_device(values[:, None], device)

        if len(planes) == 3 and len(samples := drawn(9, settings.greyscale)):
            colour.to_grey(planes, select(samples))
        if len(samples := drawn(10, settings.blur)):
            sigma = between(samples, 11, settings.blur_sigma)
            reach = int(4 * settings.blur_sigma[1] + 0.999)
            colour.blur(planes, select(samples), sigma, self.image_size, reach)
        if len(samples := drawn(12, settings.solarise)):
            colour.solarise(planes, select(samples), settings.solarise_threshold)
        if len(samples := drawn(13, settings.noise)):
            std = between(samples, 14, settings.noise_std)
            indices = geometry.to_device(samples, device)
            colour.add_noise(planes, indices, std, noise_key, position[samples])

    def _normalise(self, planes: Tensor, rows: Tensor, out: Tensor) -> None:
        """Normalise `(C, n, P)` into its rows of `out`: `(N, P, C)`, which is channels last."""
        alone = len(rows) == 1
        place = out[rows[0]][None] if alone else out.new_empty(len(rows), *out.shape[1:])
        shift = (-self.mean / self.std).flatten()
        # Writing to every C-th element is slower than writing to contiguous memory, but faster than
        # moving the data twice.
        for channel, plane in enumerate(planes):
            scale = self._scale[channel]
            torch.add(shift[channel], plane, alpha=scale, out=place[:, :, channel])
        if not alone:
            out.index_copy_(0, geometry.to_device(rows, out.device), place)
