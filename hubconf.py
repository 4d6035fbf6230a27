"""What `torch.hub.load` finds in this repository."""

import sys
from pathlib import Path as _Path  # torch.hub lists callables without a leading underscore

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub", "PIL", "numpy"]

# torch.hub puts this folder at the front of sys.path; the package is one folder below, in src.
sys.path.insert(0, str(_Path(__file__).parent / "src"))

from barlow import create_encoder, load_encoder  # noqa: E402

__all__ = ["create_encoder", "load_encoder"]
