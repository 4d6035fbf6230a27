"""A small encoder and real digits, their features computed once."""

import pytest
import torch
from PIL import Image
from torch import nn

from barlow.data import Preprocess, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def encoder():
    import barlow

    torch.manual_seed(0)
    encoder = barlow.create_encoder(
        "resnet10t", image_size=28, in_chans=1, channels=(8, 16, 24, 32)
    )
    encoder.preprocess = Preprocess(20, in_chans=1)
    with torch.no_grad():  # running statistics of real digits, as after a training
        digits = open_source("mnist5k", "train", in_chans=1)
        images = torch.stack([encoder.preprocess(digits[i]) for i in range(500)])
        encoder.train()
        for _ in range(15):
            encoder(images[torch.randperm(500)[:100]])
    return encoder.eval()


@pytest.fixture(scope="session")
def digits(encoder):
    """Features and labels of real digits: `x_train, y_train, x_test, y_test`."""
    from barlow.evaluation.features import extract

    found = []
    for part in ("train", "test"):
        source = open_source("mnist5k", part, in_chans=1)
        x, rows = extract(encoder, source)
        found += [x, source.labels[rows]]
    return tuple(found)


@pytest.fixture
def pixels():
    """The cheapest encoder there is: its features are 8 x 8 pixels."""
    encoder = nn.Flatten()
    encoder.preprocess = Preprocess(8, mean=[0.5], std=[0.25], in_chans=1)
    encoder.num_features = 64
    return encoder


@pytest.fixture
def noise(tmp_path):
    """Images of noise: `train` and `test` of 20 images each of the classes a and b."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for kind in "ab":
            folder = tmp_path / "noise" / split / kind
            folder.mkdir(parents=True)
            for i in range(20):
                image = torch.randint(0, 255, (8, 8), generator=generator).to(torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i:02}.png")
    return tmp_path / "noise"
