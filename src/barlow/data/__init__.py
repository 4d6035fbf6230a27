"""Data: from a source to batches of two views, or of plain images."""

from barlow.data.batches import eval_batches
from barlow.data.loading import Loader
from barlow.data.preprocess import Preprocess, preprocess_of
from barlow.data.source import Source
from barlow.data.sources import open_held_out, open_source

__all__ = [
    "Loader",
    "Preprocess",
    "Source",
    "eval_batches",
    "open_held_out",
    "open_source",
    "preprocess_of",
]
