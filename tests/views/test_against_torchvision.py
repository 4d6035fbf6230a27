"""Each operation against torchvision's own: the same images for the same parameters, and the same
mean and spread of the change over 10,000 draws."""

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF

from barlow.views import TwoViews, ViewSettings, colour, geometry

DRAWS = 10_000
OFF = {
    "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "jitter": 0.0,
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "greyscale": 0.0,
    "blur": 0.0, "solarise": 0.0,
}  # fmt: skip


def pictures(n: int, size: int = 16) -> torch.Tensor:
    """Random images, smooth but for a little noise: `(n, 3, size, size)` uint8."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    smooth += 0.05 * torch.randn(n, 3, size, size, generator=generator)
    return smooth.mul(255).clamp(0, 255).to(torch.uint8)


def planes(images: torch.Tensor) -> torch.Tensor:
    return images.float().div(255).transpose(0, 1).flatten(2).contiguous()


def unplanes(x: torch.Tensor, size: int = 16) -> torch.Tensor:
    return x.transpose(0, 1).unflatten(2, (size, size))


def test_brightness_contrast_saturation_are_torchvisions():
    images = pictures(30)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for operation, theirs in enumerate(adjust):
        for factor in (0.0, 0.6, 1.0, 1.4, 2.5):
            ours = planes(images)
            # The operation first, then no change; the hue, which is 0, comes last.
            order = torch.tensor([operation, *({0, 1, 2} - {operation}), 3]).expand(30, 4)
            factors = torch.ones(30, 3)
            factors[:, operation] = factor
            every = torch.ones(30, dtype=torch.bool)
            colour.jitter(ours, colour.plan(order, factors, torch.zeros(30, 1), every))
            expected = theirs(images.float() / 255, factor)
            torch.testing.assert_close(unplanes(ours), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shift", [-0.5, -0.35, -0.1, 0.0, 0.07, 0.25, 0.5])
def test_the_hue_is_torchvisions(shift):
    images = pictures(30).float() / 255
    images[0] = 0.3  # grey has no hue
    images[1] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    images[2] = torch.tensor([0.0, 0.5, 0.5]).view(3, 1, 1)
    ours = images.transpose(0, 1).flatten(2).contiguous()
    colour.shift_hue(ours, torch.full((30, 1), shift))
    torch.testing.assert_close(unplanes(ours), TF.adjust_hue(images, shift), rtol=0, atol=2e-5)


def test_the_four_changes_apply_in_the_order_drawn():
    images = pictures(48).float() / 255
    order = torch.rand(48, 4, generator=torch.Generator().manual_seed(0)).argsort(1)
    jittered = torch.arange(48) % 6 != 0
    factors, hue = torch.tensor([[1.3, 0.7, 1.2]]).expand(48, 3), torch.full((48, 1), 0.08)
    changes = colour.plan(order, factors, hue, jittered)
    rank = changes.ahead.argsort(stable=True)
    images, order, jittered = images[rank], order[rank], jittered[rank]
    ours = images.transpose(0, 1).flatten(2).contiguous()
    colour.jitter(ours, changes.take(rank))
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    strengths = [1.3, 0.7, 1.2, 0.08]
    for i in range(48):
        expected = images[i]
        for step in order[i].tolist() if jittered[i] else []:
            expected = steps[step](expected, strengths[step])
        torch.testing.assert_close(unplanes(ours)[i], expected, rtol=0, atol=5e-4)


def test_greyscale_and_solarise_are_torchvisions():
    images = pictures(20).float() / 255
    every = torch.arange(20)
    ours = planes(pictures(20))
    colour.to_grey(ours, every)
    expected = TF.rgb_to_grayscale(images, 3)
    torch.testing.assert_close(unplanes(ours), expected, rtol=0, atol=2e-4)
    ours = planes(pictures(20))
    colour.solarise(ours, every, 128 / 255)
    torch.testing.assert_close(unplanes(ours), TF.solarize(images, 128 / 255), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [16, 32, 50, 64])  # less and more than a block, whole ones or not
@pytest.mark.parametrize("sigma", [0.1, 0.58, 2.0])  # at 0.58 the ends of the kernel fade to 1e-41
def test_the_blur_is_torchvisions(size, sigma):
    images, ours = pictures(6, size).float() / 255, planes(pictures(6, size))
    some = torch.tensor([1, 4, 5])
    colour.blur(ours, some, torch.full((3, 1), sigma), size, 8)
    images[some] = TF.gaussian_blur(images[some], [17, 17], [sigma, sigma])
    torch.testing.assert_close(unplanes(ours, size), images, rtol=0, atol=1e-5)
    colour.blur(ours, slice(None), torch.full((6, 1), sigma), size, 8)
    twice = TF.gaussian_blur(images, [17, 17], [sigma, sigma])
    torch.testing.assert_close(unplanes(ours, size), twice, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_crops_are_torchvisions_within_rounding(size):
    images = pictures(60, 30)
    position = torch.arange(60)
    boxes = geometry.crop_boxes(ViewSettings(), 3, position, *torch.tensor([30, 30]))
    ours = geometry.crop_batch(images, boxes, size).transpose(0, 1)
    for image, (top, left, height, width, mirrored, _), got in zip(
        images, boxes.tolist(), ours, strict=True
    ):
        expected = TF.resized_crop(
            image.float() / 255, top, left, height, width, [size, size], antialias=True
        )
        expected = TF.horizontal_flip(expected) if mirrored else expected
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_rotation_shift_zoom_and_shear_are_torchvisions():
    images = pictures(8).float() / 255
    settings = ViewSettings(rotation=40, translation=0.25, zoom=(0.5, 2.0), shear=30)
    draws = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    ours = geometry.affine(images, settings, draws)
    for image, draw, got in zip(images, draws, ours, strict=True):
        angle, right, down, shear = ((2 * draw - 1)[[0, 1, 2, 4]]).tolist()
        expected = TF.affine(
            image, 40 * angle, [round(4 * right), round(4 * down)], 0.5 + 1.5 * float(draw[3]),
            [30 * shear, 0.0], interpolation=TF.InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


# With its default fill of 0 torchvision dims the border pixels twice: by sampling and by a mask.
SAMPLING = {"interpolation": T.InterpolationMode.BILINEAR, "fill": None}
JITTER = T.ColorJitter(0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3)}, T.RandomResizedCrop(16)),
        ({"horizontal_flip": 0.5}, T.RandomHorizontalFlip()),
        ({"vertical_flip": 0.3}, T.RandomVerticalFlip(0.3)),
        ({"jitter": 1.0, "brightness": 0.4}, T.ColorJitter(brightness=0.4)),
        ({"jitter": 1.0, "contrast": 0.4}, T.ColorJitter(contrast=0.4)),
        ({"jitter": 1.0, "saturation": 0.2}, T.ColorJitter(saturation=0.2)),
        ({"jitter": 1.0, "hue": 0.1}, T.ColorJitter(hue=0.1)),
        (
            {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
            T.RandomApply([JITTER], 0.8),
        ),
        ({"greyscale": 0.2}, T.RandomGrayscale(0.2)),
        ({"blur": 1.0}, T.GaussianBlur(17, (0.1, 2.0))),
        ({"solarise": 0.2}, T.RandomSolarize(128 / 255, 0.2)),
        ({"rotation": 20.0}, T.RandomRotation(20, **SAMPLING)),
        (
            {"translation": 0.2, "zoom": (0.8, 1.2), "shear": 10.0},
            T.RandomAffine(0, (0.2, 0.2), (0.8, 1.2), 10, **SAMPLING),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_changes_have_torchvisions_mean_and_spread(changes, theirs):
    image = pictures(1)
    views = TwoViews(16, view1=OFF | changes, mean=(0, 0, 0), std=(1, 1, 1))
    ours = views(image.expand(DRAWS, -1, -1, -1), key=0)[0]
    torch.manual_seed(0)
    single = image[0].float() / 255
    expected = torch.stack([theirs(single) for _ in range(DRAWS)])
    # The change of every pixel, and that of the whole image: signed, and how large.
    for measure in (lambda x: x - single, lambda x: (x - single).abs().mean((1, 2, 3))):
        a, b = measure(ours).double(), measure(expected).double()
        error = ((a.var(0) + b.var(0)) / DRAWS).sqrt() + 2e-4
        # 768 pixels and a fixed key: five standard errors would fail once in 2,000 fair trials.
        assert ((a.mean(0) - b.mean(0)).abs() / error).max() < 5
        kurtosis = ((b - b.mean(0)) ** 4).mean(0) / (b.var(0) ** 2 + 1e-9)
        spread = b.var(0) * (kurtosis.clamp(min=1) * 2 / DRAWS).sqrt() + 1e-4
        assert ((a.var(0) - b.var(0)).abs() / spread).max() < 5


def test_the_paper_is_the_default():
    """Zbontar et al. 2021, appendix A, and the numbers of the authors' code."""
    first, second = TwoViews().settings
    shared = {
        "crop_scale": (0.08, 1.0), "horizontal_flip": 0.5, "jitter": 0.8, "brightness": 0.4,
        "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "greyscale": 0.2, "blur_sigma": (0.1, 2.0),
    }  # fmt: skip
    for settings in (first, second):
        assert {name: getattr(settings, name) for name in shared} == shared
    assert (first.blur, first.solarise) == (1.0, 0.0)
    assert (second.blur, second.solarise) == (0.1, 0.2)
