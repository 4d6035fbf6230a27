"""The evaluation preprocessing is deterministic, exact and carries no weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F

from barlow.data import Preprocess, eval_batches, open_source


def test_images_of_the_right_size_are_only_normalised() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    preprocess = Preprocess(16, mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7])
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    assert torch.allclose(preprocess(images), (images / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (17, 33), (8, 8)])
def test_the_centre_of_any_image_is_kept(size: tuple[int, int]) -> None:
    column = torch.linspace(0, 255, size[1]).round().to(torch.uint8)
    image = column.expand(3, *size)
    out = Preprocess(16, mean=[0] * 3, std=[1] * 3)(image)
    assert out.shape == (3, 16, 16)
    # A ramp keeps its middle value in the middle, whichever side is cut.
    assert (out.mean() * 255 - 127.5).abs() < 6


def test_one_image_a_batch_and_a_pil_image_agree() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    preprocess = Preprocess(16)
    one = preprocess(image)
    assert torch.equal(preprocess(image[None])[0], one)
    assert torch.equal(preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())), one)


@pytest.mark.parametrize("size", [(40, 60), (64, 32), (20, 30), (32, 32)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_images_are_resized_as_timm_does(size: tuple[int, int], in_chans: int) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (*size, in_chans), np.uint8).squeeze()
    image = Image.fromarray(grey)
    theirs = create_transform(
        (in_chans, 32, 32), interpolation="bilinear", crop_pct=1.0, mean=0.5, std=0.25
    )
    ours = Preprocess(32, mean=[0.5] * in_chans, std=[0.25] * in_chans, in_chans=in_chans)
    levels = (ours(image) - theirs(image)).abs() * 0.25 * 255
    assert levels.max() < 1.001, "the two round halves apart"
    assert (levels > 0.001).float().mean() < 0.1


@pytest.mark.parametrize("size", [(40, 60), (20, 30), (16, 16), (16, 31)])
def test_in_float32_it_differs_by_rounding_alone(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    preprocess = Preprocess(16)
    levels = (preprocess(images) - preprocess.prepare(images)).abs()
    levels *= 255 * torch.tensor(preprocess.std)[:, None, None]
    # Rounded once along each axis, half a level each time.
    assert levels.max() < (1.02 if min(size) != 16 else 1e-3)


def test_images_of_many_sizes_become_one_batch() -> None:
    sizes = [(40, 60), (60, 40), (24, 24), (24, 90), (9, 9)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    images += [i.permute(1, 2, 0).contiguous().permute(2, 0, 1) for i in images]
    preprocess = Preprocess(24)
    batch = preprocess.normalise(torch.cat([preprocess.square(image) for image in images]))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack([preprocess(image) for image in images]))
    assert torch.equal(batch[:5], batch[5:]), "how an image lies in memory changes no pixel"


@pytest.mark.parametrize(
    "short_long", [(1, 999), (2, 5_001), (3, 4_000), (7, 2_003), (10, 331), (17, 901), (31, 999)]
)
@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_strip_is_cut_before_it_is_resized(
    short_long: tuple[int, int], size: int, axis: int
) -> None:
    shape = short_long if axis == 2 else short_long[::-1]
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    preprocess = Preprocess(size)
    sides = preprocess._sides(image[None])
    whole = F.interpolate(image[None], sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in sides)
    expected = whole[:, :, top : top + size, left : left + size]
    assert (preprocess.square(image).int() - expected.int()).abs().max() <= 1


def test_a_strip_takes_no_more_memory_than_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = F.interpolate

    def noted(batch: torch.Tensor, sides: list[int], **how: object) -> torch.Tensor:
        sizes.append(sides)
        return resize(batch, sides, **how)

    monkeypatch.setattr(F, "interpolate", noted)
    image = torch.randint(0, 256, (3, 2, 50_000), dtype=torch.uint8)
    assert Preprocess(224).square(image).shape == (1, 3, 224, 224)
    assert Preprocess(224).square(image[:, :, :64]).shape == (1, 3, 224, 224)
    assert sizes[0][1] <= 32 * 224
    assert sizes[1] == [224, 32 * 224], "an ordinary image is resized whole"


def test_its_dictionary_makes_it_again_and_its_state_is_empty() -> None:
    preprocess = Preprocess(24, in_chans=5)
    again = Preprocess(**preprocess.to_dict())
    assert again.to_dict() == preprocess.to_dict()
    assert (again.mean, again.std) == ((0.5,) * 5, (0.25,) * 5)
    assert not preprocess.state_dict()


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(3, H, W\)"):
        Preprocess(16)(torch.zeros(1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mean has 2 numbers for 3 channels"):
        Preprocess(16, mean=[0.5, 0.5])


@pytest.mark.parametrize("workers", [0, 3])
def test_evaluation_sees_every_good_image_once_in_order(folder, workers: int) -> None:
    root = folder([f"{i:02}.png" for i in range(40)], (18, 30))
    (root / "07.png").write_bytes(b"")
    source = open_source(str(root))
    preprocess = Preprocess(16)
    batches = list(eval_batches(source, preprocess, 8, workers=workers))
    rows = torch.cat([rows for _, rows in batches]).tolist()
    assert rows == [i for i in range(40) if i != 7]
    assert torch.equal(batches[2][0][1], preprocess(source[17]))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert source.skipped == [("07.png", "empty")]
