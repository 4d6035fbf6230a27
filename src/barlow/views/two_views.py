"""The module that turns a batch of images into two batches of views."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from barlow import address
from barlow.errors import UserError
from barlow.views import colour, geometry
from barlow.views.settings import ViewSettings, view_settings

_CROP, _PIXELS, _NOISE = range(3)  # streams of random numbers, one key each
_CHUNK = 2**17  # pixels a thread works on at a time: their planes of floats stay in its cache


class TwoViews(nn.Module):
    """Draw two views of every image, each from its own distribution, on whole batches.

    A sample's views depend on the key, its position and its pixels, and on nothing else: not on
    the rest of the batch, not on earlier draws.

    Args:
        image_size: pixels of each side of a view.
        preset: a name in `barlow.views.PRESETS`; `paper` is Zbontar et al. 2021, appendix A.
        in_chans: channels of the images. Colour changes need 3, brightness and contrast take 1
            too; with other counts they are left out. Geometry, blur and noise apply always.
        mean: by channel, on the scale from 0 to 1; None is ImageNet's for 3 channels, else 0.5.
        std: the same; None is ImageNet's for 3 channels, else 0.25.
        view1: fields of the first view's `ViewSettings` to replace.
        view2: the same for the second view.

    Raises:
        UserError: no such preset or field, or a value out of range.

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
            raise UserError(f"no view has image_size={image_size} and in_chans={in_chans}")
        if mean is None:
            mean = (0.485, 0.456, 0.406) if in_chans == 3 else (0.5,) * in_chans
        if std is None:
            std = (0.229, 0.224, 0.225) if in_chans == 3 else (0.25,) * in_chans
        if len(mean) != in_chans or len(std) != in_chans or min(std) <= 0:
            raise UserError(
                f"mean and std need {in_chans} numbers each, std above 0: not {mean} and {std}"
            )
        self.image_size = image_size
        self.in_chans = in_chans
        self.settings = view_settings(preset, view1, view2)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, *, key: int | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw both views of a batch.

        Args:
            images: `(N, C, H, W)` uint8, on any device.
            key: from `barlow.address.key`; None draws one from torch's global generator.
            position: `(N,)` int64, where each sample stands; None is 0, 1, 2, ...

        Returns:
            Two batches `(N, C, image_size, image_size)` float32, normalised, channels last.

        Raises:
            UserError: images of another type or number of channels.
        """
        if key is None:
            key = int(torch.randint(2**63 - 1, ()))
        if position is None:
            position = torch.arange(len(images))
        return self.finish(*self.crop(images, key, position), key, position)

    def crop(
        self, images: Tensor | Sequence[Tensor], key: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Crop, resize and flip: the half that a loader's worker does where it decodes.

        Args:
            images: `(N, C, H, W)` uint8, or a sequence of `(C, H, W)` uint8 of any sizes.
            key: from `barlow.address.key`.
            position: `(N,)` int64.

        Returns:
            Two batches `(N, C, image_size, image_size)`, uint8, or float32 in 0 to 1 where a
            batch of images up to 64 pixels was given.

        Raises:
            UserError: images of another type or number of channels.
        """
        for image in images[:1] if isinstance(images, Tensor) else images:
            if image.dtype != torch.uint8 or image.shape[:-2] != (self.in_chans,):
                raise UserError(
                    f"views are drawn from uint8 images of {self.in_chans} channels, not from "
                    f"{tuple(image.shape)} {image.dtype}: set in_chans, or convert the images"
                )
        if isinstance(images, Tensor):
            sizes = torch.tensor([images.shape[-2:]])  # (1, 2)
        else:
            sizes = torch.tensor([image.shape[-2:] for image in images]).view(-1, 2)  # (N, 2)
        position = position.cpu()
        boxes = [
            geometry.crop_boxes(
                settings, address.key(key, view, _CROP), position, sizes[:, 0], sizes[:, 1]
            )
            for view, settings in enumerate(self.settings)
        ]
        crops1, crops2 = geometry.crop(images, boxes, self.image_size)
        return crops1, crops2

    def finish(
        self, crops1: Tensor, crops2: Tensor, key: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do everything that comes after the crop, on whole batches.

        Args:
            crops1: `(N, C, image_size, image_size)`, from `crop`.
            crops2: the same.
            key: the key given to `crop`.
            position: the positions given to `crop`.

        Returns:
            Two batches `(N, C, image_size, image_size)` float32, normalised, channels last.
        """
        position = position.cpu()
        view1 = self._finish(0, crops1, key, position)
        return view1, self._finish(1, crops2, key, position)

    def _finish(self, view: int, crops: Tensor, key: int, position: Tensor) -> Tensor:
        settings = self.settings[view]
        n, _, size, _ = crops.shape
        out = torch.empty(crops.shape, device=crops.device, memory_format=torch.channels_last)
        draws = address.uniform(address.key(key, view, _PIXELS), position, 20)
        noise_key = address.key(key, view, _NOISE)
        step = n
        if crops.device.type == "cpu":
            step = max(1, _CHUNK * torch.get_num_threads() // size**2)
        for part in (slice(i, i + step) for i in range(0, n, step)):
            self._finish_part(
                settings, crops[part], draws[part], noise_key, position[part], out[part]
            )
        return out

    def _finish_part(
        self,
        settings: ViewSettings,
        crops: Tensor,
        draws: Tensor,
        noise_key: int,
        position: Tensor,
        out: Tensor,
    ) -> None:
        """Fill `out` with the finished views of `crops`, both `(n, C, S, S)`."""
        c, size = crops.shape[1:3]
        device = crops.device
        coloured = settings.jitter > 0 and c in (1, 3)
        jittered = draws[:, 0] < settings.jitter
        factors, hue, order = colour.jitter_parameters(settings, draws[:, 1:9])
        # Sorted by where the hue comes, every colour step below takes one slice of the batch.
        rank = colour.sort_key(order, jittered).argsort(stable=True) if coloured else None
        x = crops.transpose(0, 1)  # (C, n, S, S), as the batched crop has it in memory
        if rank is not None:
            draws, position = draws[rank], position[rank]
            jittered, factors, hue, order = jittered[rank], factors[rank], hue[rank], order[rank]
            x = x.index_select(1, rank.to(device))
        x = x.float().div_(255) if x.dtype == torch.uint8 else x
        if settings.turns:
            x = geometry.turn(x.transpose(0, 1), settings, draws[:, 15:20]).transpose(0, 1)
        planes = x.reshape(c, -1, size * size)  # (C, n, P)
        if planes.data_ptr() == crops.data_ptr():
            planes = planes.clone()  # everything below works in place

        def drawn(column: int, probability: float) -> Tensor:
            return (draws[:, column] < probability).nonzero()[:, 0]

        def between(some: Tensor, column: int, span: tuple[float, float]) -> Tensor:
            return (span[0] + (span[1] - span[0]) * draws[some, column])[:, None].to(device)

        if coloured:
            colour.jitter(planes, factors, hue, order, jittered)
        if c == 3 and len(some := drawn(9, settings.greyscale)):
            colour.to_grey(planes, some.to(device))
        if len(some := drawn(10, settings.blur)):
            sigma = between(some, 11, settings.blur_sigma)
            reach = int(4 * settings.blur_sigma[1] + 0.999)
            colour.blur(planes, some.to(device), sigma, size, reach)
        if len(some := drawn(12, settings.solarise)):
            colour.solarise(planes, some.to(device), settings.solarise_threshold)
        if len(some := drawn(13, settings.noise)):
            std = between(some, 14, settings.noise_std)
            colour.add_noise(planes, some.to(device), std, noise_key, position[some])
        torch.addcmul(-self.mean / self.std, planes, 1 / self.std, out=planes)
        rows = out.permute(0, 2, 3, 1).view(-1, size * size, c)  # channels last in memory
        if rank is None:
            rows.copy_(planes.permute(1, 2, 0))
        else:
            back = torch.empty_like(rank).scatter_(0, rank, torch.arange(len(rank)))
            sorted_rows = planes.permute(1, 2, 0).contiguous()
            torch.index_select(sorted_rows, 0, back.to(device), out=rows)
