"""Every kind of image becomes the pixels a person would see, or says why it cannot."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from barlow.data.decode import BrokenImage, Picture, decode
from barlow.errors import UserError

HEIGHT, WIDTH = 20, 24


def picture() -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    waves = [np.sin(3 * x), np.cos(3 * y), np.sin(2 * (x + y))]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected() -> torch.Tensor:
    return torch.from_numpy(picture()).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("PPM", {}),
    ],
)
def test_lossless_files_keep_every_pixel(kind: str, options: dict) -> None:
    raw = encoded(Image.fromarray(picture()), kind, **options)
    assert torch.equal(decode(raw), expected())


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {})])
def test_lossy_files_keep_the_picture(kind: str, options: dict) -> None:
    raw = encoded(Image.fromarray(picture()), kind, **options)
    assert (decode(raw).int() - expected().int()).abs().float().mean() < 5


def test_a_path_and_its_bytes_are_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    assert torch.equal(decode(str(path)), decode(path.read_bytes()))


def test_grey_is_repeated_for_three_channels_and_colour_is_weighed_for_one() -> None:
    grey = Image.fromarray(picture()).convert("L")
    one, three = (decode(encoded(grey, "PNG"), in_chans=c) for c in (1, 3))
    assert one.shape == (1, HEIGHT, WIDTH)
    assert torch.equal(three, one.expand(3, -1, -1))
    from_colour = decode(encoded(Image.fromarray(picture()), "PNG"), in_chans=1)
    from_array = decode(picture(), in_chans=1)
    assert torch.equal(from_colour, one)
    assert (from_array.int() - one.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight(mode: str) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    if mode == "I;16B":
        raw = encoded(Image.fromarray(values.astype("<u2")), "TIFF", big_endian=True)
    elif mode == "I;16":
        raw = encoded(Image.fromarray(values.astype("<u2")), "PNG")
    else:
        raw = encoded(Image.fromarray(values.astype("<i4")), "TIFF")
    pixels = decode(raw, in_chans=1)[0]
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert (pixels.int() - torch.from_numpy(values / 257)).abs().max() < 1


def test_dark_sixteen_bit_images_stay_dark() -> None:
    dark = np.full((HEIGHT, WIDTH), 200, np.uint16)
    assert decode(encoded(Image.fromarray(dark), "PNG"), in_chans=1).max() == 0


def test_transparency_is_white() -> None:
    rgba = np.dstack([picture(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    rgba[:, : WIDTH // 2, 3] = 255
    pixels = decode(encoded(Image.fromarray(rgba), "PNG"))
    assert torch.equal(pixels[:, :, : WIDTH // 2], expected()[:, :, : WIDTH // 2])
    assert (pixels[:, :, WIDTH // 2 :] == 255).all()


def test_palette_images_show_their_colours() -> None:
    palette = Image.fromarray(picture()).quantize(16)
    shown = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(encoded(palette, "PNG")), shown)
    clear = decode(encoded(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert (clear[:, 0, 0] == 255).all()


def test_bilevel_images_are_black_and_white() -> None:
    pixels = decode(encoded(Image.fromarray(picture()).convert("1"), "PNG"))
    assert set(pixels.unique().tolist()) == {0, 255}


def test_cmyk_becomes_rgb() -> None:
    raw = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    assert (decode(raw).int() - expected().int()).abs().float().mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    # What a camera stores so that turning it as the tag says shows the picture.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(picture())
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(stored, "PNG", exif=exif)
    assert Picture(raw).size == (HEIGHT, WIDTH)
    assert torch.equal(decode(raw), expected())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "white")]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(raw) == 0).all()


def test_a_multi_page_tiff_is_a_multispectral_image() -> None:
    bands = [Image.fromarray(np.full((HEIGHT, WIDTH), 10 * i, np.uint8)) for i in range(5)]
    raw = encoded(bands[0], "TIFF", save_all=True, append_images=bands[1:])
    pixels = decode(raw, in_chans=5)
    assert pixels.shape == (5, HEIGHT, WIDTH)
    assert pixels[:, 0, 0].tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("axes", ["hwc", "chw"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_arrays_hold_any_number_of_channels(tmp_path: Path, axes: str, kind: type) -> None:
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[kind]
    bands = np.full((7, HEIGHT, WIDTH), 1.0) * np.arange(0, 252, 36)[:, None, None]
    array = (bands * scale).astype(kind)
    np.save(tmp_path / "a.npy", array if axes == "chw" else array.transpose(1, 2, 0))
    pixels = decode(str(tmp_path / "a.npy"), in_chans=7)
    assert pixels.shape == (7, HEIGHT, WIDTH)
    assert pixels[:, 3, 3].tolist() == list(range(0, 252, 36))


def test_a_reduced_jpeg_is_the_same_picture_smaller() -> None:
    large = Image.fromarray(picture()).resize((240, 200))
    whole, half = (Picture(encoded(large, "JPEG", quality=95)).decode(r) for r in (1, 2))
    assert half.shape == (3, 100, 120)
    averaged = torch.nn.functional.avg_pool2d(whole.float(), 2)
    assert (averaged - half).abs().mean() < 3


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a hundred bytes: only its header is written."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def numpy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (encoded(Image.fromarray(picture()), "PNG")[:200], "."),
        (encoded(Image.fromarray(picture()), "JPEG")[:300], "."),
        (bomb(), "decompression bomb"),
        (numpy_file(np.zeros((4, 4, 9), np.uint8)), "channels, expected 3"),
        (numpy_file(np.array([{}])), "[Pp]ickle"),
        (numpy_file(np.full((4, 4), -1.5)), "float values from -1.5"),
        (numpy_file(np.zeros((0, 4), np.uint8)), "is not an image"),
        ("/no/such/file.png", "no such file"),
    ],
)
def test_what_cannot_be_read_says_why(raw: bytes | str, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        decode(raw)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A good image whose first so many reads fail."""
    monkeypatch.setattr("barlow.data.files._WAITS", (0, 0))

    def make(code: int, times: int, ending: str = "png") -> str:
        content = (
            numpy_file(picture()) if ending == "npy" else encoded(Image.fromarray(picture()), "PNG")
        )
        path = tmp_path / f"1.{ending}"
        path.write_bytes(content)
        errors = [OSError(code, os.strerror(code), str(path))] * times

        def read(*args: object) -> io.BufferedReader:
            if errors:
                raise errors.pop()
            return open(*args)

        monkeypatch.setattr("barlow.data.files.open", read, raising=False)
        return str(path)

    return make


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("ending", ["png", "npy"])
def test_a_disk_that_is_away_for_a_while_breaks_no_image(failing, code: int, ending: str) -> None:
    assert torch.equal(decode(failing(code, 2, ending)), expected())


