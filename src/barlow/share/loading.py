"""`load_encoder`: load an encoder from wherever it is, recognised by its content."""

import json
import logging
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import nn

from barlow.checkpoint import load_last
from barlow.errors import UserError, reading
from barlow.share import hub
from barlow.share.architectures import timm_names
from barlow.share.foreign import load_foreign
from barlow.share.loaded import Loaded, built, load_weights
from barlow.share.projectors import find_projector
from barlow.share.reading import read_weights
from barlow.share.timm_folder import load_timm_folder

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
    loaded = load(where)
    if loaded.origin:
        log.info(loaded.origin)
    return loaded.encoder


def load(where: str | Path) -> Loaded:
    """`load_encoder`, with the projector if there is one, and without logging."""
    if str(where).startswith(hub.PREFIX):
        loaded = _at(hub.download(str(where)), str(where))
    elif str(where) in shipped_encoders():
        with as_file(_SHIPPED / str(where)) as folder:
            loaded = load_timm_folder(folder, str(where))
    else:
        loaded = _at(Path(where), str(where))
    loaded.encoder.origin = loaded.origin  # type: ignore[assignment]
    loaded.encoder.eval()
    return loaded


def shipped_encoders() -> list[str]:
    """Names of the encoders that ship with the package."""
    return sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir() and p.name[0] != "_")


def _at(path: Path, told: str) -> Loaded:
    if path.is_file():
        return _in_file(path, told)
    if (path / "config.json").exists():
        return load_timm_folder(path, told)
    if (path / "encoder" / "config.json").exists():
        return load_timm_folder(path / "encoder", told)
    if (state := load_last(path / "checkpoints" / "last.ckpt")) is not None:
        return Loaded(_of_run(state, told).encoder)
    raise UserError(
        f"no encoder at {told!r}: give a run, a checkpoint, a timm folder, "
        f"{hub.PREFIX}OWNER/NAME for a model of the Hugging Face hub, or "
        f"{' or '.join(shipped_encoders())}, which comes with this package"
    )


def _in_file(path: Path, told: str) -> Loaded:
    weights = read_weights(path)
    if "barlow" in weights.metadata:
        with reading(told):
            encoder = built(json.loads(weights.metadata["barlow"]))
        load_weights(encoder, timm_names(weights.tensors), told)
        return Loaded(encoder)
    if {"encoder", "preprocess", "model"} <= weights.state.keys():
        return _of_run(weights.state, told)
    return load_foreign(weights, told)


def _of_run(state: dict[str, Any], told: str) -> Loaded:
    with reading(told):
        model = state["model"]
        encoder = built(state)
    weights = {k.removeprefix("encoder."): v for k, v in model.items() if k.startswith("encoder.")}
    load_weights(encoder, weights, told)
    return Loaded(encoder, find_projector(model))
