"""The architecture of an encoder, inferred from the names and shapes of its weights alone."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from barlow.encoders import EncoderSpec
from barlow.errors import UserError

StateDict = dict[str, Tensor]

# Key: (whether the blocks are bottlenecks, blocks of each stage); value: timm's name.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
# Key: width; value: the size in timm's name. The weights do not show the number of heads: these
# names imply 64 channels per head, and `_with_heads` handles the models that have others.
_VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}

_IMAGE_SIZE = {"standard": 224, "small": 32, "padded": 32}


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder found among the weights of a file.

    Attributes:
        prefix: what the names of its weights begin with.
        weights: its weights under timm's names.
        spec: the description from which it can be built.
    """

    prefix: str
    weights: StateDict
    spec: EncoderSpec


def find_encoder(tensors: StateDict, padded: bool = False) -> FoundEncoder | None:
    """Find the encoder among the weights of a file.

    Args:
        tensors: all weights by name.
        padded: whether a 3x3 stem pads by two pixels, which the weights do not show.

    Returns:
        The encoder, or None if no known architecture is among the weights.

    Raises:
        UserError: if the architecture is known but this variant of it is not supported.
    """
    for pattern, rename, infer in _FAMILIES:
        prefixes = {m[1] for name in tensors if (m := re.match(pattern, name))}
        if prefixes:
            # Prefer the trained weights to an averaged copy, and an outer module to a nested one.
            prefix = min(prefixes, key=lambda p: (bool(_AVERAGED.search(p)), len(p), p))
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            weights = rename(inside)
            spec = infer(weights, padded)
            if rename is _sequential_names:
                spec = _with_stem(spec, prefix, _first_layer(inside) - 2)
            if infer is _infer_vit:
                spec = _with_heads(spec, prefix, weights, tensors)
            return FoundEncoder(prefix, weights, spec)
    return None


_AVERAGED = re.compile(r"momentum|teacher|target|(?:^|[._])(?:ema|k|key)(?:[._]|$)")


def torchvision_names(weights: StateDict) -> StateDict:
    """Rename the weights of a plain vision transformer from timm's to torchvision's names.

    For ResNets the two are the same; weights of other architectures keep timm's names.
    """
    if not all(re.fullmatch(_PLAIN_VIT, name) for name in weights):
        return weights
    return {_rename(name, reverse=True): value for name, value in weights.items()}


def timm_names(weights: StateDict) -> StateDict:
    """The inverse of `torchvision_names`."""
    return _vit_names(weights) if "class_token" in weights else weights


def _resnet_names(weights: StateDict) -> StateDict:
    # lightly's own ResNets call the downsampling branch `shortcut`.
    return {name.replace(".shortcut.", ".downsample."): v for name, v in weights.items()}


def _sequential_names(weights: StateDict) -> StateDict:
    """Rename a ResNet whose children are in an `nn.Sequential`, numbered instead of named."""
    layer1 = _first_layer(weights)
    names = {"0": "conv1", "1": "bn1"} | {str(layer1 + i): f"layer{i + 1}" for i in range(4)}
    renamed = {}
    for name, value in weights.items():
        number, _, rest = name.partition(".")
        renamed[f"{names.get(number, number)}.{rest}"] = value
    return _resnet_names(renamed)


def _first_layer(weights: StateDict) -> int:
    return min(int(m[1]) for name in weights if (m := re.match(r"(\d+)\.0\.conv1\.", name)))


