"""A small encoder and real digits, their features computed once."""

import pytest
import torch

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
