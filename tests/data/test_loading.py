"""Two views of every image, the same ones whoever reads them and wherever one begins."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from barlow import address
from barlow.data import Loader, open_source
from barlow.errors import UserError
from barlow.views import TwoViews


def pairs(loader: Loader, epoch: int = 0, first_step: int = 0) -> list[tuple]:
    return list(loader.epoch(epoch, first_step))


def same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """JPEGs of different sizes, some much larger than the views."""
    draw = np.random.default_rng(0)
    for i in range(24):
        height, width = draw.integers(40, 400, 2)
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 3 == 0 else 1
        image.save(tmp_path / f"{i:02}.jpg", quality=90, exif=exif)
    return str(tmp_path)


@pytest.fixture(params=["photographs", "mnist5k"])
def source(request: pytest.FixtureRequest) -> str:
    if request.param == "mnist5k":
        return "mnist5k::test"
    return str(request.getfixturevalue("photographs"))


def loader(source: str, batch_size: int = 8, **options) -> Loader:
    limit = options.pop("limit", 26)
    views = TwoViews(32, preset="small")
    return Loader(open_source(source, limit=limit), views, batch_size, seed=3, **options)


LEFT_OPEN = """
import sys
from barlow.data import Loader, open_source
from barlow.views import TwoViews
images, views = open_source(sys.argv[1]), TwoViews(32, preset="small")
batches = Loader(images, views, 8, seed=0, workers=2, memory_budget=0).epoch(0)
next(batches)
"""


def test_a_program_ends_though_an_epoch_does_not(photographs: str) -> None:
    command = [sys.executable, "-c", LEFT_OPEN, photographs]
    assert subprocess.run(command, timeout=30).returncode == 0


def test_worker_counts_change_nothing(source: str) -> None:
    one = pairs(loader(source, workers=0, memory_budget=0))
    assert len(one) == 3
    assert same(one, pairs(loader(source, workers=1, memory_budget=0)))
    assert same(one, pairs(loader(source, workers=3, memory_budget=0)))


def test_memory_changes_nothing(source: str) -> None:
    assert same(pairs(loader(source)), pairs(loader(source, memory_budget=0, workers=0)))


@pytest.mark.parametrize("memory_budget", [0, None])
def test_ranks_slice_one_and_the_same_batch(source: str, memory_budget: int | None) -> None:
    options = {"memory_budget": memory_budget, "workers": 0}
    whole = pairs(loader(source, **options))
    ranks = [pairs(loader(source, rank=r, world_size=2, **options)) for r in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        for view in (0, 1):
            assert torch.equal(batch[view], torch.cat([part[view] for part in parts]))


@pytest.mark.parametrize("memory_budget", [0, None])
def test_an_epoch_entered_in_the_middle_is_the_same(source: str, memory_budget: int | None) -> None:
    images = loader(source, memory_budget=memory_budget, workers=1)
    assert same(pairs(images, 2)[1:], pairs(images, 2, first_step=1))
    assert pairs(images, 2, first_step=3) == []


def test_epochs_and_seeds_differ() -> None:
    images = loader("mnist5k")
    assert not same(pairs(images, 0), pairs(images, 1))


def test_a_reduced_jpeg_gives_nearly_the_views_of_the_whole(photographs: str) -> None:
    images = loader(photographs, workers=0)
    views, source = images.views, images.source
    order = address.permutation(len(source), address.key(3, 0))[:8]
    key, position = address.key(3, 0, 1), torch.arange(8)
    exact = views.finish(*views.crop([source[int(i)] for i in order], key, position), key, position)
    for view, whole in zip(pairs(images)[0], exact, strict=True):
        assert (view - whole).abs().mean() < 0.05


def test_an_epoch_leaves_out_what_does_not_fill_a_batch() -> None:
    views = TwoViews(28, preset="digits", in_chans=1)
    images = Loader(open_source("mnist5k::test", in_chans=1), views, 300, seed=0)
    assert images.steps_per_epoch == 3
    assert [len(view) for view, _ in images.epoch(0)] == [300, 300, 300]


def break_some(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:120])


@pytest.mark.parametrize("memory_budget", [0, None])
def test_broken_images_are_replaced_counted_and_listed(folder, memory_budget: int | None) -> None:
    root = folder([f"{i:02}.png" for i in range(40)])
    break_some(root, ["05.png", "06.png"])
    (root / "39.png").write_bytes(b"")
    source = open_source(str(root), max_broken=0.1)
    views = TwoViews(16, preset="small")
    images = Loader(source, views, 20, seed=0, workers=2, memory_budget=memory_budget)
    epoch = pairs(images)
    assert [len(view) for view, _ in epoch] == [20, 20]
    assert sorted(name for name, _ in source.skipped) == ["05.png", "06.png", "39.png"]
    assert dict(source.skipped)["39.png"] == "empty"
    pairs(images, 1)
    assert len(source.skipped) == 3
    other = open_source(str(root), max_broken=0.1)
    assert same(epoch, pairs(Loader(other, views, 20, seed=0, workers=0, memory_budget=0)))


@pytest.mark.parametrize("memory_budget", [0, None])
def test_too_many_broken_images_stop_the_run(folder, memory_budget: int | None) -> None:
    root = folder([f"{i:02}.png" for i in range(40)])
    break_some(root, ["05.png", "06.png", "20.png"])
    views = TwoViews(16, preset="small")
    with pytest.raises(
        UserError, match=r"3 of 40 images are broken, more than the 5% that max_broken allows"
    ):
        pairs(Loader(open_source(str(root)), views, 20, seed=0, memory_budget=memory_budget))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_nothing_but_broken_images_ends(folder, workers: int) -> None:
    root = folder([f"{i:02}.png" for i in range(12)])
    break_some(root, [f"{i:02}.png" for i in range(12)])
    source = open_source(str(root), max_broken=1)
    with pytest.raises(UserError) as caught:
        pairs(Loader(source, TwoViews(16), 4, seed=0, workers=workers, memory_budget=0))
    name, reason = re.fullmatch(
        rf"{root}: 12 images in a row are broken, the last is (\d\d.png) \((.*)\)",
        str(caught.value),
    ).groups()
    assert int(name[:2]) < 12
    assert "\n" not in reason


def test_a_source_smaller_than_a_batch_names_both_sizes() -> None:
    message = "has 50 images, fewer than one batch of 64: use a batch size of 50 or less"
    with pytest.raises(UserError, match=message):
        Loader(open_source("mnist5k", limit=50), TwoViews(28), 64, seed=0)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 10 cannot be split evenly over 4 ranks"):
        Loader(open_source("mnist5k"), TwoViews(28), 10, seed=0, world_size=4)


def test_multispectral_images_go_all_the_way(tmp_path: Path) -> None:
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.full((6, 20 + i, 20), 20 * i, np.uint8))
    source = open_source(str(tmp_path), in_chans=6)
    for budget in (0, None):
        images = Loader(source, TwoViews(16, in_chans=6), 8, seed=0, memory_budget=budget)
        view1, view2 = next(images.epoch(0))
        assert view1.shape == view2.shape == (8, 6, 16, 16)
