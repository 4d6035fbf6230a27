"""The cross-correlation matrix of a run, at initialisation and at a checkpoint, and its picture."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from barlow import address
from barlow.assembly import build_model, build_views
from barlow.data import Source
from barlow.data.streaming import stream
from barlow.loss import cross_correlation
from barlow.model import BarlowTwins
from barlow.settings import Settings

_FEATURES = 1024  # of the embedding, at most; evenly spaced, because their order means nothing
_DRAWN = 256  # rows and columns of a picture, at most
_BLUE, _RED = (36, 99, 190), (204, 62, 46)


def initial_and_current(
    settings: Settings, state: dict[str, Any], images: Source
) -> tuple[Tensor, Tensor]:
    """The matrix before the first step and at a checkpoint, on the same views of the same images.

    Args:
        settings: of the run; the model before the first step is built again from them.
        state: the content of a checkpoint.
        images: at most as many as a training step has; read and cropped one after another, as in
            training.

    Returns:
        Two matrices `(d, d)`, of at most 1,024 evenly spaced features of the embedding, as a
        training step sees them: batch normalisation in the network uses these images' statistics.
    """
    model = initial_model(settings)
    views = build_views(settings, model.encoder.preprocess)  # type: ignore[arg-type]
    key, rows = address.key(settings.seed, address.MATRIX_VIEWS), torch.arange(len(images))
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
        (crops,) = stream(images, views, [(rows, rows)], key, workers=0)
    both = views.finish(crops.view1, crops.view2, key, rows)
    initial = _matrix(model, settings, both)
    model.load_state_dict(state["model"])
    return initial, _matrix(model, settings, both)


def initial_model(settings: Settings) -> BarlowTwins:
    """The model before the first step, built again from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build_model(settings)[0]


@torch.no_grad()
def _matrix(model: BarlowTwins, settings: Settings, views: tuple[Tensor, Tensor]) -> Tensor:
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # for dropout
        z1, z2 = (model.embed(view) for view in views)  # (N, D)
    model.eval()
    chosen = torch.linspace(0, z1.shape[1] - 1, min(_FEATURES, z1.shape[1])).round().long()
    return cross_correlation(z1[:, chosen], z2[:, chosen])


def heat_map(matrix: Tensor) -> Image.Image:
    """A matrix as a picture: red for 1, blue for -1, transparent for 0.

    Args:
        matrix: `(r, c)`, numbers from -1 to 1; if there are more than 256 rows or columns, 256
            evenly spaced ones are drawn.

    Returns:
        A palette image whose colours have transparency, so that the page shows through at 0.

    Example:
        >>> heat_map(torch.eye(3)).convert("RGBA").getpixel((0, 0))
        (204, 62, 46, 255)
    """
    rows, columns = (torch.linspace(0, n - 1, min(_DRAWN, n)).round().long() for n in matrix.shape)
    levels = matrix[rows][:, columns].clamp(-1, 1).mul(127).round().add(127)  # 0 to 254
    picture = Image.fromarray(levels.to(torch.uint8).numpy())
    # The exponent strengthens small values, because most off-diagonal correlations are small.
    strength = (np.abs(np.arange(255) - 127) / 127) ** 0.75
    palette = np.where(np.arange(255)[:, None] < 127, _BLUE, _RED)
    picture.putpalette(palette.astype(np.uint8).tobytes())
    picture.info["transparency"] = (strength * 255).round().astype(np.uint8).tobytes()
    return picture
