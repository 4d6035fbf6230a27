"""Encoders of other projects: recognising the project, its weights and what to leave out."""

from typing import NamedTuple

from torch import Tensor

from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.share.architectures import FoundEncoder, find_encoder
from barlow.share.building import LoadedEncoder, count_names, load_weights
from barlow.share.projectors import find_projector, widths_of
from barlow.share.weights_file import WeightsFile


class _Project(NamedTuple):
    name: str
    container: str | None  # the key under which its files keep the weights; None: no such key
    marks: tuple[str, ...]  # prefixes of weight names or of the file's keys; all must occur
    padded: bool = False  # whether its 3x3 stem pads by two pixels


# The first project that matches a file is named as the file's origin.
_PROJECTS = (
    _Project("dame-cell/barlow-twins", "model_state_dict", ("encoder.", "projector.fc1.")),
    _Project("facebookresearch/barlowtwins", "model", ("backbone.", "projector.")),
    _Project("lightly", "state_dict", ("backbone.", "projection_head.")),
    _Project("stable-pretraining", "state_dict", ("backbone.", "callbacks_")),
    _Project("solo-learn", "state_dict", ("classifier.weight", "projector.0.bias"), padded=True),
    _Project("solo-learn", "state_dict", ("classifier.weight", "predictor."), padded=True),
    _Project("solo-learn", "state_dict", ("classifier.weight", "momentum_"), padded=True),
    _Project("Lightning", "state_dict", ("pytorch-lightning_version",)),
    _Project("torchvision", None, ("fc.",)),
)

# solo-learn pads by two for CIFAR-10 and CIFAR-100 only, and normalises with their statistics:
# the mean and standard deviation, by number of classes.
_CIFAR = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

# Prefixes of heads that an encoder may end in; these are left out.
_HEADS = ("fc.", "head.", "heads.", "linear.", "classifier.", "projector.", "projection_head.")


def load_foreign(weights: WeightsFile, where: str) -> LoadedEncoder:
    """Build the encoder to which the weights of another project belong.

    Args:
        weights: the contents of the file.
        where: the file, for messages.

    Raises:
        UserError: if no known architecture is among them, or they do not fit it.
    """
    project = next((p for p in _PROJECTS if _is_of(p, weights)), None)
    try:
        found = find_encoder(weights.tensors, padded=project is not None and project.padded)
    except UserError as error:
        raise UserError(f"the weights in {where} cannot be used: {error}") from error
    except KeyError as error:
        raise UserError(f"the weights in {where} do not fit: {error} is missing") from error
    if found is None:
        raise UserError(
            f"{where} has no weights of a ResNet or vision transformer, only "
            f"{count_names(name.partition('.')[0] for name in weights.tensors)}; for another timm "
            "architecture, put them in a folder as model.safetensors, beside a config.json with "
            '{"architecture": NAME}'
        )
    if any(name.startswith("aux_classifier.") for name in weights.tensors):
        raise UserError(f"{where} is a segmentation model: its dilated ResNet is not supported")
    spec = found.spec
    encoder = spec.build()
    known = encoder.state_dict()
    if unknown := [k for k in found.weights if k not in known and not k.startswith(_HEADS)]:
        raise UserError(
            f"the weights in {where} do not fit: {spec.name} has no {unknown[0]}, nor "
            f"{len(unknown) - 1} others"
        )
    beside = [k for k in weights.tensors if not k.startswith(found.prefix)]
    matched = load_weights(encoder, found.weights, where, beside)
    classifier = weights.tensors.get("classifier.weight")
    classes = 0 if classifier is None or spec.stem != "padded" else len(classifier)
    mean, std = _CIFAR.get(classes, (None, None))
    preprocess = Preprocess(spec.image_size, mean=mean, std=std, in_chans=spec.in_chans)
    encoder.preprocess = preprocess
    origin = (
        f"{where} is {'a checkpoint of ' + project.name if project else 'a weights file'}: "
        f"{spec.name}{_STEMS[spec.stem]}, {matched}; assumed to expect images of "
        f"{spec.image_size} pixels, normalised with mean {preprocess.mean} and std {preprocess.std}"
    )
    if spec.stem == "small" and classifier is not None:
        origin += "; its stem is assumed to pad by one pixel, where solo-learn's pads by two"
    return LoadedEncoder(encoder, _projector(weights, found), origin)


def _projector(weights: WeightsFile, found: FoundEncoder) -> dict[str, Tensor]:
    projector, top = find_projector(weights.tensors), found.weights.get("fc.weight")
    if projector and top is not None and len(top) == widths_of(projector)[0]:
        return {}  # its input was the output of `fc`, not the features
    return projector


_STEMS = {
    "standard": "",
    "small": " with a 3x3 stem and no pooling",
    "strided": " with a 3x3 stride-2 stem and no pooling",
    "padded": " with a 3x3 stem padded by two and no pooling",
    "linear": " with a 3x3 stem, no ReLU after it and no pooling",
}


def _is_of(project: _Project, weights: WeightsFile) -> bool:
    names = [*weights.tensors, *map(str, weights.state)]
    marked = all(any(name.startswith(mark) for name in names) for mark in project.marks)
    return marked and project.container == weights.container
