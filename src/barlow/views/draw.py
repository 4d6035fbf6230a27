"""A picture of images and their two views."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from barlow.atomic import write_atomically
from barlow.errors import UserError
from barlow.views.two_views import TwoViews

_GAP = 8  # pixels between pictures
_CAPTION = 18  # pixels above a column
_CAPTIONS = ("original", "view 1", "view 2")


def draw_views(
    images: Tensor | Sequence[Tensor], views: TwoViews, out: Path | str, key: int = 0
) -> Path:
    """Draw images and both views of each, one image per row, as a PNG.

    Args:
        images: `(N, C, H, W)` uint8, or a sequence of `(C, H, W)` uint8 of any sizes.
        views: draws the views; the picture shows them before normalisation.
        out: file to write, written whole or not at all; its folder is created if needed.
        key: random key of the views.

    Returns:
        `out` as a path.

    Raises:
        UserError: if the images have another type or number of channels, or `out` is a folder.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a PNG file in it, such as {out / 'views.png'}")
    # Small views are magnified by a whole number, so that their pixels can be seen.
    cell = views.image_size * max(1, 96 // views.image_size)
    width = len(_CAPTIONS) * (cell + _GAP) + _GAP
    height = _CAPTION + len(images) * (cell + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(_CAPTIONS):
        pen.text((_GAP + column * (cell + _GAP), 4), caption, fill="black")
    for row, shown in enumerate(with_views(images, views, key)):
        for column, pixels in enumerate(shown):
            drawn = picture(pixels, cell)
            left = _GAP + column * (cell + _GAP) + (cell - drawn.width) // 2
            top = _CAPTION + row * (cell + _GAP) + (cell - drawn.height) // 2
            sheet.paste(drawn, (left, top))
    write_atomically(out, lambda file: sheet.save(file, format="PNG"))
    return out


def with_views(
    images: Tensor | Sequence[Tensor], views: TwoViews, key: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each image, its first and its second view before normalisation: uint8 `(C, H, W)`."""
    position = torch.arange(len(images))
    mean, std = views.mean.cpu(), views.std.cpu()

    def to_uint8(view: Tensor) -> Tensor:
        return (view.cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)

    finished = views.finish(*views.crop(images, key, position), key, position)
    return [
        (image.cpu(), to_uint8(view1), to_uint8(view2))
        for image, view1, view2 in zip(images, *finished, strict=True)
    ]


def picture(pixels: Tensor, cell: int) -> Image.Image:
    """`(C, H, W)` uint8 as RGB that fits a square cell; if C is not 3, channel 0 in grey."""
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)
    whole = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    factor = cell / max(whole.size)
    size = [max(1, round(side * factor)) for side in whole.size]
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return whole.resize((size[0], size[1]), how)
