"""`load_encoder`: load an encoder from wherever it is, recognised by its content."""

import json
import logging
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import nn

from barlow.checkpoint import load_last
from barlow.data.hub import PREFIX as HUB_PREFIX
from barlow.errors import UserError, user_error_if_unreadable
from barlow.share import hub
from barlow.share.architectures import timm_names
from barlow.share.building import LoadedEncoder, build_described, load_weights
from barlow.share.foreign import load_foreign
from barlow.share.projectors import find_projector
from barlow.share.timm_folder import load_timm_folder
from barlow.share.weights_file import read_weights

log = logging.getLogger(__name__)

_SHIPPED = files("barlow") / "shipped"


def load_encoder(where: str | Path) -> nn.Module:
    """Load an encoder with the preprocessing it was trained with.

    Args:
        where: what to load; a file is recognised by its content.

            - The name of an encoder that ships with this package (see `shipped_encoders`).
            - A run, or one of its checkpoints.
            - A timm folder.
            - A file of weights of another project (facebookresearch/barlowtwins, solo-learn,
              lightly, stable-pretraining, torchvision, ...), or a safetensors file from
              `barlow export`.
            - `hf://OWNER/NAME[@REVISION][/FILE]`, a model on the Hugging Face hub.

    Returns:
        The encoder in eval mode, `(N, C, H, W) -> (N, num_features)`, with the attributes

        - `preprocess`: turns images into the encoder's input,
          `encoder(encoder.preprocess(images))`;
        - `num_features` and `spec`;
        - `origin`: for an encoder of another project, a line on which weights were matched, left
          out and missing. It is also logged.

    Raises:
        UserError: if there is no encoder at that place, it cannot be loaded safely, or its weights
            do not fit the architecture.
    """
    loaded = load_with_projector(where)
    if loaded.origin:
        log.info(loaded.origin)
    return loaded.encoder


def load_with_projector(where: str | Path) -> LoadedEncoder:
    """`load_encoder`, but with the projector if there is one, and without logging."""
    if str(where).startswith(HUB_PREFIX):
        loaded = _load_path(hub.download(str(where)), str(where))
    elif str(where) in shipped_encoders():
        with as_file(_SHIPPED / str(where)) as folder:
            loaded = load_timm_folder(folder, str(where))
    else:
        loaded = _load_path(Path(where), str(where))
    loaded.encoder.origin = loaded.origin  # type: ignore[assignment]
    loaded.encoder.eval()
    return loaded


def shipped_encoders() -> list[str]:
    """Names of the encoders that ship with the package."""
    return sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir() and p.name[0] != "_")


def _load_path(path: Path, name: str) -> LoadedEncoder:
    if path.is_file():
        return _load_file(path, name)
    if (path / "config.json").exists():
        return load_timm_folder(path, name)
    if (path / "encoder" / "config.json").exists():
        return load_timm_folder(path / "encoder", name)
    if (state := load_last(path / "checkpoints" / "last.ckpt")) is not None:
        return LoadedEncoder(_load_checkpoint(state, name).encoder)
    raise UserError(
        f"no encoder at {name!r}: give a run, a checkpoint, a timm folder, "
        f"{HUB_PREFIX}OWNER/NAME for a model on the Hugging Face hub, or "
        f"{' or '.join(shipped_encoders())}, which comes with this package"
    )


def _load_file(path: Path, name: str) -> LoadedEncoder:
    weights = read_weights(path)
    if "barlow" in weights.metadata:
        with user_error_if_unreadable(name):
            encoder = build_described(json.loads(weights.metadata["barlow"]))
        load_weights(encoder, timm_names(weights.tensors), name)
        return LoadedEncoder(encoder)
    if {"encoder", "preprocess", "model"} <= weights.state.keys():
        return _load_checkpoint(weights.state, name)
    return load_foreign(weights, name)


def _load_checkpoint(state: dict[str, Any], name: str) -> LoadedEncoder:
    with user_error_if_unreadable(name):
        model = state["model"]
        encoder = build_described(state)
    weights = {k.removeprefix("encoder."): v for k, v in model.items() if k.startswith("encoder.")}
    load_weights(encoder, weights, name)
    return LoadedEncoder(encoder, find_projector(model))
