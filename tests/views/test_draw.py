import pytest
import torch
from PIL import Image

from barlow.errors import UserError
from barlow.views import TwoViews, draw_views


def test_a_picture_shows_every_image_beside_its_views(tmp_path):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    out = draw_views(images, TwoViews(32, "small"), tmp_path / "views.png")
    assert out == tmp_path / "views.png"
    assert list(tmp_path.iterdir()) == [out]  # the temporary file is gone
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 96
        assert picture.height > 5 * 96


def test_the_original_and_an_untouched_view_look_the_same(tmp_path):
    nothing = {
        "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0, "jitter": 0,
        "greyscale": 0, "blur": 0, "solarise": 0,
    }  # fmt: skip
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    views = TwoViews(32, "small", view1=nothing, view2=nothing)
    with Image.open(draw_views(images, views, tmp_path / "views.png")) as picture:
        cells = [picture.crop((8 + i * 104, 18, 104 + i * 104, 114)) for i in range(3)]
    assert cells[0].tobytes() == cells[1].tobytes() == cells[2].tobytes()


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_images_of_any_size_and_channels_are_drawn(tmp_path, channels):
    images = [torch.full((channels, *size), 99, dtype=torch.uint8) for size in ((20, 70), (90, 8))]
    views = TwoViews(28, "digits", in_chans=channels)
    assert draw_views(images, views, tmp_path / "views.png").exists()


def test_the_folder_of_the_picture_is_made(tmp_path):
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert draw_views(images, TwoViews(32), tmp_path / "a" / "b" / "views.png").exists()
    with pytest.raises(
        UserError, match=r"b is a folder: name a PNG file in it, such as .*views\.png"
    ):
        draw_views(images, TwoViews(32), tmp_path / "a" / "b")


def test_a_failed_picture_leaves_the_old_one(tmp_path):
    (tmp_path / "views.png").write_bytes(b"old")
    with pytest.raises(UserError):
        draw_views(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), TwoViews(8), tmp_path / "views.png")
    assert (tmp_path / "views.png").read_bytes() == b"old"
