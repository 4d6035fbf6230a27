"""Decode anything that holds an image to a uint8 tensor (C, H, W), or say why it is broken."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from barlow.data.files import read_bytes
from barlow.errors import UserError, one_line

# What a source stores for one image: a path, the bytes of an image file, pixels (H, W) or
# (H, W, C), or the tensor that `decode` returned for one of these.
Raw = str | bytes | np.ndarray[Any, Any] | Tensor

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; a larger image is treated as a decompression bomb
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".npy"),
)
UNREAD = (  # image formats that are not supported
    *(".heic", ".heif", ".jxl", ".psd", ".svg", ".exr", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
_NPY = b"\x93NUMPY"
_ORIENTATION = 0x0112  # the EXIF tag


class BrokenImage(Exception):
    """This one image cannot be read; the message says why."""


class Picture:
    """An opened image whose upright size is known; its pixels are read by `decode`."""

    def __init__(self, raw: Raw, in_chans: int = 3) -> None:
        """Read the header of `raw`; see `decode` for the arguments and what is raised."""
        self._in_chans = in_chans
        self._pixels: Tensor | None = None
        self._image: Image.Image | None = None
        with _reasons():
            if isinstance(raw, Tensor):
                self._pixels = raw
            elif isinstance(raw, np.ndarray):
                self._pixels = from_array(raw, in_chans)
            elif _is_npy(raw):
                self._pixels = from_array(_load_npy(raw), in_chans)
            elif in_chans not in (1, 3):
                with open_image(raw) as image:
                    self._pixels = from_array(_stack_pages(image), in_chans)
            else:
                self._image = open_image(raw)
                turned = _orientation(self._image) in (5, 6, 7, 8)
                width, height = self._image.size
                self.size = (width, height) if turned else (height, width)
        if self._pixels is not None:
            self.size = (self._pixels.shape[1], self._pixels.shape[2])

    @property
    def reducible(self) -> bool:
        """Whether the file can be decoded at a half, a quarter or an eighth of its size."""
        return self._image is not None and self._image.format in ("JPEG", "MPO")

    def decode(self, reduction: int = 1) -> Tensor:
        """The pixels, upright, uint8 (C, H, W); for a reducible file, H and W over `reduction`.

        Closes the file, so it can be called only once.
        """
        if self._pixels is not None:
            return self._pixels
        assert self._image is not None
        with _reasons(), self._image as image:
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            return from_pil(image, self._in_chans)


def decode(raw: Raw, in_chans: int = 3) -> Tensor:
    """Read one image.

    Args:
        raw: a path, the bytes of an image file, or an array (H, W) or (H, W, C).
        in_chans: 1 (grey), 3 (colour), or the number of bands of an array or multi-page TIFF.

    Returns:
        uint8 (in_chans, H, W), upright.

    Raises:
        BrokenImage: if it is empty, damaged, too large, or of other channels.

    Example:
        >>> decode(np.zeros((4, 6), np.uint8), in_chans=3).shape
        torch.Size([3, 4, 6])
    """
    return Picture(raw, in_chans).decode()


def max_16bit_value(raw: Raw, in_chans: int = 3) -> int | None:
    """The largest value of a 16-bit image; None for any other, whose file is not decoded.

    Raises:
        BrokenImage: if it cannot be read.

    Example:
        >>> images = np.full((4, 6), 4095, np.uint16), np.zeros((4, 6), np.uint8)
        >>> [max_16bit_value(image) for image in images]
        [4095, None]
    """
    with _reasons():
        if isinstance(raw, Tensor):
            return None
        if isinstance(raw, np.ndarray):
            array = raw
        elif _is_npy(raw):
            array = _load_npy(raw)
        else:
            with open_image(raw) as image:
                if not image.mode.startswith("I"):
                    return None
                array = _values(image) if in_chans in (1, 3) else _stack_pages(image)
        return int(array.max()) if array.dtype.kind in "iu" and _wide(array) else None


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a decoder raises (OSError, SyntaxError, struct.error...) into BrokenImage."""
    try:
        yield
    except (BrokenImage, UserError):
        raise
    except Exception as error:
        raise BrokenImage(_reason(error)) from None


