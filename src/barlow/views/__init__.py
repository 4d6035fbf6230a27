"""Two views of every image: settings, the module that draws them, and a picture of them."""

from barlow.views.draw import draw_views
from barlow.views.settings import PRESETS, ViewSettings, view_settings
from barlow.views.two_views import TwoViews

__all__ = ["PRESETS", "TwoViews", "ViewSettings", "draw_views", "view_settings"]
