"""What a view is drawn from: one frozen dataclass, and named pairs of them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from barlow.errors import UserError


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} is {value!r}: give a number")
    return float(value)


def _pair(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"{name} is {value!r}: give two numbers, such as [0.2, 1.0]")
    return _number(name, value[0]), _number(name, value[1])


@dataclass(frozen=True)
class ViewSettings:
    """The distribution that one view of an image is drawn from.

    The defaults are the first of the two distributions of Zbontar et al. 2021 (appendix A; the
    crop and the interpolation from the authors' code). Operations follow one another in the
    order of the fields.

    Example:
        >>> ViewSettings(blur=0.0).crop_scale
        (0.08, 1.0)
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """area of the crop as a part of the image's"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """width over height of the crop"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """filter the crop is resized with, antialiased"""
    hflip: float = 0.5
    """probability of mirroring left and right"""
    vflip: float = 0.0
    """probability of mirroring top and bottom"""
    quarter_turns: float = 0.0
    """probability of a turn by 0, 90, 180 or 270 degrees, each as likely"""
    rotation: float = 0.0
    """largest angle of a rotation either way, in degrees"""
    translate: float = 0.0
    """largest shift in either direction, as a part of the view's size"""
    zoom: tuple[float, float] = (1.0, 1.0)
    """enlargement"""
    fill: Literal["reflect", "zeros"] = "reflect"
    """what rotation, shift and zoom show beyond the border"""
    jitter: float = 0.8
    """probability of the four changes of colour, in random order"""
    brightness: float = 0.4
    """factor from [1 - brightness, 1 + brightness]"""
    contrast: float = 0.4
    """factor from [1 - contrast, 1 + contrast]"""
    saturation: float = 0.2
    """factor from [1 - saturation, 1 + saturation]"""
    hue: float = 0.1
    """shift from [-hue, hue], in turns of the colour circle"""
    grey: float = 0.2
    """probability of losing all colour"""
    blur: float = 1.0
    """probability of a Gaussian blur"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur in pixels"""
    solarise: float = 0.0
    """probability of inverting the bright half of the values"""
    noise: float = 0.0
    """standard deviation of Gaussian noise, as a part of the range of values"""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            default = type(self).__dataclass_fields__[name].default
            if isinstance(default, tuple):
                object.__setattr__(self, name, _pair(name, value))
            elif isinstance(default, float):
                object.__setattr__(self, name, _number(name, value))
        self._check()

    def replace(self, changes: Mapping[str, Any]) -> "ViewSettings":
        """These settings with some changed.

        Raises:
            UserError: if there is no such setting, or it cannot have that value.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise UserError(f"a view has no setting {name!r}: {hint}")
        return dataclasses.replace(self, **changes)

    def _check(self) -> None:
        for name in ("hflip", "vflip", "quarter_turns", "jitter", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}: it is a probability, give 0 to 1"
                )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(
                f"crop_scale is {self.crop_scale}: give two parts of the area, such as [0.08, 1.0]"
            )
        for name in ("crop_ratio", "zoom", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{name} is {(low, high)}: give two numbers above 0, smaller first")
        for name in (
            "rotation", "translate", "brightness", "contrast", "saturation", "hue", "noise"
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.hue > 0.5:
            raise UserError(f"hue is {self.hue}: half a turn (0.5) is the most there is")
        for name in ("interpolation", "fill"):
            allowed = {"interpolation": ("bicubic", "bilinear"), "fill": ("reflect", "zeros")}[name]
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: give {' or '.join(allowed)}")


_PAPER = ViewSettings()
# For images of 64 pixels and less, as everybody does: nothing to blur, and the smallest crops
# would show a few pixels.
_SMALL = ViewSettings(crop_scale=(0.2, 1.0), interpolation="bilinear", blur=0.0)
_DIGITS = ViewSettings(
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), interpolation="bilinear", hflip=0.0,
    rotation=20.0, translate=0.12, zoom=(0.8, 1.2), fill="zeros",
    jitter=0.0, grey=0.0, blur=0.0, noise=0.1,
)  # fmt: skip
# Seen from above there is no upright: mirrored and turned all ways.
_AERIAL = ViewSettings(crop_scale=(0.2, 1.0), vflip=0.5, quarter_turns=1.0, rotation=45.0, blur=0.5)
# No upright either; colours are stains and mean something, focus and brightness do not.
_MICROSCOPY = ViewSettings(
    crop_scale=(0.3, 1.0), vflip=0.5, quarter_turns=1.0,
    saturation=0.2, hue=0.05, grey=0.0, blur=0.5, noise=0.02,
)  # fmt: skip

PRESETS: dict[str, tuple[ViewSettings, ViewSettings]] = {
    "paper": (_PAPER, dataclasses.replace(_PAPER, blur=0.1, solarise=0.2)),
    "small": (_SMALL, dataclasses.replace(_SMALL, solarise=0.2)),
    "digits": (_DIGITS, _DIGITS),
    "aerial": (_AERIAL, dataclasses.replace(_AERIAL, blur=0.1)),
    "microscopy": (_MICROSCOPY, dataclasses.replace(_MICROSCOPY, blur=0.1)),
}


def view_settings(
    preset: str, view1: Mapping[str, Any] | None, view2: Mapping[str, Any] | None
) -> tuple[ViewSettings, ViewSettings]:
    """The two distributions of a preset, with changes.

    Raises:
        UserError: if there is no such preset or setting, or a value cannot be.
    """
    if preset not in PRESETS:
        raise UserError(f"no views {preset!r}: there are {', '.join(PRESETS)}")
    first, second = PRESETS[preset]
    return first.replace(view1 or {}), second.replace(view2 or {})


def normalisation(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that values in [0, 1] are normalised with by default.

    ImageNet's for 3 channels, as timm and torchvision have them; their means for any other number.
    """
    if in_chans == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.449,) * in_chans, (0.226,) * in_chans
