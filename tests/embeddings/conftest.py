"""A small encoder in a folder, and images of its size."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def encoder():
    import barlow
    from barlow.data import Preprocess

    torch.manual_seed(0)
    encoder = barlow.create_encoder(
        "resnet10t", image_size=28, in_chans=1, channels=(8, 16, 24, 32)
    )
    encoder.preprocess = Preprocess(20, in_chans=1)
    return encoder.eval()


@pytest.fixture(scope="session")
def encoder_folder(encoder, tmp_path_factory):
    from barlow.share import save_encoder

    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(encoder, folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """`photos(n)`: a folder of n different PNGs in two classes."""

    def make(n, name="photos"):
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (24, 24), np.uint8)
            path = tmp_path / name / ("cat" if i < n // 2 else "dog") / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        return tmp_path / name

    return make


@pytest.fixture
def command():
    """`command("embed", ...)`: the arguments and options that start a real process."""

    def make(*arguments):
        return {
            "args": [sys.executable, "-m", "barlow", *map(str, arguments)],
            "env": os.environ | {"OMP_NUM_THREADS": "1"},
            "text": True,
        }

    return make
