"""In and out: encoders from runs and files, and encoders for other programs."""

from pathlib import Path

from torch import nn

from barlow.checkpoint import load_checkpoint, load_last
from barlow.data import Preprocess
from barlow.encoders import EncoderSpec
from barlow.errors import UserError
from barlow.share.timm_folder import load_timm_folder, load_weights, save_encoder

__all__ = ["load_encoder", "save_encoder"]


def load_encoder(where: str | Path) -> nn.Module:
    """Load an encoder with the preprocessing it was trained with.

    Args:
        where: a run, one of its checkpoints, or a timm folder.

    Returns:
        The encoder in eval mode, `(N, C, H, W) -> (N, num_features)`, with the attributes
        `num_features`, `spec`, and `preprocess`, which turns images into what it expects:
        `encoder(encoder.preprocess(images))`.

    Raises:
        UserError: if there is no encoder at that place, or it does not load safely.
    """
    path = Path(where)
    if path.is_file():
        encoder = _from_checkpoint(load_checkpoint(path), path)
    elif (path / "config.json").exists():
        encoder = load_timm_folder(path)
    elif (path / "encoder" / "config.json").exists():
        encoder = load_timm_folder(path / "encoder")
    elif (state := load_last(path / "checkpoints" / "last.ckpt")) is not None:
        encoder = _from_checkpoint(state, path)
    else:
        raise UserError(
            f"no encoder at {str(where)!r}: give a run, a checkpoint of one, or a timm folder"
        )
    return encoder.eval()


def _from_checkpoint(state: dict[str, object], path: Path) -> nn.Module:
    try:
        spec, preprocess, model = state["encoder"], state["preprocess"], state["model"]
        assert isinstance(spec, dict)
        assert isinstance(preprocess, dict)
        assert isinstance(model, dict)
    except (KeyError, AssertionError) as error:
        raise UserError(f"{path} is not a checkpoint of a run") from error
    encoder = EncoderSpec.from_dict(spec).build()
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    load_weights(encoder, weights, str(path))
    encoder.preprocess = Preprocess(**preprocess)
    return encoder
