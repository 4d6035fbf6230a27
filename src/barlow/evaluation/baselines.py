"""What is measured, and what it is measured beside: the encoder and its baselines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from barlow.data import Preprocess, preprocess_of
from barlow.errors import UserError
from barlow.evaluation.features import device_of
from barlow.run import Run

WITH_PRETRAINING, WITHOUT_PRETRAINING = "with pretraining", "without pretraining"

# Fields of `ViewSettings` that are no change of colours and sharpness.
_GEOMETRY = (
    *("crop_scale", "crop_ratio", "horizontal_flip", "vertical_flip", "rotation", "translation"),
    *("zoom", "shear", "border"),
)
_PIXELS = 32  # a side at most: more of them than this tell a linear classifier nothing new

# A name in a table, and what gives the encoder of that name for a seed.
NamedEncoder = tuple[str, Callable[[int], nn.Module]]


def with_baselines(
    encoder: nn.Module,
    baseline: str | Sequence[str] | None,
    among: Sequence[str] = ("random", "pixels", "supervised"),
) -> list[NamedEncoder]:
    """Name the encoders of a table: baselines first, the encoder itself last.

    Args:
        encoder: with its `preprocess`.
        baseline: names, or one text with commas between them.
        among: those that make sense for the protocol.

    Returns:
        Names and what gives the encoders, each with its `preprocess`, on the encoder's device.

    Raises:
        UserError: if there is no such baseline.
    """
    names = baseline.split(",") if isinstance(baseline, str) else list(baseline or [])
    names = list(dict.fromkeys(name.strip() for name in names))
    if unknown := [name for name in names if name not in among]:
        raise UserError(
            f"unknown baseline {unknown[0]!r} for this protocol: use one of {', '.join(among)}"
        )
    return [*(_baseline(encoder, name) for name in names), (WITH_PRETRAINING, lambda seed: encoder)]


def _baseline(encoder: nn.Module, name: str) -> NamedEncoder:
    from barlow.encoders import fresh_copy

    device = device_of(encoder)
    if name == "random":
        return WITHOUT_PRETRAINING, lambda seed: fresh_copy(encoder, seed).to(device)
    if name == "pixels":
        return "raw pixels", lambda seed: _Pixels(preprocess_of(encoder))
    return "supervised weights", lambda seed: _supervised(encoder).to(device)


class _Pixels(nn.Module):
    """The encoder that knows nothing: its features are the pixels."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.preprocess = preprocess
        self._pool = nn.AdaptiveAvgPool2d(min(_PIXELS, preprocess.image_size))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._pool(images).flatten(1)
        return features


def _supervised(encoder: nn.Module) -> nn.Module:
    """timm's weights as they were trained: with their own stem and their own normalisation."""
    from barlow.encoders import STEM_STRIDE, spec_of

    spec, preprocess = spec_of(encoder), preprocess_of(encoder)
    # Of images so much larger, the standard stem makes maps of the same size.
    size = preprocess.image_size * STEM_STRIDE["standard"] // STEM_STRIDE[spec.stem]
    spec = replace(spec, stem="standard")
    module = spec.build(pretrained=True)
    data = module.pretrained_cfg
    assert isinstance(data, dict)
    colours = {"mean": data["mean"], "std": data["std"]} if spec.in_chans == 3 else {}
    module.preprocess = Preprocess(size, in_chans=spec.in_chans, **colours)
    return module.eval()


def views_of_run(encoder: str | Path | nn.Module) -> tuple[str, dict[str, Any]]:
    """The preset a run was trained with, and what it changed of the first view's crops and flips.

    They know whether a mirrored image is the same.
    """
    if not isinstance(encoder, nn.Module) and (run := Run(Path(encoder))).config_file.exists():
        settings = run.settings()
        return settings.view_preset, {k: v for k, v in settings.view1.items() if k in _GEOMETRY}
    return "small", {}
