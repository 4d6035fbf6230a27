"""The two view distributions, on whole batches, on the device."""

from barlow.views.settings import PRESETS, ViewSettings, normalisation
from barlow.views.two_views import TwoViews

__all__ = ["PRESETS", "TwoViews", "ViewSettings", "normalisation"]
