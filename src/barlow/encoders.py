"""Encoders from timm, with a stem for small images."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow.errors import UserError, one_line

Stem = Literal["auto", "standard", "small", "padded", "linear", "strided"]

STEM_STRIDE = {"standard": 4, "small": 1, "padded": 1, "linear": 1, "strided": 2}
"""By how much a ResNet's stem reduces an image's height and width."""

# At and below this size a ResNet's stride-2 convolution and pooling throw most of the image away.
_SMALL_IMAGE = 64


@dataclass(frozen=True)
class EncoderSpec:
    """The resolved arguments of `create_encoder`, from which an encoder can be rebuilt."""

    name: str
    image_size: int
    in_chans: int
    stem: Literal["standard", "small", "padded", "linear", "strided"]
    model_args: dict[str, Any] = field(default_factory=dict)
    pool: int = 1
    stages: int = 1

    @property
    def uses_feature_maps(self) -> bool:
        """Whether the representation consists of averaged feature maps instead of timm's output."""
        return self.pool > 1 or self.stages > 1

    def build(self, pretrained: bool = False) -> nn.Module:
        """Build the encoder, freshly initialised or with timm's supervised weights."""
        return create_encoder(
            self.name,
            image_size=self.image_size,
            in_chans=self.in_chans,
            pretrained=pretrained,
            stem=self.stem,
            pool=self.pool,
            stages=self.stages,
            **self.model_args,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored beside the weights."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderSpec":
        """The inverse of `to_dict`, for values that may come from an untrusted file.

        Raises:
            UserError: if another version wrote the values, or one of them is an argument of
                `timm.create_model` that would make it load something else.
        """
        import timm

        try:
            spec = cls(**values)
        except TypeError as error:
            raise UserError(f"encoder not supported by this version of barlow: {error}") from error
        outside = inspect.signature(timm.create_model).parameters  # such as checkpoint_path
        for argument in spec.model_args:
            if argument in outside or argument.startswith("pretrained"):
                raise UserError(f"{argument!r} is not an architecture argument: refused")
        return spec


def create_encoder(
    name: str,
    image_size: int = 224,
    in_chans: int = 3,
    pretrained: bool = False,
    *,
    stem: Stem = "auto",
    pool: int = 1,
    stages: int = 1,
    **model_args: Any,
) -> nn.Module:
    """Create an encoder: any timm architecture without its classifier.

    Args:
        name: a timm name, such as "resnet18", "vit_small_patch16_224" or "convnext_tiny".
        image_size: height and width of the views in pixels.
        in_chans: number of image channels.
        pretrained: start from timm's supervised weights (downloaded) instead of random ones.
        stem: first layers of the encoder; all but "auto" and "standard" need a ResNet.

            - "standard": timm's own; for a ResNet a 7x7 stride-2 convolution and pooling.
            - "small": a 3x3 stride-1 convolution and no pooling, as is usual for CIFAR.
            - "padded": "small" padded by two pixels instead of one, as in solo-learn.
            - "linear": "small" without the ReLU after it, as in lightly's own ResNets (examples).
            - "strided": "small" with a stride of two, for a quarter of the computation.
            - "auto": "small" for a ResNet at 64 pixels or less, else "standard".
        pool: side of the grid that each feature map is averaged to. With one stage, 1 is timm's own
            pooling; 2 keeps the four quadrants apart (as Coates et al. 2011 did with patches), for
            four times the features.
        stages: number of last stages (of a transformer: blocks) whose maps are concatenated into
            the representation. More than one helps most after short trainings and for linear
            classifiers.
        **model_args: arguments of timm's constructor, such as `channels=(32, 64, 128, 256)`.

    Returns:
        A module `(N, in_chans, image_size, image_size) -> (N, num_features)` with the attributes
        `num_features` and `spec`.

    Raises:
        UserError: if timm has no such architecture, the architecture has no such argument or stem
            or too few stages, or timm's weights cannot be downloaded.

    Example:
        >>> create_encoder("resnet18", image_size=32).num_features
        512
        >>> create_encoder("resnet18", image_size=32, pool=2, stages=2).num_features
        3072
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"unknown encoder {name!r}: {_nearest(name)}")
    try:
        encoder: nn.Module = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0,
            in_chans=in_chans,
            **{**size_args(name, image_size), **model_args},
        )
    except TypeError as error:
        raise UserError(f"encoder {name!r} does not accept these arguments: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        # timm and the hub raise various errors if the weights do not exist or cannot be reached.
        raise UserError(
            f"cannot load supervised weights for {name!r}: {one_line(error, 200)}"
        ) from error
    has_resnet_stem = _has_resnet_stem(encoder)
    if stem not in ("auto", "standard") and not has_resnet_stem:
        raise UserError(f"encoder {name!r} has no 7x7 ResNet stem to change: leave --stem at auto")
    if stem == "auto":
        stem = "small" if has_resnet_stem and image_size <= _SMALL_IMAGE else "standard"
    if stem != "standard":
        _replace_stem(encoder, STEM_STRIDE[stem], padding=2 if stem == "padded" else 1)
    if stem == "linear":
        encoder.act1 = nn.Identity()
    spec = EncoderSpec(name, image_size, in_chans, stem, model_args, pool, stages)
    encoder.spec = spec  # type: ignore[assignment]
    if spec.uses_feature_maps:
        _represent_by_maps(encoder)
    return encoder


def pooled_forward_and_width(encoder: nn.Module) -> tuple[Callable[[Tensor], Tensor], int]:
    """The projector's input: the encoder with timm's own pooling of the last map, and its width.

    This is so even if the representation consists of several maps: training on all of them was no
    better (docs/recipe.md), and the projector's input was many times as wide.
    """
    width = getattr(encoder, "pooled_width", encoder.num_features)
    assert isinstance(width, int)
    return getattr(encoder, "pooled_forward", encoder), width


def fresh_copy(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with new random weights: the baseline "without pretraining".

    Args:
        encoder: an encoder from `create_encoder` or `load_encoder`.
        seed: of the initialisation.

    Returns:
        A new module, with the preprocessing of the given one, if any.
    """
    with torch.random.fork_rng(devices=[]):  # parameters are drawn on the CPU
        torch.manual_seed(seed)
        copy = spec_of(encoder).build()
    if hasattr(encoder, "preprocess"):
        copy.preprocess = encoder.preprocess
    return copy


def spec_of(encoder: nn.Module) -> EncoderSpec:
    """The spec of an encoder; a UserError if it was not created or loaded by this package."""
    spec = getattr(encoder, "spec", None)
    if not isinstance(spec, EncoderSpec):
        raise UserError(
            f"this {type(encoder).__name__} does not say how it was built: "
            "create it with barlow.create_encoder or load it with barlow.load_encoder"
        )
    return spec


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    import timm

    near = get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}timm.list_models() lists all names"


