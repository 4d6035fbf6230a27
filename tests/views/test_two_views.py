import pytest
import torch

from barlow.errors import UserError
from barlow.views import PRESETS, TwoViews, geometry


def photographs(n: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    """Smooth random images with the whole range of values: `(n, channels, size, size)` uint8."""
    coarse = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return smooth.mul(255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_preset_draws_for_every_channel_count(preset, channels):
    views = TwoViews(24, preset, in_chans=channels)(photographs(5, 30, channels), key=1)
    for view in views:
        assert view.shape == (5, channels, 24, 24)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.isfinite().all()
    assert not torch.equal(*views)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [32, 80])
def test_a_view_depends_on_its_address_alone(preset, size):
    images = photographs(40, size)
    views = TwoViews(size, preset)
    everything = views(images, key=5)
    some = torch.tensor([33, 4, 12])
    for whole, part in zip(everything, views(images[some], key=5, position=some), strict=True):
        torch.testing.assert_close(whole[some], part, rtol=0, atol=1e-5)
    torch.testing.assert_close(everything, views(images, key=5), rtol=0, atol=0)
    assert not torch.equal(everything[0], views(images, key=6)[0])


def test_without_a_key_the_global_generator_decides():
    images, views = photographs(4), TwoViews(32, "small")
    torch.manual_seed(3)
    first, second = views(images)[0], views(images)[0]
    torch.manual_seed(3)
    assert torch.equal(views(images)[0], first)
    assert not torch.equal(first, second)


def _drawn_alike(rank: int, ranks: int) -> list[float]:
    torch.manual_seed(3)
    return TwoViews(8, "small")(photographs(4))[0].flatten().tolist()


def test_ranks_that_are_seeded_alike_draw_different_views(on_ranks):
    alone, (first, second) = _drawn_alike(0, 1), on_ranks(2, _drawn_alike)
    assert first == alone
    assert second != alone


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [32, 96])
def test_autocast_changes_no_bit(size, preset):
    images, views = photographs(8, size), TwoViews(size, preset)
    position = torch.arange(8)
    expected, crops = views(images, key=4), views.crop(images, 4, position)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, views(images, key=4), expected))
        assert all(map(torch.equal, views.crop(images, 4, position), crops))
        assert all(map(torch.equal, views.finish(*crops, 4, position), expected))


@pytest.mark.parametrize("size", [32, 80])
def test_forward_is_crop_then_finish(size):
    images, views = photographs(6, size), TwoViews(size, "paper")
    position = torch.arange(10, 16)
    crops = views.crop(images, 2, position)
    finished = views.finish(*crops, 2, position)
    torch.testing.assert_close(finished, views(images, key=2, position=position), rtol=0, atol=0)


def test_a_worker_that_crops_one_image_at_a_time_gets_the_same_views():
    images, views = photographs(6, 80), TwoViews(48, "paper")
    position = torch.arange(6)
    one_by_one = [views.crop([images[i]], 2, position[i : i + 1]) for i in range(6)]
    crops = [torch.cat(part) for part in zip(*one_by_one, strict=True)]
    whole = views(images, key=2)
    torch.testing.assert_close(views.finish(*crops, 2, position), whole, rtol=0, atol=0)


def test_small_images_crop_alike_one_by_one_and_in_a_batch():
    images, views = photographs(50), TwoViews(32, "small")
    position = torch.arange(50)
    for batch, single in zip(
        views.crop(images, 2, position), views.crop(list(images), 2, position), strict=True
    ):
        assert (batch * 255 - single).abs().max() < 1.01  # rounding to uint8, twice in torch


def test_images_of_different_sizes_make_one_batch():
    images = [photographs(1, size)[0] for size in (20, 90, 300)]
    crops = TwoViews(64).crop(images, 0, torch.arange(3))
    assert crops[0].shape == (3, 3, 64, 64)


def test_images_are_left_as_they_were():
    images, views = photographs(8), TwoViews(32, "small", view1={"crop_scale": (1.0, 1.0)})
    before = images.clone()
    crops = views.crop(images, 0, torch.arange(8))
    kept = [crop.clone() for crop in crops]
    views.finish(*crops, 0, torch.arange(8))
    assert torch.equal(images, before)
    torch.testing.assert_close(list(crops), kept, rtol=0, atol=0)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="view2 has no setting 'solarize': did you mean 'solarise'"):
        TwoViews(32, view2={"solarize": 0.5})
    with pytest.raises(UserError, match="unknown preset 'smal': did you mean 'small'"):
        TwoViews(32, "smal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jitter": 1.5}, "probability"),
        ({"crop_scale": (0.5, 0.1)}, "low then high"),
        ({"crop_scale": (0.0, 1.0)}, "share of the image"),
        ({"hue": 0.7}, "colour circle"),
        ({"brightness": -1}, "must not be negative"),
        ({"border": "mirror"}, "`zeros` or `reflection`"),
        ({"blur_sigma": (0.0, 1.0)}, "must be greater than 0"),
        ({"crop_scale": 0.3}, "crop_scale must be a range of two numbers, low then high, not 0.3"),
        ({"crop_scale": "08"}, "low then high, not 08"),
        ({"zoom": (0.5, None)}, "low then high"),
        ({"blur": "x"}, "blur must be a number, not 'x'"),
        ({"rotation": [20]}, r"rotation must be a number, not \[20\]"),
    ],
)
def test_a_value_out_of_range_is_refused_in_words(changes, message):
    with pytest.raises(UserError, match=message):
        TwoViews(32, view1=changes)


def test_images_of_the_wrong_kind_are_refused():
    with pytest.raises(UserError, match=r"uint8 images of 3 channels, got \(1, 32, 32\)"):
        TwoViews(32)(photographs(2, 32, 1))
    with pytest.raises(UserError, match="float32"):
        TwoViews(32)(photographs(2).float())


@pytest.mark.parametrize(("size", "preset"), [(32, "small"), (80, "paper"), (50, "microscopy")])
def test_the_pieces_a_batch_is_worked_on_in_change_no_bit(size, preset, monkeypatch):
    images, views = photographs(20, size), TwoViews(size, preset)
    whole = views(images, key=4)
    for pixels in (size**2, 3 * size**2):
        monkeypatch.setattr("barlow.views.two_views._CHUNK", pixels)
        torch.testing.assert_close(views(images, key=4), whole, rtol=0, atol=0)


def test_elsewhere_than_on_the_cpu_bytes_are_resized_as_numbers(monkeypatch):
    """As torch resizes uint8 with antialiasing on the CPU only; "meta" stands for a GPU."""
    resized = []

    def interpolate(images, size, **options):
        resized.append(images.dtype)
        return torch.nn.functional.adaptive_avg_pool2d(images, size)

    monkeypatch.setattr(geometry.F, "interpolate", interpolate)
    image = torch.zeros(3, 80, 90, dtype=torch.uint8, device="meta")
    cropped = geometry.crop_one(image, torch.tensor([0, 0, 70, 60, 1, 0]), 32)
    assert resized == [torch.float32]
    assert (cropped.dtype, cropped.shape) == (torch.uint8, (3, 32, 32))
