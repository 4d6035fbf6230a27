"""Projectors of other projects, with their weights renamed to those of `create_projector`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from barlow.model import create_projector

_PREFIXES = (
    *("projector.", "projection_head.layers.", "projection_head.projection_head."),
    *("projection_head.", "g."),
)
# These mark MSN and DINO, whose heads have such names too but GELUs where ours have ReLUs.
_OTHER_HEADS = ("prototypes", "projection_head.last_layer.")
# The layers of dame-cell/barlow-twins as positions in `create_projector`.
_DAME_CELL = {"fc1": "0", "bn1": "1", "fc2": "3", "bn2": "4", "fc3": "6"}


def find_projector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Find the projector among the weights of a file.

    A bias before a batch norm is subtracted from its running mean. A bias in the last layer is
    dropped, because the loss normalises the embeddings. Neither changes anything in training.

    Args:
        tensors: all weights by name.

    Returns:
        The state dict of a projector from `create_projector`; empty if none has its architecture.
    """
    prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in tensors)), None)
    if prefix is None or any(k.startswith(_OTHER_HEADS) for k in tensors):
        return {}
    found = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            found[f"{_DAME_CELL.get(layer, layer)}.{rest}"] = value
    for name in [k for k in found if re.fullmatch(r"\d+\.bias", k)]:
        at = int(name.removesuffix(".bias"))
        if found.get(f"{at}.weight", torch.empty(0)).ndim == 2:
            bias, mean = found.pop(name), f"{at + 1}.running_mean"
            if mean in found:
                found[mean] = found[mean] - bias
    for name in [k for k in found if k.endswith("running_mean")]:
        found.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    widths = widths_of(found)
    if len(widths) < 2:
        return {}
    with torch.device("meta"):
        like = create_projector(widths[0], widths[1:]).state_dict()
    fits = {k: v.shape for k, v in like.items()} == {k: v.shape for k, v in found.items()}
    return found if fits else {}


def start_projector(projector: nn.Module, weights: dict[str, Tensor]) -> str:
    """Give a new projector the weights of a trained one, if they have the same widths.

    Args:
        projector: from `create_projector`.
        weights: from `find_projector`; may be empty.

    Returns:
        A line that says what was done.
    """
    if not weights:
        return "the projector starts from scratch: the file has none like it"
    ours, theirs = ("-".join(map(str, widths_of(w))) for w in (projector.state_dict(), weights))
    if ours != theirs:
        return f"the projector starts from scratch: the file's is {theirs}, this one is {ours}"
    projector.load_state_dict(weights)
    return f"the projector also starts from the file: {theirs}"


def widths_of(projector: Mapping[str, Tensor]) -> list[int]:
    """The width of the projector's input, then of each layer."""
    linear = sorted(
        (int(name.split(".")[0]), value.shape)
        for name, value in projector.items()
        if value.ndim == 2 and re.fullmatch(r"\d+\.weight", name)
    )
    return [linear[0][1][1], *(shape[0] for _, shape in linear)] if linear else []
