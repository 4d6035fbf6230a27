"""An encoder as a folder that plain timm loads: `config.json` and `model.safetensors`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from barlow.atomic import write_atomically, write_text
from barlow.data import preprocess_of
from barlow.encoders import STEM_STRIDE, size_args, spec_of
from barlow.errors import UserError, user_error_if_unreadable
from barlow.share.building import LoadedEncoder, build_described, load_weights
from barlow.share.weights_file import read_weights

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")

# timm's ResNets have no 3x3 stem, so one is written as a standard stem that computes the same on an
# enlarged image, in which each pixel is a 4x4 block (2x2 for a stride of 2). The 7x7 stride-2
# convolution reads one position in each neighbouring pixel's block, and the stride-2 convolution
# that timm offers in place of the pooling passes on one of four results. timm's own transform
# enlarges the image.
# For each stem: the positions, of seven, that read the previous pixel, the pixel itself and the
# next one; and the position, of three, whose result is passed on.
_TAPS = {"small": ([0, 2, 5], 2), "padded": ([0, 2, 5], 2), "strided": ([1, 3, 5], 1)}


def save_encoder(encoder: nn.Module, folder: Path) -> None:
    """Write an encoder as a timm folder.

    Args:
        encoder: from `create_encoder` or `load_encoder`, with its `preprocess`. An encoder that
            timm lacks (see `require_timm_support`) is written for `load_encoder` only; timm
            rejects its weights.
        folder: created if needed; its two files are replaced.
    """
    spec, preprocess = spec_of(encoder), preprocess_of(encoder)
    weights = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    model_args = size_args(spec.name, spec.image_size) | spec.model_args
    if spec.uses_feature_maps:
        model_args["global_pool"] = ""  # give the last map, `(N, C, H, W)`: timm lacks our pooling
    size = preprocess.image_size
    interpolation = "bilinear"
    crop: dict[str, object] = {"crop_pct": 1.0, "crop_mode": "center"}
    if spec.stem in _TAPS:
        weights = _enlarge_stem(weights, spec.stem)
        model_args["replace_stem_pool"] = True
        interpolation = "nearest"
        if spec.stem == "padded":
            # The second pixel of padding becomes a border of the image, in the mean colour. timm
            # rounds the inner size down, so a slightly smaller ratio keeps it from being too small.
            crop = {"crop_pct": (size + 2) / size - 1e-6, "crop_mode": "border"}
            size += 2
        size *= STEM_STRIDE["standard"] // STEM_STRIDE[spec.stem]
    config = {
        "architecture": spec.name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [spec.in_chans, size, size],
            "interpolation": interpolation,
            **crop,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": 0,
        },
        "barlow": {"encoder": spec.to_dict(), "preprocess": preprocess.to_dict()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", lambda f: f.write(save(weights)))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def require_timm_support(encoder: nn.Module) -> None:
    """Raise a UserError for an encoder that plain timm cannot compute."""
    if spec_of(encoder).stem == "linear":
        raise UserError(
            "this ResNet has no ReLU after its stem, which timm does not support: export it as "
            "safetensors, onnx or torch-export"
        )


def halve_precision(encoder: nn.Module) -> None:
    """Round the matrices and filters of an encoder to float16 in place, for half the file size.

    Scales, biases and statistics stay float32; loading converts everything back to float32.
    """
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()


def load_timm_folder(folder: Path, name: str) -> LoadedEncoder:
    """Load an encoder from a timm folder, ours or anyone else's; `name` is its name in messages.

    Raises:
        UserError: if a file is missing or damaged, or the weights do not fit the architecture.
    """
    with user_error_if_unreadable(
        name, "is not a complete timm folder, or was written by another version of barlow"
    ):
        config = json.loads((folder / "config.json").read_text())
        files = [folder / file for file in WEIGHTS_FILES]
        weights = read_weights(next((f for f in files if f.exists()), files[0])).tensors
        ours = "barlow" in config
        encoder = build_described(config["barlow"] if ours else _description(config))
        spec = spec_of(encoder)
        if spec.stem in _TAPS:
            weights = _reduce_stem(weights, spec.stem)
    matched = load_weights(encoder, weights, name)
    if ours:
        return LoadedEncoder(encoder)
    data = config.get("pretrained_cfg", config)
    interpolation, crop = data.get("interpolation", "bicubic"), data.get("crop_pct", 0.875)
    origin = (
        f"{name} is a timm model: {spec.name}, {matched}; timm resizes its images with "
        f"{interpolation} interpolation and keeps {crop:.1%} of the shorter side, "
        "encoder.preprocess uses bilinear and keeps all of it"
    )
    return LoadedEncoder(encoder, origin=origin)


def _description(config: dict[str, Any]) -> dict[str, Any]:
    """Convert timm's own configuration of an encoder to our description."""
    data = config.get("pretrained_cfg", config)
    in_chans, image_size, _ = data.get("input_size", (3, 224, 224))
    settled = ("in_chans", "img_size", "num_classes")
    args = {k: v for k, v in config.get("model_args", {}).items() if k not in settled}
    size = {"image_size": image_size, "in_chans": in_chans}
    return {
        "encoder": {"name": config["architecture"], "stem": "standard", "model_args": args, **size},
        "preprocess": {"mean": data.get("mean"), "std": data.get("std"), **size},
    }


def _enlarge_stem(weights: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    weights = dict(weights)
    taps, passed = torch.tensor(_TAPS[stem][0]), _TAPS[stem][1]
    small = weights["conv1.weight"]  # (C, in_chans, 3, 3)
    channels = small.shape[0]
    large = small.new_zeros(*small.shape[:2], 7, 7)
    large[:, :, taps[:, None], taps] = small
    pick = small.new_zeros(channels, channels, 3, 3)
    pick[range(channels), range(channels), passed, passed] = 1
    eps = nn.BatchNorm2d(1).eps
    weights["conv1.weight"] = large
    weights["maxpool.0.weight"] = pick
    # Make this batch norm the identity: variance + eps is one.
    weights["maxpool.1.weight"] = torch.ones(channels)
    weights["maxpool.1.bias"] = torch.zeros(channels)
    weights["maxpool.1.running_mean"] = torch.zeros(channels)
    weights["maxpool.1.running_var"] = torch.full((channels,), 1 - eps)
    weights["maxpool.1.num_batches_tracked"] = torch.tensor(0)
    return weights


def _reduce_stem(weights: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    taps = torch.tensor(_TAPS[stem][0])
    reduced: dict[str, Any] = {k: v for k, v in weights.items() if not k.startswith("maxpool.")}
    reduced["conv1.weight"] = weights["conv1.weight"][:, :, taps[:, None], taps]
    return reduced
