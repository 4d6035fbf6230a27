"""Self-supervised pretraining of image encoders with Barlow Twins (Zbontar et al. 2021)."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barlow.embeddings import embed
    from barlow.encoders import create_encoder
    from barlow.evaluation import evaluate
    from barlow.loss import BarlowTwinsLoss, cross_correlation
    from barlow.model import BarlowTwins
    from barlow.optim import LARS
    from barlow.pretraining import pretrain
    from barlow.settings import Settings
    from barlow.share import load_encoder
    from barlow.views import TwoViews

# Switch off the Hugging Face hub's telemetry, unless this variable is set already (0 allows it).
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Each name is imported when it is first used, so that `import barlow` costs nothing.
_ROOMS = {
    "BarlowTwins": "model",
    "BarlowTwinsLoss": "loss",
    "LARS": "optim",
    "Settings": "settings",
    "TwoViews": "views",
    "create_encoder": "encoders",
    "cross_correlation": "loss",
    "embed": "embeddings",
    "evaluate": "evaluation",
    "load_encoder": "share",
    "pretrain": "pretraining",
}

__version__ = "0.1.0"
__all__ = [
    "LARS",
    "BarlowTwins",
    "BarlowTwinsLoss",
    "Settings",
    "TwoViews",
    "create_encoder",
    "cross_correlation",
    "embed",
    "evaluate",
    "load_encoder",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'barlow' has no attribute {name!r}")
    value = getattr(import_module(f"barlow.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