def open_image(raw: str | bytes) -> Image.Image:
    """Read the header of an image file (size and mode, no pixels); refuse decompression bombs."""
    data = raw if isinstance(raw, bytes) else read_bytes(raw)
    if not data:
        raise BrokenImage("empty")
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"decompression bomb: more than {MAX_PIXELS} pixels") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise BrokenImage(f"decompression bomb: {size}, more than {MAX_PIXELS} pixels")
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" in data:
        image.load()  # the EXIF chunk comes after the pixels in the file
    return image


def _orientation(image: Image.Image) -> Any:
    """The image's EXIF orientation; 1, which is upright, if that cannot be read."""
    try:  # PngImageFile's own `getexif` would decode the pixels to look for EXIF after them
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # Pillow's readers raise exceptions of many types
        return 1


def from_pil(image: Image.Image, in_chans: int = 3) -> Tensor:
    """A PIL image, upright, as uint8 (in_chans, H, W); the first frame of an animation."""
    if in_chans not in (1, 3):
        return from_array(_stack_pages(image), in_chans)
    if _orientation(image) != 1:  # exif_transpose would copy even an upright image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return from_array(_values(image), in_chans)
    mode = "L" if in_chans == 1 else "RGB"
    if image.mode != mode:
        image = _without_alpha(image).convert(mode)
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, 3)
    return pixels[None] if in_chans == 1 else pixels.permute(2, 0, 1)


def from_array(array: np.ndarray[Any, Any], in_chans: int = 3) -> Tensor:
    """Pixels (H, W), (H, W, C) or (C, H, W) as uint8 (in_chans, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(_to_uint8(array)))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and _channels_last(pixels.shape, in_chans):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise BrokenImage(f"an array of shape {tuple(array.shape)} is not an image")
    if pixels.shape[0] == 1 and in_chans == 3:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 3 and in_chans == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as PIL's "L"
        grey = (pixels.float() * weights[:, None, None]).sum(0, keepdim=True)
        return grey.round_().to(torch.uint8)
    if pixels.shape[0] != in_chans:
        raise BrokenImage(f"{pixels.shape[0]} channels, expected {in_chans}")
    return pixels


def _channels_last(shape: torch.Size, in_chans: int) -> bool:
    first, _, last = shape
    if first == in_chans != last:
        return False
    return last in (1, in_chans) or first > last


def _to_uint8(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
        return array
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise BrokenImage(f"float values from {low:.3g} to {high:.3g}, expected 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
        return array
    if array.dtype.kind not in "iu" or low < 0 or high > 65535:
        raise BrokenImage(f"{array.dtype} values from {low} to {high}, expected 0 to 65535")
    # A fixed scale, not the image's own range: brightness must mean the same in every image.
    scale = 257 if _wide(array) else 1
    scaled: np.ndarray[Any, Any] = (array.astype(np.uint32) // scale).astype(np.uint8)
    return scaled


def _wide(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.itemsize == 2 or bool(array.size and array.max() > 255)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Put a transparent image on white: the colours under its transparency are arbitrary."""
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1].upper() + "A")
    if image.mode not in ("LA", "RGBA"):
        return image
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba)


def _stack_pages(image: Image.Image) -> np.ndarray[Any, Any]:
    pages = []
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        pages.append(_values(image))
    if len(pages) == 1:
        return pages[0]
    if any(page.ndim != 2 or page.shape != pages[0].shape for page in pages):
        raise BrokenImage("the pages are not greyscale images of the same size")
    return np.stack(pages, axis=-1)  # (H, W, pages)


def _values(image: Image.Image) -> np.ndarray[Any, Any]:
    """The pixels; those of a 16-bit image, which Pillow opens as int32 (mode "I"), as uint16."""
    array = np.asarray(image)
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)
    return array


def _is_npy(raw: str | bytes) -> bool:
    return raw.startswith(_NPY) if isinstance(raw, bytes) else raw.lower().endswith(".npy")


def _load_npy(raw: str | bytes) -> np.ndarray[Any, Any]:
    data = raw if isinstance(raw, bytes) else read_bytes(raw)
    array: np.ndarray[Any, Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if "cannot identify image file" in str(error):
        return "not an image"
    return one_line(error, 200)