def size_args(name: str, image_size: int) -> dict[str, int]:
    """timm's arguments for the image size: none, unless the architecture has a fixed size."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _has_resnet_stem(encoder: nn.Module) -> bool:
    conv, pool = getattr(encoder, "conv1", None), getattr(encoder, "maxpool", None)
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (7, 7)
        and conv.stride == (2, 2)
        and isinstance(pool, nn.MaxPool2d)
    )


@torch.no_grad()
def _represent_by_maps(encoder: nn.Module) -> None:
    """Make the representation the maps of the last stages, each averaged to a grid."""
    spec = spec_of(encoder)
    encoder.eval()
    image = torch.zeros(1, spec.in_chans, spec.image_size, spec.image_size)
    maps = encoder.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
    # A stage without blocks returns the map of the stage before it, which must count only once.
    new = [i for i, each in enumerate(maps) if all(each is not other for other in maps[:i])]
    if len(new) < spec.stages:
        raise UserError(
            f"encoder {spec.name!r} has {len(new)} stages: --stages must not exceed that"
        )
    encoder.kept_maps = new[-spec.stages :]  # type: ignore[assignment]
    encoder.pooled_forward, encoder.pooled_width = encoder.forward, encoder.num_features  # type: ignore[assignment]
    encoder.forward = partial(_pooled_maps, encoder)  # unlike a bound method, it can be pickled
    encoder.num_features = encoder(image).shape[1]
    encoder.train()


def _pooled_maps(encoder: Any, image: Tensor) -> Tensor:
    """The last maps, each averaged to a grid: `(N, C, H, W) -> (N, F)`."""
    maps = encoder.forward_intermediates(
        image, indices=encoder.kept_maps, norm=True, stop_early=True, intermediates_only=True
    )
    side = encoder.spec.pool
    return torch.cat([F.adaptive_avg_pool2d(each, side).flatten(1) for each in maps], dim=1)


def _replace_stem(encoder: nn.Module, stride: int, padding: int) -> None:
    old = encoder.conv1
    assert isinstance(old, nn.Conv2d)
    conv = nn.Conv2d(old.in_channels, old.out_channels, 3, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    encoder.conv1 = conv
    encoder.maxpool = nn.Identity()
