"""The encoders of a table: the one that is evaluated, and the baselines to compare it with."""

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

# Fields of `ViewSettings` that change neither colours nor sharpness.
_GEOMETRY = (
    *("crop_scale", "crop_ratio", "horizontal_flip", "vertical_flip", "rotation", "translation"),
    *("zoom", "shear", "border"),
)
_PIXELS = 32  # per side at most; more pixels tell a linear classifier nothing new

# A name in a table, and a function that makes the encoder of that name from a seed.
NamedEncoder = tuple[str, Callable[[int], nn.Module]]


def with_baselines(
    encoder: nn.Module,
    baseline: str | Sequence[str] | None,
    among: Sequence[str] = ("random", "pixels", "supervised"),
) -> list[NamedEncoder]:
    """Name the encoders of a table: baselines first, the encoder itself last.

    Args:
        encoder: the encoder, with its `preprocess`.
        baseline: names, or one string of names separated by commas.
        among: the baselines that make sense for the protocol.

    Returns:
        Names and functions that make the encoders, each with its `preprocess` and on the device of
        `encoder`.

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
    """An encoder that knows nothing: its features are the pixels."""

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
    # At this image size, the standard stem yields feature maps of the same size.
    size = preprocess.image_size * STEM_STRIDE["standard"] // STEM_STRIDE[spec.stem]
    spec = replace(spec, stem="standard")
    module = spec.build(pretrained=True)
    data = module.pretrained_cfg
    assert isinstance(data, dict)
    colours = {"mean": data["mean"], "std": data["std"]} if spec.in_chans == 3 else {}
    module.preprocess = Preprocess(size, in_chans=spec.in_chans, **colours)
    return module.eval()


def views_of_run(encoder: str | Path | nn.Module) -> tuple[str, dict[str, Any]]:
    """The preset a run was trained with, and its changes to the first view's crops and flips.

    These settings reflect, for example, whether a mirrored image means the same.
    """
    if not isinstance(encoder, nn.Module) and (run := Run(Path(encoder))).config_file.exists():
        settings = run.settings()
        return settings.view_preset, {k: v for k, v in settings.view1.items() if k in _GEOMETRY}
    return "small", {}
