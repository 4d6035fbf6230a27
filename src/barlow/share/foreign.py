"""Encoders of other projects: which project, which weights, what is left out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.share.architectures import find_encoder
from barlow.share.projectors import find_projector
from barlow.share.reading import Weights
from barlow.share.timm_folder import load_weights


@dataclass(frozen=True)
class Loaded:
    """An encoder from somewhere.

    Attributes:
        encoder: with its `preprocess`.
        projector: the state of the projector it was trained with, if that is there and like ours.
        origin: for a file of another project, one line on what was recognised and left out.
    """

    encoder: nn.Module
    projector: dict[str, Tensor] = field(default_factory=dict)
    origin: str = ""


class _Project(NamedTuple):
    name: str
    container: str | None  # where its files keep the weights
    mark: str  # what one of their names begins with
    padded: bool = False  # whether its 3x3 stem pads by two pixels


# The first that a file is like is told as its origin.
_PROJECTS = (
    _Project("dame-cell/barlow-twins", "model_state_dict", "projector.fc1."),
    _Project("facebookresearch/barlowtwins", "model", "projector."),
    _Project("lightly", "state_dict", "projection_head."),
    _Project("solo-learn", "state_dict", "classifier.", padded=True),
    _Project("stable-pretraining", "state_dict", "callbacks_"),
    _Project("Lightning", "state_dict", ""),
    _Project("torchvision", None, "fc."),
)

# What stands on an encoder in one module with it, and is left out.
_CLASSIFIERS = ("fc.", "head.", "heads.", "linear.", "classifier.")


def load_foreign(weights: Weights, where: str) -> Loaded:
    """Build the encoder that the weights of another project are of.

    Args:
        weights: of the file.
        where: the file, for messages.

    Raises:
        UserError: if no known architecture is among them, or they do not fit it.
    """
    project = next((p for p in _PROJECTS if _is_of(p, weights)), None)
    try:
        found = find_encoder(weights.tensors, padded=project is not None and project.padded)
    except UserError as error:
        raise UserError(f"the weights in {where} cannot be used: {error}") from error
    if found is None:
        raise UserError(
            f"{where} has no weights of a ResNet or vision transformer, but of "
            f"{_counted(weights.tensors)}; for another timm architecture, put them in a folder as "
            'model.safetensors, beside a config.json that says {"architecture": NAME}'
        )
    encoder = found.spec.build()
    wanted = encoder.state_dict()
    unknown = [k for k in found.weights if k not in wanted and not k.startswith(_CLASSIFIERS)]
    if unknown:
        raise UserError(
            f"the weights in {where} do not fit: {found.spec.name} has no {unknown[0]}, nor "
            f"{len(unknown) - 1} more"
        )
    missing = load_weights(encoder, found.weights, where)
    encoder.preprocess = Preprocess(found.spec.image_size, in_chans=found.spec.in_chans)
    left_out = [k for k in found.weights if k not in wanted]
    left_out += [k for k in weights.tensors if not k.startswith(found.prefix)]
    origin = (
        f"{where} is {'a checkpoint of ' + project.name if project else 'a file of weights'}: "
        f"{found.spec.name}{_STEMS[found.spec.stem]}, {len(wanted) - len(missing)} of "
        f"{len(wanted)} weights matched; left out: {_counted(left_out)}; "
        f"missing: {_counted(name.rpartition('.')[2] for name in missing)}; "
        f"taken to expect images of {found.spec.image_size} pixels, normalised as ImageNet's are"
    )
    return Loaded(encoder, find_projector(weights.tensors), origin)


_STEMS = {
    "standard": "",
    "small": " with a 3x3 stem and no pooling",
    "padded": " with a 3x3 stem padded by two and no pooling",
}


def _is_of(project: _Project, weights: Weights) -> bool:
    marked = any(name.startswith(project.mark) for name in weights.tensors)
    return marked and project.container == weights.container


def _counted(names: Iterable[str]) -> str:
    """First parts of names, each with how many there are."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"
