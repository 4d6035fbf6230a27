"""The software versions and the machine, to be recorded with a result."""

import os
import platform
from typing import Any


def environment() -> dict[str, Any]:
    """What a result may depend on besides settings and images.

    Example:
        >>> environment()["barlow"]
        '0.1.0'
    """
    import torch

    from barlow import __version__

    return {
        "barlow": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),  # rounding in matrix products depends on it
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