def test_a_disk_that_stays_away_is_told_and_breaks_no_image(failing) -> None:
    with pytest.raises(UserError, match=r"1\.png \(Stale file handle\) after 3 attempts: run"):
        decode(failing(errno.ESTALE, 3))


@pytest.mark.parametrize(("code", "times"), [(errno.EIO, 3), (errno.EACCES, 1)])
def test_a_file_that_alone_cannot_be_read_is_broken(failing, code: int, times: int) -> None:
    with pytest.raises(BrokenImage, match=os.strerror(code)):
        decode(failing(code, times))


def test_a_png_is_opened_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(Image.fromarray(picture()), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
        opened = Picture(raw)
    assert torch.equal(opened.decode(), expected())


def test_a_png_whose_orientation_stands_behind_its_pixels_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(picture()).transpose(Image.Transpose.ROTATE_90)
    raw = encoded(stored, "PNG", exif=exif)
    start = raw.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", raw[start : start + 4])[0]
    late = raw[:start] + raw[end:-12] + raw[start:end] + raw[-12:]  # before IEND
    assert Picture(late).size == (HEIGHT, WIDTH)
    assert torch.equal(decode(late), expected())


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_orientation_that_cannot_be_read_is_upright(kind: str) -> None:
    image = Image.fromarray(picture())
    good = decode(encoded(image, kind))
    raw = encoded(image, kind, exif=b"Exif\0\0no tags at all")
    with pytest.raises(SyntaxError), Image.open(io.BytesIO(raw)) as opened:
        opened.getexif()
    assert torch.equal(decode(raw), good)


def test_more_bands_than_rows_are_still_the_first_axis() -> None:
    bands = np.arange(103, dtype=np.uint8)[:, None, None] * np.ones((1, 64, 48), np.uint8)
    for array in (bands, bands.transpose(1, 2, 0)):
        pixels = decode(numpy_file(array), in_chans=103)
        assert pixels.shape == (103, 64, 48)
        assert pixels[:, 0, 0].tolist() == list(range(103))


@pytest.mark.parametrize(("kind", "in_chans"), [("PPM", 1), ("TIFF", 1), ("TIFF", 2)])
def test_dark_images_that_pillow_opens_as_32_bits_stay_dark(kind: str, in_chans: int) -> None:
    dark = Image.fromarray(np.full((HEIGHT, WIDTH), 200, np.int32))
    options = {"save_all": True, "append_images": [dark]} if in_chans == 2 else {}
    assert decode(encoded(dark, kind, **options), in_chans=in_chans).max() == 0
