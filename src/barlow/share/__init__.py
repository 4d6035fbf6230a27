"""Loading encoders from runs and files, and writing them for other programs."""

from barlow.share.loading import load_encoder
from barlow.share.timm_folder import save_encoder

__all__ = ["load_encoder", "save_encoder"]