def _infer_resnet(weights: StateDict, padded: bool) -> EncoderSpec:
    conv1 = weights.get("conv1.weight")
    if conv1 is None or conv1.ndim != 4 or conv1.shape[-1] not in (3, 7):
        raise UserError("its ResNet's stem is not one 7x7 or 3x3 convolution")
    bottleneck = "layer1.0.conv3.weight" in weights
    blocks = tuple(
        len({m[1] for name in weights if (m := re.match(rf"layer{i}\.(\d+)\.", name))})
        for i in range(1, 5)
    )
    last = "conv3" if bottleneck else "conv2"
    outs = [weights[f"layer{i}.0.{last}.weight"].shape[0] for i in range(1, 5) if blocks[i - 1]]
    if len(outs) < 4:
        raise UserError(f"its ResNet has {len(outs)} stages, not 4")
    planes = [n // 4 if bottleneck else n for n in outs]
    args: dict[str, Any] = {}
    if planes != [64, 128, 256, 512]:
        args["channels"] = planes
    if bottleneck:  # perhaps a ResNeXt or a wide ResNet
        width, per_group = weights["layer1.0.conv2.weight"].shape[:2]
        groups = width // per_group
        if (base := width * 64 // (planes[0] * groups)) != 64 or groups != 1:
            args |= {"cardinality": groups, "base_width": base}
    name = _RESNETS.get((bottleneck, blocks))
    if name is None:
        name, args["layers"] = "resnet50" if bottleneck else "resnet18", list(blocks)
    stem: Literal["standard", "small", "padded"] = "padded" if padded else "small"
    if conv1.shape[-1] == 7:
        stem = "standard"
    return EncoderSpec(name, _IMAGE_SIZE[stem], conv1.shape[1], stem, args)


def _with_stem(spec: EncoderSpec, prefix: str, between: int) -> EncoderSpec:
    """Infer a sequential ResNet's stem from the number of modules between batch norm and layer1."""
    if spec.stem == "standard":
        if between < 2:
            raise UserError("its ResNet has no ReLU or no pooling after its 7x7 stem")
    elif between == 0:  # lightly's own ResNets call ReLU as a function, not a module
        return replace(spec, stem="linear")
    elif between == 2 and prefix == "f.":  # elsewhere the second may be an `nn.Identity`
        raise UserError(
            "its ResNet has pooling after a 3x3 stem, as Barlow-Twins-HSIC and mix-bt use for "
            "images larger than CIFAR's"
        )
    return spec


def _with_heads(
    spec: EncoderSpec, prefix: str, weights: StateDict, tensors: StateDict
) -> EncoderSpec:
    """Set the 12 heads of the tiny and small transformers of MoCo v3, and of MAE after it.

    They are recognised by fixed position embeddings that are zero for the class token. timm's
    transformers inside lightly's and stable-pretraining's models, under `vit.`, have these too.
    """
    small = spec.name.startswith(("vit_tiny", "vit_small"))
    if not small or prefix.endswith("vit.") or weights["pos_embed"][:, 0].any():
        return spec
    if prefix.endswith("base_encoder.") or "classifier.weight" in tensors:  # moco-v3, solo-learn
        return replace(spec, model_args=spec.model_args | {"num_heads": 12})
    raise UserError(
        "its position embeddings are fixed as in MoCo v3 and MAE, whose small transformers have "
        "12 heads where timm's have fewer, and the weights do not tell which: put them in a "
        "folder as model.safetensors, "
        f'beside a config.json with {{"architecture": "{spec.name}", "model_args": '
        '{"num_heads": 12}}, or without model_args'
    )


def _infer_vit(weights: StateDict, padded: bool) -> EncoderSpec:
    width, in_chans, patch = weights["patch_embed.proj.weight"].shape[:3]
    if width not in _VITS or "cls_token" not in weights or "pos_embed" not in weights:
        raise UserError(
            "its vision transformer is not timm's tiny, small, base or large with a class token"
        )
    depth = len({m[1] for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))})
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    size = _VITS[width]
    args: dict[str, Any] = {"patch_size": patch} if patch != 16 else {}
    if depth != (24 if size == "large" else 12):
        args["depth"] = depth
    return EncoderSpec(f"vit_{size}_patch16_224", side * patch, in_chans, "standard", args)


_PLAIN_VIT = (
    r"cls_token|pos_embed|patch_embed\.proj\.\w+|norm\.\w+"
    r"|blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.\w+"
)
# Names of the parts of a vision transformer: timm's and torchvision's.
_VIT_NAMES = [
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    (".attn.qkv.", ".self_attention.in_proj_"),
    (".attn.proj.", ".self_attention.out_proj."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
    ("blocks.", "encoder.layers.encoder_layer_"),
    ("norm.", "encoder.ln."),
]


def _rename(name: str, reverse: bool = False) -> str:
    for ours, theirs in _VIT_NAMES:
        old, new = (ours, theirs) if reverse else (theirs, ours)
        if old.startswith(".") and old in name:
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _vit_names(weights: StateDict) -> StateDict:
    return {_rename(name): value for name, value in weights.items()}


# For each family of architectures: a pattern for the weight name that identifies it (group 1 is the
# prefix), how to rename its weights to timm's names, and how to infer its spec from their shapes.
_FAMILIES: list[
    tuple[str, Callable[[StateDict], StateDict], Callable[[StateDict, bool], EncoderSpec]]
] = [
    (r"((?:.*\.)?)layer1\.0\.conv1\.weight$", _resnet_names, _infer_resnet),
    # Stages of other architectures, such as a Swin transformer, are excluded.
    (r"((?:.*\.)?)(?<!layers\.\d\.)blocks\.0\.attn\.qkv\.weight$", dict, _infer_vit),
    (r"((?:.*\.)?)encoder\.layers\.encoder_layer_0\.ln_1\.weight$", _vit_names, _infer_vit),
    (r"((?:.*\.)?)\d+\.0\.conv1\.weight$", _sequential_names, _infer_resnet),
]
