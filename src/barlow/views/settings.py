"""Settings of a view's distribution, the presets, and the default normalisation."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from barlow.errors import UserError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewSettings:
    """The distribution of one view; the defaults are the paper's first view (appendix A).

    Operations are applied in the order of the fields. A pair is the range of a uniform draw. A
    probability of 0 (or a range of zero width) turns the operation off at no cost.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width / height, drawn uniformly in its logarithm."""
    horizontal_flip: float = 0.5
    """Probability of a left-right flip."""
    vertical_flip: float = 0.0
    """Probability of an upside-down flip."""
    rotation: float = 0.0
    """Maximum rotation in degrees, to either side; 180 allows every rotation."""
    translation: float = 0.0
    """Maximum shift as a share of the width and of the height, to either side."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Magnification after the crop."""
    shear: float = 0.0
    """Maximum shear in degrees, to either side, along the rows."""
    border: str = "zeros"
    """Fill of pixels that come from outside the crop: `zeros` or `reflection`."""
    jitter: float = 0.8
    """Probability of the next four colour changes, applied together in random order. Their values
    are strengths, as in torchvision's `ColorJitter`."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    greyscale: float = 0.2
    """Probability of conversion to greyscale."""
    blur: float = 1.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view."""
    solarise: float = 0.0
    """Probability of inverting the pixels at or above the threshold."""
    solarise_threshold: float = 128 / 255
    """Threshold on the scale from 0 (black) to 1 (white)."""
    noise: float = 0.0
    """Probability of adding Gaussian noise."""
    noise_std: tuple[float, float] = (0.0, 0.1)
    """Standard deviation of the noise, on the scale from 0 (black) to 1 (white)."""

    def __post_init__(self) -> None:
        """Reject values that no view can be drawn from.

        Raises:
            UserError: if a value is out of range or of the wrong type.
        """
        for field in dataclasses.fields(self):
            if field.type is float and not isinstance(value := getattr(self, field.name), Real):
                raise UserError(f"{field.name} must be a number, not {value!r}")
        for name in (
            "horizontal_flip", "vertical_flip", "jitter", "greyscale", "blur", "solarise", "noise",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{name} must be a probability from 0 to 1, not {getattr(self, name)}"
                )
        for name in ("crop_scale", "crop_ratio", "zoom", "blur_sigma", "noise_std"):
            pair = getattr(self, name)
            if not _is_pair(pair) or not 0 <= pair[0] <= pair[1]:
                raise UserError(f"{name} must be a range of two numbers, low then high, not {pair}")
            object.__setattr__(self, name, tuple(pair))  # a recipe contains lists
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: a strength must not be negative")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(
                "crop_scale must be a share of the image, above 0 and at most 1, "
                f"not {self.crop_scale}"
            )
        if self.crop_ratio[0] <= 0 or self.zoom[0] <= 0 or self.blur_sigma[0] <= 0:
            raise UserError("crop_ratio, zoom and blur_sigma must be greater than 0")
        if not 0 <= self.hue <= 0.5:
            raise UserError(
                f"hue must be a share of the colour circle from 0 to 0.5, not {self.hue}"
            )
        if self.border not in ("zeros", "reflection"):
            raise UserError(f"border must be `zeros` or `reflection`, not {self.border!r}")

    @property
    def needs_affine(self) -> bool:
        """Whether the view is rotated, shifted, magnified or sheared after the crop."""
        return bool(self.rotation or self.translation or self.shear) or self.zoom != (1.0, 1.0)


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(number, Real) for number in value)
    )


_PAPER = ViewSettings()
_PAPER2 = dataclasses.replace(_PAPER, blur=0.1, solarise=0.2)
# Blur at 32 pixels removes what there is to learn; 0.2 is the usual smallest crop at that size.
_SMALL = dataclasses.replace(_PAPER, crop_scale=(0.2, 1.0), blur=0.0)
_SMALL2 = dataclasses.replace(_SMALL, solarise=0.2)
# A mirrored or upside-down digit is a different digit, and a small crop of one is not a digit.
_DIGITS = ViewSettings(
    crop_scale=(0.6, 1.0), horizontal_flip=0.0, rotation=20.0, translation=0.12, zoom=(0.8, 1.15),
    shear=15.0, jitter=0.0, greyscale=0.0, blur=0.0, noise=0.5, noise_std=(0.0, 0.15),
)  # fmt: skip
# Seen from above, images have no upright direction; the colours of ground and water carry
# information, so the hue changes less.
_AERIAL = ViewSettings(
    crop_scale=(0.2, 1.0), vertical_flip=0.5, rotation=180.0, border="reflection", hue=0.05,
    greyscale=0.1, blur=0.5, blur_sigma=(0.1, 1.5),
)  # fmt: skip
# Stains differ from laboratory to laboratory in strength and tint, and focus from slide to slide.
_MICROSCOPY = ViewSettings(
    crop_scale=(0.3, 1.0), vertical_flip=0.5, rotation=180.0, border="reflection", saturation=0.4,
    hue=0.08, greyscale=0.1, blur=0.5, blur_sigma=(0.1, 1.5), noise=0.3, noise_std=(0.0, 0.05),
)  # fmt: skip

PRESETS: dict[str, tuple[ViewSettings, ViewSettings]] = {
    "paper": (_PAPER, _PAPER2),
    "small": (_SMALL, _SMALL2),
    "digits": (_DIGITS, _DIGITS),
    "aerial": (_AERIAL, _AERIAL),
    "microscopy": (_MICROSCOPY, _MICROSCOPY),
}
"""The two distributions of each preset, by its name."""


def view_settings(
    preset: str = "paper",
    view1: Mapping[str, Any] | None = None,
    view2: Mapping[str, Any] | None = None,
) -> tuple[ViewSettings, ViewSettings]:
    """The two distributions of a preset, with some fields replaced.

    Args:
        preset: a name in `PRESETS`.
        view1: fields of the first view's `ViewSettings` to replace.
        view2: fields of the second view's `ViewSettings` to replace.

    Returns:
        The settings of the first and the second view.

    Raises:
        UserError: if the preset or a field does not exist, or a value is out of range.

    Example:
        >>> first, second = view_settings("small", view2={"solarise": 0.0})
        >>> first.blur, second.solarise
        (0.0, 0.0)
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{_nearest(preset, PRESETS)}")
    first, second = PRESETS[preset]
    return _replaced(first, view1, "view1"), _replaced(second, view2, "view2")


def default_mean_std(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel for images of unknown statistics.

    Args:
        in_chans: number of image channels.

    Returns:
        On the scale from 0 to 1: ImageNet's for 3 channels, else 0.5 and 0.25 for each.
    """
    if in_chans == 3:
        return _IMAGENET_MEAN, _IMAGENET_STD
    return (0.5,) * in_chans, (0.25,) * in_chans


def _replaced(
    settings: ViewSettings, changes: Mapping[str, Any] | None, which: str
) -> ViewSettings:
    changes = changes or {}
    names = {field.name: None for field in dataclasses.fields(ViewSettings)}
    for name in changes:
        if name not in names:
            raise UserError(f"{which} has no setting {name!r}{_nearest(name, names)}")
    return dataclasses.replace(settings, **changes)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(known)}"
