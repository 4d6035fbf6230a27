"""Images of every kind, written when a test asks for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    """A smooth colour image (H, W, 3): lossy formats keep it nearly as it is."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    turn = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(3 * x + turn[0]), np.cos(3 * y + turn[1]), np.sin(2 * (x + y) + turn[2])]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def write_folder(root: Path, names: list[str], size: tuple[int, int] = (20, 24)) -> Path:
    """A folder of different PNGs."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, seed=i)).save(path)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(names: list[str], size: tuple[int, int] = (20, 24)) -> Path:
        return write_folder(tmp_path / "images", names, size)

    return make
